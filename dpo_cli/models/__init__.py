"""Policy and reference: how they are loaded, and what they think of a pair."""
