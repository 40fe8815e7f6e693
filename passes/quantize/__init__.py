"""Passes that replace numbers by small integers."""
