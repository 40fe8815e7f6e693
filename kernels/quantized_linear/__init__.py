"""quantized_linear and quantized_linear_multi: packed integer weights, exact integer products."""
