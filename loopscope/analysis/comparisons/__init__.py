"""Comparisons: many checkpoints, measured in resumable shards, and what follows."""
