"""The reenactment bench: clips, protocol, methods, scores and the report."""
