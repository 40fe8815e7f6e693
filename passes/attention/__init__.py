"""Attention: token orders, block layouts, corrections, precision."""
