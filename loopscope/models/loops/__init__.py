"""Finding loops: from one traced forward pass to roles, iterations and parameters."""
