"""The run: `runner.py` is the file to read first."""
