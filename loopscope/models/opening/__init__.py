"""Opening: from a target (zoo name, folder, hub id, factory) to a model."""
