"""Attention over a paged KV pool, appending to it, bounds of its pages, and column sums of attention."""
