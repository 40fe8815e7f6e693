"""linear and linear_multi for a few rows of x: reads the weights once, as they lie."""
