"""Avatars in the browser: `python -m eval.viewer`."""
