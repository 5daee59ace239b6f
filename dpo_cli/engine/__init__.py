"""What a run is computed on: one process, or several that act as one."""
