"""Dense and causal attention for many query rows, by the core of the block-sparse kernel."""
