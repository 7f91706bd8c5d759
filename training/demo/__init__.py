"""The whole road on two CPU cores: `python -m training.demo`."""
