"""One call from a portrait to an animatable avatar, by four components that belong together.

    portrait, head parameters -> GaussianTokenizer -> PointillistForCausalLM.generate -> points and their features
                              -> GaussianDecoder -> canonical Gaussians -> GaussianAvatar (anchored to the head model)

A pipeline is a folder, or a repository of the Hub, with a normal subfolder for each component:

    tokenizer/, point_model/, gaussian_decoder/, head/   (head.safetensors, a HeadModel)
    pipeline.json        format and components
    README.md, images/   the model card and its images
    *.py                 a copy of the components' code: transformers looks for it here, whatever the subfolder
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.geometry.triangles import nearest_on_faces
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.portrait_points import Portrait, Reference, face_pixels
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_folder
from gaussian_tokenizer.utils.json_files import read_json, write_json

from .checks import check_head, check_vocabulary, check_width
from .conversion import to_gaussians
from .gaussian_decoder.modeling_gaussian_decoder import GaussianDecoder
from .pointillist.configuration_pointillist import FACE_INPUTS
from .pointillist.generation_pointillist import PointillistGenerateOutput
from .pointillist.modeling_pointillist import PointillistForCausalLM
from .ranking import likeliest
from .refinement import check_steps, refine

FORMAT = "avatar-pointillist pipeline 1"
INDEX_NAME, HEAD_NAME = "pipeline.json", "head.safetensors"
COMPONENTS = ("tokenizer", "point_model", "gaussian_decoder", "head")
# A point sampled too high skips all that would come before it, because the sorted order never goes back: prefer likely tokens.
SAMPLING = {"temperature": 0.9, "top_p": 0.95}
CANDIDATES = 4  # one cloud in eight of the demo's model falls apart, all of four hardly ever


class AvatarPipeline:
    """Tokenizer, point model, Gaussian decoder and head model of one vocabulary; `ValueError` names two that disagree."""

    def __init__(
        self,
        tokenizer: GaussianTokenizer,
        point_model: PointillistForCausalLM,
        gaussian_decoder: GaussianDecoder,
        head: HeadModel,
    ):
        check_vocabulary(point_model.config, tokenizer)
        check_head(tokenizer, head, f"the head model {head.name!r}")
        if gaussian_decoder.config.mode == "flame_position":
            raise ValueError(
                "the Gaussian decoder has mode flame_position, which decodes head vertices instead of generated points; "
                "a pipeline needs full, position or ar_feature"
            )
        check_width(gaussian_decoder.config, point_model.config)
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
        head_params: HeadParameters | Sequence[HeadParameters | None] | None = None,
        *,
        camera: Cameras | Sequence[Cameras | None] | None = None,
        references: Sequence[Reference] | Sequence[Sequence[Reference]] = (),
        seed: int | None = None,
        candidates: int = CANDIDATES,
        refine_steps: int = 0,
        **options: Any,
    ) -> GaussianAvatar | list[GaussianAvatar]:
        """The avatar of one subject, or of each subject of a list.

        Args:
            image: the portrait, as the tokenizer takes it (PIL image, array, tensor or file), or a list of portraits.
            head_params: the subject's head parameters, of which shape and static offset are used (None: the mean head), or a list
                of them for a list of portraits. Networks that read the portrait (`read_portrait`) and `refine_steps` also use their
                first frame: the portrait's expression and pose.
            camera: of the portrait (C = 1, image size in proportion to the portrait's), or one for each portrait; used by networks
                that read the portrait and by `refine_steps`. None: `default_camera` is taken, with a warning.
            references: further images of the subject, `Reference(image, head_params, camera)`, as many as there are and in any
                order, for a decoder that reads the portrait: a point takes its pixels from those that show it. For a list of
                portraits, a list of them for each.
            seed: makes the same avatar again; None: torch's generator in its current state.
            candidates: how many clouds are generated for each subject, side by side; the likeliest is decoded.
            refine_steps: steps of rendering the decoded avatar and making it more like the portrait, see `refinement.refine`.
            options: of `PointillistForCausalLM.generate` (max_points, temperature, guidance_scale, ...).

        Returns:
            `GaussianAvatar` in canonical pose with the head model attached: `avatar.posed(motion)` animates it.

        Raises `ValueError` for an image that cannot be read, parameters of another head model, and references that the decoder
        does not read or that lack camera or parameters.
        """
        check_steps(refine_steps)
        many = isinstance(image, (list, tuple))
        images = list(image) if many else [image]
        if head_params is None or isinstance(head_params, HeadParameters):
            head_params = [head_params] * (len(images) if head_params is None else 1)
        if len(head_params) != len(images):
            raise ValueError(f"{len(images)} portraits but head parameters of {len(head_params)} subjects")
        mean = HeadParameters.zeros(self.head.n_shape, self.head.n_expression)
        params = [mean if own is None else own for own in head_params]
        cameras = [camera] * len(images) if camera is None or isinstance(camera, Cameras) else list(camera)
        further = list(references) if many else [references]
        portraits = self.portraits(images, params, cameras, further, needed=refine_steps > 0)
        inputs = self.inputs(images, params, portraits)
        output = self.generate(inputs, seed=seed, candidates=candidates, **options)
        clouds = zip(*self.decode_points(output), inputs["pixel_values"], params, portraits)
        avatars = [self.decode_attributes(*cloud) for cloud in clouds]
        if refine_steps:
            avatars = [refine(avatar, own, refine_steps) for avatar, own in zip(avatars, portraits) if own is not None]
        return avatars if many else avatars[0]

    def inputs(
        self, images: Sequence[Any], params: Sequence[HeadParameters], portraits: Sequence[Portrait | None] = ()
    ) -> dict[str, Tensor]:
        """Inputs of the networks: pixel_values, head_vertices, ... of B portraits and heads.

        `portraits`, as `portraits` makes them, are needed by a point model that reads the portrait.
        """
        for own in params:
            self.head.check(own)
        vertices = torch.stack([self.head.canonical_vertices(own.to(self.device)) for own in params])
        inputs = self.tokenizer(None, list(images), vertices, self.head.faces, return_tensors="pt")
        if self.point_model.config.read_portrait:
            seen = [face_pixels(each, self.head) for each in portraits if each is not None]
            if len(seen) != len(images):
                raise ValueError(
                    f"the point model reads the portrait at the faces, but {len(images)} images came with {len(seen)} portraits; "
                    "give inputs(images, params, portraits) those of portraits(images, params, cameras)"
                )
            inputs["face_pixels"] = torch.stack(seen)
        return {name: value.to(self.device) for name, value in inputs.items()}

    def portraits(
        self,
        images: Sequence[Any],
        params: Sequence[HeadParameters],
        cameras: Sequence[Cameras | None],
        references: Sequence[Any] = (),
        needed: bool = False,
    ) -> list[Portrait | None]:
        """B portraits as `Portrait.of` makes them; None of each if no network reads portraits, unless `needed`.

        `references` is empty, or has those of each portrait.
        """
        if len(cameras) != len(images):
            raise ValueError(f"{len(images)} portraits but {len(cameras)} cameras; give None where one is not known")
        references = references or [()] * len(images)
        if len(references) != len(images):
            raise ValueError(
                f"{len(images)} portraits but references of {len(references)}; give a list for each portrait, [] for none"
            )
        reads, size = self.gaussian_decoder.config.read_portrait, self.tokenizer.image_size
        if any(references) and not reads:
            raise ValueError(
                "references were given, but this Gaussian decoder does not read the portrait (read_portrait is False); "
                "use one trained with --read_portrait true, or give no references"
            )
        if not (needed or reads or self.point_model.config.read_portrait):
            return [None] * len(images)
        every = zip(images, params, cameras, references)
        return [Portrait.of(image, own, camera, self.head, size, more) for image, own, camera, more in every]

    @torch.no_grad()
    def generate(
        self, inputs: Mapping[str, Tensor], *, seed: int | None = None, candidates: int = CANDIDATES, **options: Any
    ) -> PointillistGenerateOutput:
        """Sequences of B subjects, each the likeliest of its candidates, and the hidden states that predicted the points."""
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, found {candidates}")
        condition = self.point_model.select_inputs(inputs)
        prompts = (candidates * len(inputs["pixel_values"]), 1)  # the candidates of a subject share its condition
        if seed is not None:
            torch.manual_seed(seed)
        output = self.point_model.generate(
            torch.full(prompts, self.point_model.config.bos_token_id, device=self.device),
            **condition,
            **SAMPLING | options | {"output_point_features": True, "return_dict_in_generate": True},
        )
        if candidates == 1:
            return output
        faces = {name: condition[name] for name in FACE_INPUTS if name in condition}
        return likeliest(self.point_model, output, candidates, **faces)

    def decode_points(self, output: PointillistGenerateOutput) -> tuple[list[dict], list[Tensor]]:
        """The points of each sequence (positions (N, 3), faces (N,)) and their features (N, 4, D)."""
        points = [self.tokenizer.decode(ids.cpu(), errors="truncate") for ids in output.sequences]
        counts = [len(own["faces"]) for own in points]
        if 0 in counts:
            row = counts.index(0)
            raise ValueError(f"sequence {row} ended before its first point: give min_points, or another seed")
        assert output.point_features is not None
        return points, [features[:count] for features, count in zip(output.point_features, counts)]

    @torch.no_grad()
    def decode_attributes(
        self,
        points: Mapping[str, Any],
        features: Tensor | None,
        pixel_values: Tensor,
        params: HeadParameters,
        portrait: Portrait | None = None,
    ) -> GaussianAvatar:
        """The avatar of one subject: points with their attributes from the decoder, anchored to the head.

        `points` has positions (N, 3) and faces (N,); `features` (N, 4, D); `pixel_values` (3, S, S); `portrait` as of `portraits`.
        """
        config = self.gaussian_decoder.config
        own = params.canonical().to(self.device)
        faces = torch.as_tensor(points["faces"], device=self.device)
        positions = torch.as_tensor(points["positions"], device=self.device)
        inputs = {"positions": positions, "pixel_values": pixel_values}
        if config.reads_point_features and features is not None:
            inputs["point_features"] = features
        if config.read_anchors:
            vertices = self.head.canonical_vertices(own)
            inputs["anchors"] = nearest_on_faces(positions, faces, vertices, self.head.faces)
        if config.read_portrait and portrait is not None:
            inputs |= portrait.inputs(positions, faces, self.head)
        decoded = self.gaussian_decoder(**{name: value[None] for name, value in inputs.items()})
        return GaussianAvatar.from_gaussians(to_gaussians(decoded), config.per_gaussian(faces), own, self.head)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> "AvatarPipeline":
        """Open a folder that `save_pretrained` wrote, or a repository of the Hub with the same content.

        Raises `FileNotFoundError` for a folder or repository that is not there or lacks a component, `ValueError` for components
        that do not belong together.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = _downloaded(str(name))
        index = folder / INDEX_NAME
        if not index.is_file():
            raise FileNotFoundError(f"{name}: has no {INDEX_NAME}; save a pipeline with AvatarPipeline.save_pretrained")
        if (found := read_json(index).get("format")) != FORMAT:
            raise ValueError(f"{index}: format {found!r}, expected {FORMAT!r}")
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
        name for the license of these weights ("apache-2.0", "cc-by-nc-4.0", ...), which depends on their training data.
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
            write_json(new / INDEX_NAME, {"format": FORMAT, "components": list(COMPONENTS)})

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **contents: Any
    ) -> str:
        """Upload what `save_pretrained(folder, **contents)` writes as a model repository; returns its address."""
        with TemporaryDirectory() as temporary:
            self.save_pretrained(Path(temporary) / "pipeline", **contents)
            address = create_repo(repo_id, private=private, exist_ok=True, token=token)
            upload_folder(repo_id=address.repo_id, folder_path=Path(temporary) / "pipeline", token=token)
            return str(address)

    def _card(self, images: Sequence[str], paragraph: str | None, license: str) -> str:
        tags = ["avatar-pointillist", "gaussian-splatting", "3d", "avatars"]
        data = ModelCardData(license=license, library_name=tags[0], tags=tags, pipeline_tag="image-to-3d")
        template = str(Path(__file__).with_name("templates") / "pipeline_card.md.j2")
        parts = dict(points=self.point_model.config, decoder=self.gaussian_decoder.config, head=self.head)
        return f"{ModelCard.from_template(data, template, images=images, paragraph=paragraph, **parts)}\n"


def _downloaded(name: str) -> Path:
    """The snapshot of a Hub repository; from the cache where there is no network."""
    try:
        return Path(snapshot_download(name))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such pipeline, neither as a folder nor in the cache of the Hub; correct the name, or download it "
            f"while online (HF_HUB_OFFLINE=0) ({' '.join(str(error).split())[:200]})"
        ) from None
