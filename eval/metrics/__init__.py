"""The metrics: `functional` has the mathematics, `python -m eval.metrics doctor` says which can be computed on this machine."""
