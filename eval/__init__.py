"""Measuring avatars: metrics, the reenactment bench with its report, and a viewer in the browser."""
