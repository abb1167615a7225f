"""Tables: rows, frames, aggregation; needs no torch."""
