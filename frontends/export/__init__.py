"""Ahead-of-time export: a model becomes a folder that runs without this package, or is compiled elsewhere."""
