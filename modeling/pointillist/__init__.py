"""The autoregressive point model and its generation. These files travel with checkpoints: third-party imports and siblings only."""
