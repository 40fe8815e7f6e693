"""hadamard: a fast Hadamard transform per row, the power-of-two part by butterflies, the rest densely."""
