"""Somebody else's model with every iteration addressable."""
