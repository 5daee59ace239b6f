"""Completions of a model: decoding, and their texts."""
