"""How much probability every block of an attention holds, as generated kernels."""
