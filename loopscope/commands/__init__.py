"""Commands: one module each, parsing and printing only."""
