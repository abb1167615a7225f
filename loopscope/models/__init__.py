"""Own models: layouts, GPT-NeoX block, recurrences, MeSH memory, checkpoints, imports."""
