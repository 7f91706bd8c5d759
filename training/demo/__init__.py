"""Everything on two CPU cores: `python -m training.demo`."""
