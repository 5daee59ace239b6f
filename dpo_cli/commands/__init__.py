"""The commands behind the command line, one file each: every one opens its own config and hands out parts."""
