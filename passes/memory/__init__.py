"""Passes that decide which keys and values are kept, and which are attended."""
