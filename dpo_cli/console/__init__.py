"""What a person sees: the header, the live table, and the escaping of untrusted text."""
