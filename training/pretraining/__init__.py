"""Pre-training of the point model: arguments, windows, trainer, metrics."""
