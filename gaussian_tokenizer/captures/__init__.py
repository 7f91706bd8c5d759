"""One subject on disk: images, cameras and head parameters, as VHAP, Pixel3DMM and GaussianAvatars leave them."""

from .frame import Frame
from .loading import find_trackings, load_tracking
from .portrait import PortraitFit, fit_portrait
from .tracking import Tracking

__all__ = ["Frame", "PortraitFit", "Tracking", "find_trackings", "fit_portrait", "load_tracking"]
