"""Point features: the point model's hidden states over whole sequences, for training the Gaussian decoder, and a cache for them.

Axes: B batch, L tokens, N points, D width, W window.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from gaussian_tokenizer.utils.atomic import atomic_file

from .pointillist.configuration_pointillist import FACE_INPUTS
from .pointillist.modeling_pointillist import PointillistForCausalLM
from .pointillist.modeling_points import PointEmbedding, SlotHeads, group_tokens

logger = logging.getLogger(__name__)

CHUNK = 2048  # tokens a pass: its mask has CHUNK * (W + CHUNK) entries a row


@torch.no_grad()
def point_features(
    model: PointillistForCausalLM,
    input_ids: Tensor,
    *,
    pixel_values: Tensor | None = None,
    head_vertices: Tensor | None = None,
    head_normals: Tensor | None = None,
    face_centers: Tensor | None = None,
    face_normals: Tensor | None = None,
    face_pixels: Tensor | None = None,
    condition_embeds: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Last hidden states that *predict* the tokens of each point, by teacher forcing, in evaluation mode.

    They equal those of `generate(..., output_point_features=True)` on the same ids, because attention is limited to the window.

    Args:
        input_ids: (B, L) whole sequences, bos first, then four tokens a point, then eos (which may be missing), then padding.
        pixel_values, head_vertices, head_normals, face_centers, face_normals, face_pixels, condition_embeds: the condition, see
            `PointillistForCausalLM.forward`.
        chunk: tokens a pass, default 2,048. The result does not depend on it.

    Returns:
        (B, N, 4, D) in the precision of the model, N points of the longest row, slots x, y, z, face whatever `token_order` is;
        zero beyond a row's end.

    Raises `ValueError` if a row is not a sequence, or `chunk` is not positive.
    """
    counts = num_points(input_ids, model)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, found {chunk}")
    input_ids = input_ids.to(model.device)
    length = 4 * int(counts.max())  # the last token predicts the end, which belongs to no point
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if condition_embeds is None:
            condition_embeds = model.encode_condition(pixel_values, head_vertices, head_normals)
        condition = model.condition_encoder.or_empty(condition_embeds, len(input_ids), None)
        faces = dict(zip(FACE_INPUTS, (face_centers, face_normals, face_pixels)))
        pieces = list(_pieces(model, input_ids[:, : length + 1], chunk, condition, faces))
    finally:
        for module, training in modes:
            module.training = training
    if not pieces:
        return condition.new_zeros(len(input_ids), 0, 4, model.config.hidden_size)
    features = torch.cat(pieces, dim=1).unflatten(1, (-1, 4))[:, :, model.config.slot_columns]
    real = torch.arange(features.shape[1], device=features.device) < counts.to(features.device)[:, None]
    return features.masked_fill(~real[..., None, None], 0)


