"""The columns of a corpus: one row per subject in `avatars`, one row per image in `frames`.

In meters, radians (axis-angle) and pixels from the upper left corner; cameras are world-to-camera with OpenCV axes.
"""

from datasets import Array2D, Features, Image, List, Value

from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import FRAME_KEYS
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer

CONFIGURATIONS = ("avatars", "frames")


def corpus_features(tokenizer: GaussianTokenizer, head: HeadModel, static_offset: bool) -> dict[str, Features]:
    """Columns of both configurations; with `static_offset` if any subject has one."""
    mesh = (head.n_vertices, 3)
    pose = {name: List(Value("float32"), length=size or head.n_expression) for name, size in FRAME_KEYS.items()}
    avatars = {
        "avatar_id": Value("string"),
        "input_ids": List(Value("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")),
        "num_points": Value("int32"),
        "num_out_of_bounds": Value("int32"),  # points clamped to the border of the bounds
        "points_per_face": List(Value("int32")),  # entry k: number of faces with k points
        "shape": List(Value("float32"), length=head.n_shape),
        **pose,  # of the first frame
        **({"static_offset": Array2D(mesh, "float32")} if static_offset else {}),
        "head_vertices": Array2D(mesh, "float32"),  # own shape, no expression, no pose
        "head_normals": Array2D(mesh, "float16"),
        "license": Value("string"),
        "consent": Value("string"),
        "metadata": Value("string"),  # the subject's metadata.json
        "split": Value("string"),
    }
    frames = {
        "avatar_id": Value("string"),
        "timestep": Value("int32"),
        "camera": Value("int32"),
        "image": Image(),  # the bytes of the file, unchanged
        **{name: Value("float32") for name in ("fx", "fy", "cx", "cy")},
        "width": Value("int32"),
        "height": Value("int32"),
        "viewmat": Array2D((4, 4), "float32"),
        **pose,
    }
    return {"avatars": Features(avatars), "frames": Features(frames)}
