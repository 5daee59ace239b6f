"""Commands on files besides training: each opens its config and hands every part what it needs."""
