"""Completions of a model: decoding, sampling, and the texts that come of them."""
