"""Generated kernels, one folder per semantic op."""
