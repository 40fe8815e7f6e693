"""A copy of a kept tensor and its distance from the one before, as generated kernels."""
