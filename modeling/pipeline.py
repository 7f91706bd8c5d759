"""One call from a portrait to a drivable avatar: the four components that belong together.

    portrait, head parameters -> GaussianTokenizer -> PointillistForCausalLM.generate -> points and their features
                              -> GaussianDecoder -> canonical Gaussians -> GaussianAvatar (anchored to the head model)

A pipeline is a folder, or a repository of the Hub, with a normal subfolder for each component:

    pipeline.json        which components, and what this file is
    tokenizer/           GaussianTokenizer
    point_model/         PointillistForCausalLM
    gaussian_decoder/    GaussianDecoder
    head/                head.safetensors, a HeadModel
    README.md, images/   the model card and its images
    *.py                 the code of the components once more: transformers looks for it here, whatever the subfolder
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCardData, create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.geometry.triangles import nearest_on_faces
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_folder
from gaussian_tokenizer.utils.json_files import read_json

from .conversion import to_gaussians
from .gaussian_decoder.modeling_gaussian_decoder import GaussianDecoder
from .pointillist.generation_pointillist import PointillistGenerateOutput
from .pointillist.modeling_pointillist import PointillistForCausalLM
from .ranking import likeliest

FORMAT = "avatar-pointillist pipeline 1"
INDEX_NAME, HEAD_NAME = "pipeline.json", "head.safetensors"
COMPONENTS = ("tokenizer", "point_model", "gaussian_decoder", "head")
# A point sampled too high skips all that would have come before it, and the sorted order never goes back: prefer likely tokens.
SAMPLING = {"temperature": 0.9, "top_p": 0.95}
# Of the demo's model one cloud in eight falls apart; of four hardly ever all.
CANDIDATES = 4


class AvatarPipeline:
    """Tokenizer, point model, Gaussian decoder and head model of one vocabulary.

    Raises `ValueError` at construction if they do not belong together, naming the two that disagree.
    """

    def __init__(
        self,
        tokenizer: GaussianTokenizer,
        point_model: PointillistForCausalLM,
        gaussian_decoder: GaussianDecoder,
        head: HeadModel,
    ):
        point_config, decoder_config = point_model.config, gaussian_decoder.config
        if (point_config.n_bins, point_config.n_faces) != (tokenizer.n_bins, tokenizer.n_faces):
            raise ValueError(
                f"the point model has {point_config.n_bins} levels and {point_config.n_faces} faces, the tokenizer "
                f"{tokenizer.n_bins} and {tokenizer.n_faces}; take both from one training"
            )
        if head.n_faces != tokenizer.n_faces or tokenizer.head_hash not in (None, head.hash):
            raise ValueError(
                f"the tokenizer is for head model {tokenizer.head_name!r} ({tokenizer.n_faces} faces, hash "
                f"{tokenizer.head_hash}), not for {head.name!r} ({head.n_faces} faces, hash {head.hash})"
            )
        if decoder_config.mode == "flame_position":
            raise ValueError(
                "the Gaussian decoder is of mode flame_position, which decodes head vertices and no generated points; "
                "a pipeline needs full, position or ar_feature"
            )
        if decoder_config.reads_point_features and decoder_config.point_feature_size != point_config.hidden_size:
            raise ValueError(
                f"the Gaussian decoder reads point features of width {decoder_config.point_feature_size}, the point model has "
                f"{point_config.hidden_size}; take the decoder that was trained behind this point model"
            )
        self.tokenizer, self.head = tokenizer, head
        self.point_model, self.gaussian_decoder = point_model.eval(), gaussian_decoder.eval()
        self.to(point_model.device)

    @property
    def device(self) -> torch.device:
        return self.point_model.device

    def to(self, device: torch.device | str) -> "AvatarPipeline":
        """Move every component; returns the pipeline."""
        self.point_model.to(device)
        self.gaussian_decoder.to(device)
        self.head = self.head.to(device)
        return self

    def __call__(
        self,
        image: Any,
        head_params: HeadParameters | Sequence[HeadParameters] | None = None,
        *,
        seed: int | None = None,
        candidates: int = CANDIDATES,
        **generate: Any,
    ) -> GaussianAvatar | list[GaussianAvatar]:
        """The avatar of one person, or of each person of a list.

        Args:
            image: the portrait, as the tokenizer takes it (PIL image, array, tensor or file), or a list of portraits.
            head_params: the person's head parameters, of which shape and static offset are used (None: the mean head); for a
                list of portraits a list of them.
            seed: makes the same avatar again; None samples from torch's generator as it stands.
            candidates: how many clouds are written of each person, side by side; the likeliest is decoder_config.
            generate: options of `PointillistForCausalLM.generate` (max_points, temperature, guidance_scale, ...).

        Returns:
            `GaussianAvatar` in canonical pose with the head model attached: `avatar.posed(motion)` moves it.

        Raises:
            ValueError: an image that cannot be read, parameters of another head model.
        """
        many = isinstance(image, (list, tuple))
        images = list(image) if many else [image]
        given = [None] * len(images) if head_params is None else head_params if many else [head_params]
        if len(given) != len(images):
            raise ValueError(f"{len(images)} portraits but head parameters of {len(given)} persons")
        zeros = HeadParameters.zeros(self.head.n_shape, self.head.n_expression)
        params = [zeros if own is None else own for own in given]
        inputs = self.inputs(images, params)
        written = self.write(inputs, seed=seed, candidates=candidates, **generate)
        avatars = [self.decode_attributes(*item) for item in zip(*self.points(written), inputs["pixel_values"], params)]
        return avatars if many else avatars[0]

    def inputs(self, images: Sequence[Any], params: Sequence[HeadParameters]) -> dict[str, Tensor]:
        """Portraits and heads as the networks read them: pixel_values, head_vertices and head_normals of B persons."""
        for own in params:
            self.head.check(own)
        vertices = torch.stack([self.head.canonical_vertices(own.to(self.device)) for own in params])
        inputs = self.tokenizer(
            images=list(images), head_vertices=vertices, head_faces=self.head.faces, return_tensors="pt"
        )
        return {name: value.to(self.device) for name, value in inputs.items()}

    @torch.no_grad()
    def write(
        self,
        inputs: Mapping[str, Tensor],
        *,
        seed: int | None = None,
        candidates: int = CANDIDATES,
        **generate: Any,
    ) -> PointillistGenerateOutput:
        """Sequences of B persons with the hidden states that predicted their points, the likeliest of the candidates each."""
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, found {candidates}")
        config = self.point_model.config
        condition = {
            name: value.repeat_interleave(candidates, 0)
            for name, value in inputs.items()
            if (config.use_vision_encoder if name == "pixel_values" else config.use_point_encoder)
        }
        if seed is not None:
            torch.manual_seed(seed)
        options = SAMPLING | generate | {"output_point_features": True, "return_dict_in_generate": True}
        written = self.point_model.generate(**condition, **options)
        return written if candidates == 1 else likeliest(self.point_model, written, candidates)

    def points(self, written: PointillistGenerateOutput) -> tuple[list[dict], list[Tensor]]:
        """Of each sequence its points (positions (N, 3), faces (N,)) and their features (N, 4, D)."""
        points = [self.tokenizer.decode(ids.cpu(), errors="truncate") for ids in written.sequences]
        empty = [row for row, own in enumerate(points) if len(own["faces"]) == 0]
        if empty:
            raise ValueError(
                f"the point model ended sequence {empty[0]} before its first point: give min_points, or another seed"
            )
        return points, [features[: len(own["faces"])] for features, own in zip(written.point_features, points)]

    @torch.no_grad()
    def decode_attributes(
        self, points: Mapping[str, Any], features: Tensor | None, pixel_values: Tensor, params: HeadParameters
    ) -> GaussianAvatar:
        """The avatar of one person's points: their looks from the decoder, anchored to the head.

        `points` with positions (N, 3) and faces (N,), `features` (N, 4, D), `pixel_values` (3, S, S).
        """
        config = self.gaussian_decoder.config
        own = params.canonical().to(self.device)
        faces = torch.as_tensor(points["faces"], device=self.device)
        positions = torch.as_tensor(points["positions"], device=self.device)
        anchors = None
        if config.read_anchors:
            anchors = nearest_on_faces(positions, faces, self.head.canonical_vertices(own), self.head.faces)
        decoded = self.gaussian_decoder(
            positions=positions[None],
            point_features=features[None] if config.reads_point_features and features is not None else None,
            pixel_values=pixel_values[None],
            anchors=None if anchors is None else anchors[None],
        )
        return GaussianAvatar.from_gaussians(to_gaussians(decoded), faces, own, self.head)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> "AvatarPipeline":
        """Open a folder that `save_pretrained` wrote, or a repository of the Hub with the same content.

        Raises FileNotFoundError for a folder or repository that is not there or lacks a component (named), ValueError
        for components that do not belong together.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = _downloaded(str(name))
        if not (folder / INDEX_NAME).is_file():
            raise FileNotFoundError(
                f"{name}: not a pipeline, it has no {INDEX_NAME}; save one with AvatarPipeline(...).save_pretrained"
            )
        try:
            found = read_json(folder / INDEX_NAME)["format"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{folder / INDEX_NAME}: not the index of a pipeline ({error})") from None
        if found != FORMAT:
            raise ValueError(f"{folder / INDEX_NAME}: format {found!r}, expected {FORMAT!r}")
        missing = [component for component in COMPONENTS if not (folder / component).is_dir()]
        if missing:
            raise FileNotFoundError(f"{name}: lacks {', '.join(missing)}; a pipeline has {', '.join(COMPONENTS)}")
        options = {} if dtype is None else {"dtype": dtype}
        try:
            pipeline = cls(
                GaussianTokenizer.from_pretrained(folder / "tokenizer"),
                PointillistForCausalLM.from_pretrained(folder / "point_model", **options),
                GaussianDecoder.from_pretrained(folder / "gaussian_decoder", **options),
                HeadModel.load(folder / "head" / HEAD_NAME),
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        except OSError as error:
            raise FileNotFoundError(f"{name}: {' '.join(str(error).split())}") from None
        return pipeline if device is None else pipeline.to(device)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        images: Sequence[str | os.PathLike] = (),
        card: str | None = None,
        license: str = "other",
    ) -> None:
        """Write the folder described above; it appears whole, or what was there before stays.

        `images` are copied to `images/` and shown by the model card; `card` adds a paragraph to it. `license` is the Hub's
        name of the license of these weights ("apache-2.0", "cc-by-nc-4.0", ...), which their training data decide.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as new:
            self.tokenizer.save_pretrained(new / "tokenizer")
            self.point_model.save_pretrained(new / "point_model")
            self.gaussian_decoder.save_pretrained(new / "gaussian_decoder")
            for code in sorted(new.glob("*/*.py")):
                shutil.copy(code, new)
            (new / "head").mkdir()
            self.head.save(new / "head" / HEAD_NAME)
            if images:
                (new / "images").mkdir()
            names = [Path(shutil.copy(image, new / "images")).name for image in images]
            (new / "README.md").write_text(self._card(names, card, license), encoding="utf-8")
            index = {"format": FORMAT, "components": list(COMPONENTS)}
            (new / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        images: Sequence[str | os.PathLike] = (),
        card: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        license: str = "other",
    ) -> str:
        """Upload the folder as a model repository; returns its address."""
        with TemporaryDirectory() as temporary:
            self.save_pretrained(Path(temporary) / "pipeline", images, card, license)
            address = create_repo(repo_id, private=private, exist_ok=True, token=token)
            upload_folder(repo_id=address.repo_id, folder_path=Path(temporary) / "pipeline", token=token)
            return str(address)

    def _card(self, images: Sequence[str], paragraph: str | None, license: str) -> str:
        header = ModelCardData(
            license=license,
            library_name="avatar-pointillist",
            tags=["avatar-pointillist", "gaussian-splatting", "3d", "avatars"],
            pipeline_tag="image-to-3d",
        ).to_yaml()
        shown = "\n\n".join(f"![{Path(image).stem}](images/{image})" for image in images)
        points, decoder = self.point_model.config, self.gaussian_decoder.config
        parts = [
            f"---\n{header}\n---\n\n# Avatar pipeline",
            "One portrait in, an animatable head of 3D Gaussians out: an open implementation of AvatarPointillist (CVPR 2026).",
            shown,
            paragraph or "",
            f"""| component | what |
|---|---|
| `tokenizer/` | {points.n_bins} levels an axis, {points.n_faces} faces |
| `point_model/` | {points.num_hidden_layers} layers, width {points.hidden_size}: writes the points |
| `gaussian_decoder/` | {decoder.num_hidden_layers} blocks, width {decoder.hidden_size}, mode {decoder.mode}: gives them looks |
| `head/` | head model {self.head.name!r}, {self.head.n_vertices} vertices |""",
            """```python
from modeling import AvatarPipeline

pipeline = AvatarPipeline.from_pretrained("THIS_FOLDER_OR_ID")
avatar = pipeline("portrait.png", seed=0)
avatar.save("avatar")                      # a GaussianAvatars folder; python -m gaussian_tokenizer.animate moves it
```""",
            """Where this toolkit is not installed, the networks and the tokenizer load one by one:

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

where = "THIS_FOLDER_OR_ID"
tokenizer = AutoProcessor.from_pretrained(where, subfolder="tokenizer", trust_remote_code=True)
point_model = AutoModelForCausalLM.from_pretrained(where, subfolder="point_model", trust_remote_code=True)
gaussian_decoder = AutoModel.from_pretrained(where, subfolder="gaussian_decoder", trust_remote_code=True)
```""",
            "A generated head shows no real person unless it was asked to: do not make one of somebody who has not agreed to it.",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _downloaded(name: str) -> Path:
    """The snapshot of a Hub repository; from the cache where there is no network."""
    try:
        return Path(snapshot_download(name))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such pipeline, neither as a folder nor in the cache of the Hub; correct the name, or download it "
            f"while online (HF_HUB_OFFLINE=0) ({' '.join(str(error).split())[:200]})"
        ) from None
