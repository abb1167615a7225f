"""Looking inside: capture and readout."""
