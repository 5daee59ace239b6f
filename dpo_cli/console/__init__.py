"""What a person sees: the header, the live table, and the one door for text of others."""
