"""gated_mlp: activation(gate) * up, elementwise."""
