"""Measures: states to numbers."""
