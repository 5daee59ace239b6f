"""Pages with figures: one HTML file each, made from plain data, which runs no script and asks nobody."""
