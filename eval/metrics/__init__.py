"""The metrics: mathematics in `functional`, which of them can be computed here by `python -m eval.metrics.functional doctor`."""
