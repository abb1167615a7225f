"""Measures: states to tables (never imports matplotlib)."""
