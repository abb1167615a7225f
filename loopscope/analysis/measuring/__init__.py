"""Measuring: one model over samples, batch by batch, into tables."""
