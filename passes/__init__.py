"""Passes, one file each. A file name is the pass name in snake_case."""
