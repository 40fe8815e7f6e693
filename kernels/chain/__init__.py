"""A stretch of a decode graph as one generated C++ function: no dispatch between its ops."""
