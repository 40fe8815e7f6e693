"""Normal form: one spelling per meaning, semantic ops raised."""
