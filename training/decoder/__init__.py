"""Training of the Gaussian decoder: arguments, subjects, losses, trainer."""
