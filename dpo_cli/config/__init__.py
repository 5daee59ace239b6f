"""What a run may be told: the schema behind conf/, and how a config is composed from it."""
