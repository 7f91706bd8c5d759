"""Face-anchored Gaussians: anchoring, skinning, motions, and the files they are read from and exported to."""

from .avatar import GaussianAvatar, open_avatar
from .gaussians import Gaussians
from .motions import load_motion, synthetic_motion

__all__ = ["GaussianAvatar", "Gaussians", "load_motion", "open_avatar", "synthetic_motion"]
