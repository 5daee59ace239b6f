"""Scoring a policy against its reference, and showing its answers."""
