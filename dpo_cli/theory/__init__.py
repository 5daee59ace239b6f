"""The mathematics: pure functions of tensors and numbers; no files, no models, no config.

In every shape below, B is the number of preference pairs.
"""
