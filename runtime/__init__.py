"""Runtime support: plain data contracts, the artifact store, kernel building and loading."""
