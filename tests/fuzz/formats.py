"""Every format the toolkit reads: a whole file of it, how it is read, and the ways to damage it that suit it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoConfig

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.motions import load_motion
from gaussian_tokenizer.avatars.ply import read_gaussian_ply, write_gaussian_ply
from gaussian_tokenizer.captures.landmark_files import read_landmarks
from gaussian_tokenizer.captures.loading import load_tracking
from gaussian_tokenizer.captures.portrait import fit_portrait
from gaussian_tokenizer.captures.subject import Subject
from gaussian_tokenizer.corpus import validation
from gaussian_tokenizer.corpus.building import build
from gaussian_tokenizer.corpus.corpus import load_corpus
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.heads import flame
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.ict import _read_indices, read_obj
from gaussian_tokenizer.heads.landmarks import with_landmarks
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.inspect.__main__ import inspect
from gaussian_tokenizer.synthesize import synthesize
from gaussian_tokenizer.tokenizer.image_files import open_image, verify_image
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.plain_arrays import FLAME, read_arrays
from gaussian_tokenizer.utils.plain_pickle import interpret
from modeling import GaussianDecoderConfig, PointillistConfig
from tests.fuzz import mutations as m
from training.common.arguments import read_yaml

JSON, NPZ = (m.json_value, m.json_value, m.number_in_text), (m.zip_member,)
SAFETENSORS = (m.safetensors_header, m.safetensors_header, m.safetensors_values)
# What transformers raises for a config.json that is no JSON, is nested too deep, or has a field of another type.
OF_TRANSFORMERS = (OSError, RecursionError, StrictDataclassError)
LINES = (m.line_of_text, m.number_in_text)


@dataclass(frozen=True)
class Format:
    """Files that are damaged one at a time, and what reads them."""

    files: tuple[Path, ...]
    read: Callable[[Path], object]  # called with the damaged file
    mutations: Sequence[m.Mutation]
    weight: int = 4  # how often, compared with the others
    allowed: tuple[type[Exception], ...] = ()  # beside ValueError and FileNotFoundError
    foreign: str = ""  # a package that reads the file as well, and may raise what it likes from its own lines


def make_formats(folder: Path) -> dict[str, Format]:
    """Write a whole file of every format into `folder`, about ten seconds."""
    flame.arrays_in_child = _arrays_in_this_process  # type: ignore[assignment]  # the child costs 50 ms a file
    head = build_procedural_head(600)
    head.save(folder / "head.safetensors")
    options = {"image_size": 32, "views": 2, "timesteps": 2, "num_points": 60}
    subject, *_ = synthesize(folder / "avatars", 4, **options)
    avatar = GaussianAvatar.load(subject, head=head)
    avatar.save(folder / "avatar.safetensors")
    ply = read_gaussian_ply(subject / "point_cloud.ply", with_faces=True)
    write_gaussian_ply(folder / "world.ply", replace(ply, faces=None))
    np.savez_compressed(folder / "motion.npz", **dict(np.load(subject / "flame_param.npz")))
    _write_flame(folder / "flame.pkl")
    _write_ict(folder / "ict")
    raw = _write_raw_vhap(folder / "raw", subject)
    frame = _write_pixel3dmm(folder / "pixel3dmm", head)
    embedding = {
        "full_lmk_faces_idx": head.landmark_faces.numpy(),
        "full_lmk_bary_coords": head.landmark_barycentrics.numpy(),
    }
    np.save(folder / "embedding.npy", embedding | {"dynamic_lmk_faces_idx": head.landmark_faces}, allow_pickle=True)
    landmarks = folder / "landmarks.json"
    landmarks.write_bytes(Path("training/recipe/astronaut.json").read_bytes())
    corpus = folder / "corpus"
    settings = BuildSettings(n_bins=32, image_size=28, num_validation=1, allow_unknown_license=True)
    build(folder / "avatars", head, corpus, settings, progress=False)
    (folder / "card").mkdir()
    PointillistConfig().save_pretrained(folder / "model")
    GaussianDecoderConfig().save_pretrained(folder / "decoder")
    images = _write_images(folder / "images")
    configs = folder / "configs"
    configs.mkdir()
    for path in Path("training/configs").glob("*.yaml"):
        (configs / path.name).write_bytes(path.read_bytes())

    def avatar_folder(path: Path) -> object:
        inspect(path)
        return GaussianAvatar.load(subject, head=head)

    def tokenizer(path: Path) -> object:
        return GaussianTokenizer.from_pretrained(path.parent)

    def portrait(path: Path) -> object:
        points, confidences = read_landmarks(path)
        return fit_portrait(points, head, (512, 512), confidences=confidences)

    def image(path: Path) -> object:
        verify_image(path)
        return open_image(path.read_bytes()).convert("RGBA")

    return {
        "avatar PLY": Format((subject / "point_cloud.ply",), avatar_folder, (m.number_in_text, m.line_of_text), 8),
        "world PLY": Format((folder / "world.ply",), lambda path: read_gaussian_ply(path, with_faces=False), LINES, 8),
        "flame_param.npz": Format((subject / "flame_param.npz",), HeadParameters.load, NPZ, 8),
        "motion": Format((folder / "motion.npz",), lambda path: load_motion(path, head), NPZ, 8),
        "avatar safetensors": Format(
            (folder / "avatar.safetensors",), lambda path: (inspect(path), GaussianAvatar.load(path, head=head)), SAFETENSORS, 8
        ),
        "head safetensors": Format((folder / "head.safetensors",), HeadModel.load, SAFETENSORS, 8),
        "FLAME": Format((folder / "flame.pkl",), lambda path: flame.read_flame(path, teeth=False), (m.pickle_opcodes,), 12),
        "landmark embedding": Format((folder / "embedding.npy",), lambda path: with_landmarks(head, path), (m.pickle_opcodes,)),
        "landmarks": Format((landmarks,), portrait, JSON, 1),
        "ICT OBJ": Format((folder / "ict" / "generic_neutral_mesh.obj",), read_obj, LINES),
        "ICT indices": Format((folder / "ict" / "vertex_indices.json",), _read_indices, JSON),
        "VHAP transforms": Format(
            tuple(subject.glob("transforms*.json")), lambda path: load_tracking(subject, head), JSON, 1
        ),
        "VHAP raw": Format((raw,), lambda path: load_tracking(raw.parent, head), NPZ, 1),
        "Pixel3DMM": Format((frame,), lambda path: load_tracking(frame.parents[1], head), (m.zip_member,), 2),
        "metadata.json": Format(
            (subject / "metadata.json",), lambda path: (Subject.open(subject), GaussianAvatar.load(subject)), JSON
        ),
        "corpus.json": Format((corpus / "corpus.json",), lambda path: _read_corpus(corpus), JSON, 1),
        "tokenizer": Format((corpus / "tokenizer" / "processor_config.json",), tokenizer, JSON, 2, (OSError,)),
        "shard": Format(tuple(corpus.glob("*/*.parquet")), lambda path: _read_corpus(corpus), (), 1),
        "model config": Format(
            (folder / "model" / "config.json", folder / "decoder" / "config.json"),
            lambda path: AutoConfig.from_pretrained(path.parent), JSON, 2, OF_TRANSFORMERS, "transformers",
        ),
        "image": Format(images, image, (m.number_in_text,), 8),
        "training YAML": Format(tuple(configs.iterdir()), read_yaml, LINES, 2),
    }  # fmt: skip


def _read_corpus(corpus: Path) -> None:
    loaded = load_corpus(corpus)
    for split in loaded.splits:
        loaded.frame_rows(split)
    validation.validate(corpus)


def _arrays_in_this_process(path: Path, keys: Sequence[str]) -> dict:
    return read_arrays(interpret(path.read_bytes(), FLAME), keys)


def _write_flame(path: Path) -> None:
    """Python 3's pickle of a tiny FLAME; what Python 2, chumpy and scipy add is in its opcodes' words."""
    import pickle

    import scipy.sparse

    rng = np.random.default_rng(0)
    weights = rng.random((12, 5))
    content = {
        "v_template": rng.random((12, 3)),
        "f": np.arange(12, dtype=np.uint32).reshape(4, 3),
        "shapedirs": rng.random((12, 3, 104)).astype(np.float32),
        "posedirs": np.asfortranarray(rng.random((12, 3, 36)).astype(np.float32)),
        "J_regressor": scipy.sparse.random(5, 12, 0.3, "csc", random_state=1),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.uint32),
        "weights": weights / weights.sum(1, keepdims=True),
    }
    path.write_bytes(pickle.dumps(content, 2))


def _write_ict(folder: Path) -> None:
    folder.mkdir()
    lines = ["# quads", *(f"v {x}.5 {x * x}e-1 -{x}" for x in range(40)), *(f"vt 0.{x} 0.5" for x in range(40))]
    lines += [f"f {x}/{x} {x + 1}/{x} {x + 2}/{x} {x + 3}/{x}" for x in range(1, 37)] + ["f 1 2 3"]
    (folder / "generic_neutral_mesh.obj").write_text("\n".join(lines))
    names = {"expressions": ["jawOpen", "browDown_L"], "idx_to_landmark_verts": list(range(68))}
    (folder / "vertex_indices.json").write_text(json.dumps(names))


def _write_raw_vhap(folder: Path, subject: Path) -> Path:
    params = dict(np.load(subject / "flame_param" / "00000.npz"))
    (folder / "images").mkdir(parents=True)
    Image.open(subject / "images" / "00000_00.png").save(folder / "images" / "00000.png")
    extra = {"timestep_id": np.array(["00000"]), "focal_length": np.array([[2.0]], np.float32)}
    np.savez(folder / "tracked_flame_params_30.npz", **params, **extra)
    return folder / "tracked_flame_params_30.npz"


def _write_pixel3dmm(folder: Path, head: HeadModel) -> Path:
    row = np.array([[1, 0, 0, 0, 1, 0]], np.float32)
    flame_part = {
        "exp": np.zeros((1, head.n_expression), np.float32),
        "shape": torch.zeros(1, head.n_shape),
        "eyes": np.concatenate((row, row), 1),
        "eyelids": np.zeros((1, 2), np.float32),
        **{name: row for name in ("jaw", "neck", "R")},
        "R_rotation_matrix": np.eye(3, dtype=np.float32)[None],
        "t": np.zeros((1, 3), np.float32),
    }
    camera = {
        "R_base_0": np.eye(3, dtype=np.float32)[None],
        "t_base_0": np.array([[0, 0, -1.0]], np.float32),
        "fl": np.array([[3.0]], np.float32),
        "pp": np.zeros((1, 2), np.float32),
    }
    for name in ("checkpoint", "cropped"):
        (folder / name).mkdir(parents=True)
    torch.save({"flame": flame_part, "camera": camera, "frame_id": 0}, folder / "checkpoint" / "00000.frame")
    Image.new("RGB", (32, 32), (90, 80, 70)).save(folder / "cropped" / "00000.jpg")
    return folder / "checkpoint" / "00000.frame"


def _write_images(folder: Path) -> tuple[Path, ...]:
    folder.mkdir()
    image = Image.effect_noise((24, 20), 60).convert("RGB")
    image.putpixel((3, 3), (255, 0, 0))
    for form in ("png", "jpeg", "webp", "tiff", "gif", "bmp", "ppm"):
        image.save(folder / f"a.{form}")
    image.convert("RGBA").save(folder / "b.png")
    image.convert("P").save(folder / "c.png", interlace=1)
    image.save(folder / "d.tiff", compression="tiff_lzw")
    image.save(folder / "e.jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    return tuple(sorted(folder.iterdir()))
