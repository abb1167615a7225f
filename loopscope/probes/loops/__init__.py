"""Finding loops: from one traced forward to roles, iterations and parameters."""
