from .avatars.avatar import GaussianAvatar
from .avatars.gaussians import Gaussians
from .avatars.motions import load_motion, synthetic_motion
from .captures.loading import find_trackings, load_tracking
from .captures.portrait import PortraitFit, fit_portrait
from .captures.tracking import Tracking
from .corpus.corpus import load_corpus
from .heads.head_model import HeadModel
from .heads.head_parameters import HeadParameters
from .heads.loading import load_head
from .rendering.cameras import Cameras, portrait_cameras
from .rendering.splatting import render
from .tokenizer.registration import GaussianTokenizer

__all__ = [
    "Cameras",
    "GaussianAvatar",
    "GaussianTokenizer",
    "Gaussians",
    "HeadModel",
    "HeadParameters",
    "PortraitFit",
    "Tracking",
    "find_trackings",
    "fit_portrait",
    "load_corpus",
    "load_head",
    "load_motion",
    "load_tracking",
    "portrait_cameras",
    "render",
    "synthetic_motion",
]
