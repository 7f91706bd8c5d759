"""The Gaussian decoder. These files travel with checkpoints: third-party imports and siblings only."""
