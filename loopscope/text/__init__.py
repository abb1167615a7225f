"""Text: corpora, tokenisers, windows of tokens."""
