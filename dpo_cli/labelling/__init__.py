"""Who says which response is better: people, reward models, rules; and matches between models."""
