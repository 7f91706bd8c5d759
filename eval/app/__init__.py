"""An avatar from one portrait in the browser: `python -m eval.app`."""
