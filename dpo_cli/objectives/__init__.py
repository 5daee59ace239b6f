"""What a run minimises, and what that asks of the model, the checks and the verdict."""
