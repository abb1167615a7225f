"""Looking inside: capture and interventions."""
