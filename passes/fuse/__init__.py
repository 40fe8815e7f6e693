"""Fusions that exist for a kernel."""
