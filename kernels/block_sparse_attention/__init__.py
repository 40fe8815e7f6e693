"""Attention over the blocks a layout names; the same generator also makes the dense and causal kernels."""
