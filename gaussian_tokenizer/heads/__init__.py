"""Head models (procedural, ICT-FaceKit, FLAME), their parameters, and `load_head`, which opens all of them."""

from .head_model import HeadModel, PosedHead
from .head_parameters import HeadParameters
from .loading import load_head

__all__ = ["HeadModel", "HeadParameters", "PosedHead", "load_head"]
