"""Where the records of a run go besides metrics.jsonl and the console."""
