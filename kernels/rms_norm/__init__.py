"""rms_norm and add_rms_norm: one generator, with or without the residual add."""
