"""GaussianTokenizer: face-anchored points to token ids and back, and the conditions of the model beside them.

`PointCodec` has the arithmetic of points and ids; here are batches, padding and the settings as a transformers processor.
Travels with checkpoints. Axis letters: B batch, N points, L tokens (4N + 2), V vertices, F faces, S image size.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from .point_codec import DEFAULT_BOUNDS, PointCodec, as_array, one_of, positive_integer
from .processing_conditions import face_condition, head_condition, pixel_values

MAX_IMAGE_SIZE = 2**14  # 3 GB per image


class GaussianTokenizer(PointCodec, ProcessorMixin):
    """Tokenizes clouds of face-anchored points; loads through `AutoProcessor`.

    Args:
        n_bins: levels per axis.
        n_faces: faces F of the head model the points are anchored to.
        bounds: `[[lo x, y, z], [hi x, y, z]]` in meters; see `fit`.
        axis_order: the axes in sorting order, most significant first.
        max_points: longest cloud that is accepted; None for no limit.
        padding_side: "right" or "left", for batches.
        image_size: side of `pixel_values` in pixels.
        head_name, head_hash: the head model's name and hash. An avatar with another hash is refused.
        token_order: the order of a point's tokens x, y, z and face (f). Points are sorted by `axis_order` whatever it is.
    """

    # The signature is positional because transformers reads the loadable arguments from `co_argcount`.
    def __init__(
        self,
        n_bins: int = 1024,
        n_faces: int = 10144,
        bounds: Sequence[Sequence[float]] = DEFAULT_BOUNDS,
        axis_order: str = "yzx",
        max_points: int | None = None,
        padding_side: str = "right",
        image_size: int = 224,
        head_name: str | None = None,
        head_hash: str | None = None,
        token_order: str = "xyzf",
        **kwargs: Any,
    ) -> None:
        ProcessorMixin.__init__(self, **kwargs)
        PointCodec.__init__(self, n_bins, n_faces, bounds, axis_order, max_points, head_name, head_hash, token_order)
        self.padding_side = one_of("padding_side", padding_side, ("right", "left"))
        self.image_size = positive_integer("image_size", image_size)
        if self.image_size > MAX_IMAGE_SIZE:
            raise ValueError(f"image_size is {image_size}; expected at most {MAX_IMAGE_SIZE} pixels")

    @property
    def model_input_names(self) -> list[str]:
        head = ["head_vertices", "head_normals", "face_centers", "face_normals"]
        return ["input_ids", "attention_mask", "pixel_values", *head]

    def face_condition(self, head_vertices: Any, head_faces: Any) -> dict[str, np.ndarray]:
        """Centers, in bins of this tokenizer, and unit normals (B, F, 3) of the faces (F, 3) of meshes (B, V, 3) in meters."""
        return face_condition(
            np.asarray(head_vertices), as_array(head_faces, "head_faces"), np.array(self.bounds), self.n_bins
        )

    def __call__(
        self,
        points: Any = None,
        images: Any = None,
        head_vertices: Any = None,
        head_faces: Any = None,
        return_tensors: str | None = None,
        return_order: bool = False,
        on_out_of_bounds: str = "warn",
        padding_side: str | None = None,
    ) -> BatchFeature:
        """Encode points, images and head meshes, each one item or a list of B of them.

        Args:
            points: avatars (asked for `head_hash` and `canonical_points()`) or mappings with `positions` (N, 3) meters
                and `faces` (N,) integers.
            images: PIL images, arrays or tensors (H, W), (H, W, C) or (C, H, W), or image files; see `pixel_values`.
            head_vertices: (V, 3) or (B, V, 3) meters; `head_faces` (F, 3) then gives `head_normals`, `face_centers` and
                `face_normals`.
            return_tensors: None, "pt" or "np". None: `input_ids` is one array (L,) of the smallest of uint16 and uint32
                that holds the vocabulary, or a list of them. "pt", "np": int64 (B, L), padded.
            return_order: add `order`, for each cloud the (N,) indices of its points in sorted order: `colors[order]`.
            on_out_of_bounds: "warn", "raise" or "ignore"; what is outside is clamped to the border bin.

        Returns:
            `input_ids` and `attention_mask`; `pixel_values` (B, 3, S, S), `head_vertices` and `head_normals` (B, V, 3),
            `face_centers` (bins) and `face_normals` (B, F, 3) float32; and, with `return_tensors` None only, `num_out_of_bounds`.
        """
        one_of("on_out_of_bounds", on_out_of_bounds, ("warn", "raise", "ignore"))
        one_of("return_tensors", return_tensors, (None, "pt", "np"))
        if head_faces is not None and head_vertices is None:
            raise ValueError("head_faces were given without head_vertices")
        if points is None and images is None and head_vertices is None:
            raise ValueError("nothing to encode: give points (or an avatar), images or head_vertices")
        data: dict[str, Any] = {}
        if points is not None:
            side = one_of("padding_side", padding_side or self.padding_side, ("right", "left"))
            data.update(self._encode(points, return_tensors, return_order, on_out_of_bounds, side))
        if images is not None:
            data["pixel_values"] = pixel_values(images, self.image_size)
        if head_vertices is not None:
            data.update(head_condition(head_vertices, head_faces, self.n_faces))
            if head_faces is not None:
                data.update(self.face_condition(data["head_vertices"], head_faces))
        sizes = {name: len(data[name]) for name in data if name in ("pixel_values", "head_vertices")}
        if points is not None:
            sizes["points"] = len(points) if isinstance(points, (list, tuple)) else 1
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the batch sizes disagree: {sizes}; give one image and one head for each cloud")
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["order"])

    def _encode(
        self, points: Any, return_tensors: str | None, return_order: bool, on_out_of_bounds: str, padding_side: str
    ) -> dict[str, Any]:
        batched = isinstance(points, (list, tuple))
        clouds = [self.encode(item, return_order, index) for index, item in enumerate(points if batched else [points])]
        if not clouds:
            raise ValueError("an empty list of points; expected at least one cloud")
        sequences, counts = [cloud.ids for cloud in clouds], [cloud.num_out_of_bounds for cloud in clouds]
        if sum(counts) and on_out_of_bounds != "ignore":
            worst = max(cloud.overshoot for cloud in clouds)
            message = f"{sum(counts)} points lie outside the bounds {self.bounds}, by up to {worst:.4g} m"
            message += "; fit the bounds to the data with tokenizer.fit(avatars)"
            if on_out_of_bounds == "raise":
                raise ValueError(message)
            warnings.warn(message + ". They are clamped to the border", stacklevel=3)
        data: dict[str, Any] = {}
        if return_tensors is None:
            masks = [np.ones(len(ids), dtype=np.uint8) for ids in sequences]
            data = {"input_ids": sequences, "attention_mask": masks, "num_out_of_bounds": counts}
            data = data if batched else {name: values[0] for name, values in data.items()}
        else:
            width = max(len(ids) for ids in sequences)
            data["input_ids"] = np.full((len(sequences), width), self.pad_token_id, dtype=np.int64)
            data["attention_mask"] = np.zeros((len(sequences), width), dtype=np.int64)
            for row, ids in enumerate(sequences):
                columns = slice(0, len(ids)) if padding_side == "right" else slice(width - len(ids), width)
                data["input_ids"][row, columns] = ids
                data["attention_mask"][row, columns] = 1
        if return_order:
            data["order"] = [cloud.order for cloud in clouds] if batched else clouds[0].order
        return data

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        settings["vocab_size"] = self.vocab_size  # read back as a check
        if "auto_map" in settings:
            # transformers writes a (slow, fast) pair for every class with "Tokenizer" in its name, which AutoProcessor
            # cannot read back.
            name = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            settings["auto_map"] = {"AutoProcessor": name}
        return settings

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the settings so that a crash leaves the old file or the new one."""
        path = Path(json_file_path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(self.to_json_string())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the settings. A file must state them: a default bound or bin count would silently move every point."""
        where = f"processor_config.json of {pretrained_model_name_or_path}"
        try:
            settings, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, RecursionError, UnicodeDecodeError, OSError) as error:
            # transformers takes any JSON for an object, and raises OSError for invalid JSON as for missing files.
            if isinstance(error, OSError) and not isinstance(error.__context__, json.JSONDecodeError):
                raise
            raise ValueError(f"{where} is not a JSON object: {error}; restore the file it was saved as") from None
        if missing := {"n_bins", "n_faces", "bounds", "axis_order"} - settings.keys():
            raise ValueError(f"{where} is absent or lacks {sorted(missing)}; write it with save_pretrained")
        made_of = {name: positive_integer(name, settings[name]) for name in ("n_bins", "n_faces")}
        expected = sum(made_of.values()) + 3
        if (found := settings.setdefault("vocab_size", expected)) != expected:
            found = f"vocab_size is {found}, expected {expected} of {made_of}"
            raise ValueError(f"{where} contradicts itself: {found}; restore the file it was saved as")
        return settings, kwargs


GaussianTokenizer.register_for_auto_class()  # save_pretrained puts this file beside the settings
