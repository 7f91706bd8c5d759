"""GaussianTokenizer: clouds of face-anchored points to token ids and back. These files travel with checkpoints."""
