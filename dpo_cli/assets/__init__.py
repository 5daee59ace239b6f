"""Data that ships with the program: the sample preference pairs."""
