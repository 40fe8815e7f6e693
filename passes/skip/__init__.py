"""Passes that leave out parts of a model's depth."""
