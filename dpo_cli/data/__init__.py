"""From a row in a file to token ids in a batch."""
