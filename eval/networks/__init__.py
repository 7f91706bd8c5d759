"""The networks of the metrics: which weights they take, and what they read."""
