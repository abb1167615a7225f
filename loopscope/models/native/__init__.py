"""loopscope's own models: configuration, block, recurrence, model, checkpoints."""
