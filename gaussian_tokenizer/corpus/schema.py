"""The columns of a corpus: one row an avatar in `avatars`, one row an image in `frames`."""

import numpy as np
from datasets import Array2D, Features, Image, List, Value

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer


def points_per_face(faces: np.ndarray, n_faces: int) -> np.ndarray:
    """Face of every point (N,) -> histogram (max + 1,) int32: entry k counts the faces that have k points."""
    return np.bincount(np.bincount(faces, minlength=n_faces)).astype(np.int32)


def avatars_features(tokenizer: GaussianTokenizer, head: HeadModel, static_offset: bool) -> Features:
    """Columns of `avatars`; `static_offset` is there if any subject has one. Head parameters are of the first frame."""
    mesh = (head.n_vertices, 3)
    columns = {
        "avatar_id": Value("string"),
        "input_ids": List(Value("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")),
        "num_points": Value("int32"),
        "num_out_of_bounds": Value("int32"),  # points clamped to the border of the bounds
        "points_per_face": List(Value("int32")),  # entry k: how many faces have k points
        "shape": List(Value("float32"), length=head.n_shape),
        **_pose_features(head),
        "static_offset": Array2D(mesh, "float32"),
        "head_vertices": Array2D(mesh, "float32"),  # meters, own shape, no expression, no pose
        "head_normals": Array2D(mesh, "float16"),
        "license": Value("string"),
        "consent": Value("string"),
        "metadata": Value("string"),  # the subject's metadata.json
        "split": Value("string"),
    }
    if not static_offset:
        del columns["static_offset"]
    return Features(columns)


def frames_features(head: HeadModel) -> Features:
    """Columns of `frames`. Shape and static offset are the subject's: they stand in `avatars`."""
    return Features(
        {
            "avatar_id": Value("string"),
            "timestep": Value("int32"),
            "camera": Value("int32"),
            "image": Image(),  # the bytes of the file, as they were
            **{name: Value("float32") for name in ("fx", "fy", "cx", "cy")},  # pixels from the upper left corner
            "width": Value("int32"),
            "height": Value("int32"),
            "viewmat": Array2D((4, 4), "float32"),  # world-to-camera, OpenCV axes, meters
            **_pose_features(head),
        }
    )


def _pose_features(head: HeadModel) -> dict[str, List]:
    return {name: List(Value("float32"), length=size or head.n_expression) for name, size in FRAME_KEYS.items()}