def _pieces(
    model: PointillistForCausalLM, ids: Tensor, chunk: int, condition: Tensor, face_inputs: dict[str, Tensor | None]
) -> Iterator[Tensor]:
    """What predicts the tokens of sequences (B, 1 + L), bos first, as pieces (B, `chunk`, D) of it."""
    # Padding is on the right, where no token of a sequence attends: it needs no mask.
    options: dict[str, Any] = {"condition": condition, "use_cache": True}
    options["cache"] = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    if model.config.level == "token":
        for begin in range(0, ids.shape[1] - 1, chunk):
            yield model.model(ids[:, begin : min(begin + chunk, ids.shape[1] - 1)], **options).last_hidden_state
        return
    embed, heads = model.model.embed_tokens, model.lm_head
    assert isinstance(embed, PointEmbedding) and isinstance(heads, SlotHeads)
    faces = embed.faces(**face_inputs)
    groups = group_tokens(ids, model.config.first_special + 2)
    for begin in range(0, groups.shape[1] - 1, -(-chunk // 4)):
        following = groups[:, begin + 1 : begin + 1 - (-chunk // 4)]
        read = groups[:, begin : begin + following.shape[1]]
        hidden = model.model(inputs_embeds=embed(read, faces), **options).last_hidden_state
        yield heads.states(hidden, heads.targets(following, read), faces).flatten(1, 2)


class FeatureCache:
    """Features of one point model in a folder, a file for each sequence under each condition.

    A file's name is a hash of the model's weights and configuration, the ids and the condition: another checkpoint or another
    portrait never finds it. Values are rounded to `dtype` when computed as well as when read, so every epoch sees the same. A
    damaged file is computed again; files appear whole or not at all, so processes may share the folder.

    Args:
        folder: where the files are; created if missing. A point takes 8 D bytes: 30,000 points of the paper 246 MB.
        model: the point model, frozen: its weights are hashed here, once. Make another cache after they have changed.
        dtype: float16 (default) or bfloat16.
    """

    def __init__(self, folder: str | os.PathLike, model: PointillistForCausalLM, dtype: torch.dtype = torch.float16):
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, found {dtype}")
        self.folder, self.model, self.dtype = Path(folder), model, dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fingerprint = fingerprint(model)

    def features(self, model: PointillistForCausalLM, input_ids: Tensor, **condition: Tensor | None) -> Tensor:
        """`point_features(model, input_ids, **condition)` for a batch, each row from its file if there is one.

        Raises `ValueError` for a model other than the cache's, what `point_features` refuses, or a feature too large for `dtype`.
        """
        if model is not self.model:
            raise ValueError("this cache holds features of another model: make a FeatureCache for this one")
        given = {name: value for name, value in condition.items() if value is not None}
        for name, value in given.items():
            if len(value) != len(input_ids):
                raise ValueError(f"{name} for {len(value)} sequences, but {len(input_ids)} sequences of tokens")
        rows = []
        for row, count in enumerate(num_points(input_ids, model).tolist()):
            sequence = input_ids[row : row + 1, : 1 + 4 * count]  # the padding of the batch must not matter
            own: dict[str, Any] = {name: value[row : row + 1] for name, value in given.items()}
            rows.append(self.get(sequence, own, partial(point_features, model, sequence, **own)))
        return pad_sequence(rows, batch_first=True).to(model.device, model.dtype)

    def get(self, sequence: Tensor, condition: dict[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """Features (N, 4, D) of one sequence (1, L), in `dtype` on the CPU: read, or computed by `compute()` and written."""
        digest = hashlib.sha256(f"{self.fingerprint} {self.dtype}".encode())
        inputs = {"input_ids": sequence.long(), **condition}
        _hash_tensors(digest, {name: value[0] for name, value in inputs.items()})
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        stored = _read(path)
        if stored is not None:
            return stored
        computed = compute()[0]
        features = computed.detach().to("cpu", self.dtype).contiguous()
        if not torch.isfinite(features).all():
            raise ValueError(
                f"features up to {computed.abs().max().item():.3g} do not fit {self.dtype}: "
                "use dtype=torch.bfloat16, or look for NaN in the model"
            )
        data = save({"features": features}, metadata={"crc32": _checksum(features)})
        with atomic_file(path) as file:
            file.write(data)
        return features


def fingerprint(model: PointillistForCausalLM) -> str:
    """Hexadecimal hash of a model's weights and of the configuration that its computation depends on."""
    digest = hashlib.sha256(json.dumps(_lasting(model.config.to_dict()), sort_keys=True).encode())
    _hash_tensors(digest, model.state_dict())
    return digest.hexdigest()


def _lasting(config: dict) -> dict:
    """A configuration without what saving and loading add to it."""
    passing = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"}
    kept = {name: value for name, value in config.items() if name not in passing}
    return {name: _lasting(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _hash_tensors(digest, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(_bytes(tensor)):08x}"


def _read(path: Path) -> Tensor | None:
    """The features of a file, or None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            features = file.get_tensor("features")
            if (file.metadata() or {}).get("crc32") == _checksum(features):
                return features
            error: Exception | str = "its checksum does not match"
    except (SafetensorError, OSError) as failure:
        error = failure
    logger.warning("%s is damaged and will be computed again: %s", path, error)
    return None


def num_points(input_ids: Tensor, model: PointillistForCausalLM) -> Tensor:
    """Points (B,) in each sequence of (B, L); `ValueError` that names the row if it is not bos, points, eos, padding."""
    bos = model.config.first_special
    eos, pad = bos + 1, bos + 2
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids must be (B, L) sequences, found {tuple(input_ids.shape)}")
    lengths = (input_ids < bos).sum(1)
    for row, (ids, length) in enumerate(zip(input_ids, lengths.tolist())):
        points, end = ids[1 : 1 + length], ids[1 + length :]
        ended = len(end) == 0 or end[0] in (eos, pad)
        if ids[0] != bos or length % 4 or (points >= bos).any() or not ended or (end[1:] != pad).any():
            shown = ids.tolist() if len(ids) <= 12 else [*ids[:6].tolist(), "...", *ids[-6:].tolist()]
            raise ValueError(
                f"row {row} of input_ids is not a whole sequence (bos {bos}, four tokens a point, eos {eos}, padding {pad} on the "
                f"right): {length} tokens of points in {shown}"
            )
    return lengths // 4
