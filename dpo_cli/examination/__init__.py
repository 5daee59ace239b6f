"""Examining preference data before it is trained on: what is dropped, how long it is, what predicts the label."""
