"""Find, read, align, name and write model files."""
