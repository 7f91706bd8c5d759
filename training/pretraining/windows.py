"""Windows of `sliding_window` tokens that begin between two points (truncated training: Meshtron).

A token sequence may be ten times as long as the attention window. Axes: B batch, L tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from training.common.portraits import PortraitAugmentation
from training.common.rows import CONDITION, AvatarRows, shuffled_row


@dataclass(eq=False)
class TrainWindows(Dataset):
    """`num_items` windows; each epoch has every avatar once, in another order.

    Item i depends only on the seed and on i, so a resumed run, or one with another number of workers, sees the same data.
    """

    rows: AvatarRows
    window: int  # tokens in a window, a multiple of 4
    num_items: int
    seed: int  # decides order, cut, image and dropped conditions
    condition_dropout: float  # share of windows without condition, for classifier-free guidance
    grouped: bool = False  # windows of whole points, as the point level reads them
    context_noise: float = 0.0  # share of windows that are read with random x and z, see `disturbed`
    augment_portraits: bool = False

    def __post_init__(self) -> None:
        if self.context_noise and not self.grouped:
            raise ValueError(
                "--context_noise needs --level point: the tokens of a point are spelled from its own x and z"
            )
        if not 0 <= self.context_noise <= 1:
            raise ValueError(f"--context_noise is a share, 0 to 1, found {self.context_noise}")
        if self.augment_portraits and self.rows.frames is None:
            raise ValueError(
                "--augment_portraits needs a model that reads portraits: leave it out, or --use_vision_encoder true"
            )
        if self.window % 4 or self.window < 4:
            raise ValueError(f"window must be a positive multiple of 4 (whole points), found {self.window}")

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, random = shuffled_row(index, len(self.rows), self.seed)
        ids = lead(self.rows.sequence(row), self.rows.tokenizer.pad_token_id if self.grouped else None)
        start = window_start(len(ids), self.window, random)
        ids = ids[start : start + self.window]
        dropped = random.random() < self.condition_dropout
        chosen, image = None, None
        if self.augment_portraits:
            chosen = self.rows.portrait_row(row, random)
            image = PortraitAugmentation(self.seed, index, self.rows.any_image)(self.rows.image(chosen))
        condition = self.rows.condition(row, random, chosen, image)
        read = ids
        if self.context_noise and random.random() < self.context_noise:
            read = disturbed(ids, self.rows.tokenizer.n_bins, random)
        return {"input_ids": read, "labels": ids, "drop_condition": dropped, **condition}


def lead(ids: np.ndarray, pad_token_id: int | None) -> np.ndarray:
    """Ids (L,) with three tokens of padding before bos, or as they are without `pad_token_id`.

    Every fourth token then ends a group, bos or a face, as `modeling_points.group_tokens` has them.
    """
    return ids if pad_token_id is None else np.concatenate((np.full(3, pad_token_id), ids))


def disturbed(ids: np.ndarray, n_bins: int, random: np.random.Generator) -> np.ndarray:
    """Whole points (L,), perhaps with an end behind, with random x and z in a share of them, itself random from 0 to 1.

    Neighbors tell almost all about the next point, so a model that can rely on them learns nothing from the portrait, and when it
    generates, what the first points say of hair and beard is what the whole cloud says.
    """
    read = ids.copy()
    groups = read[: len(ids) // 4 * 4].reshape(-1, 4)
    chosen = (groups[:, 0] < n_bins) & (random.random(len(groups)) < random.random())
    groups[chosen, 0], groups[chosen, 2] = random.integers(n_bins, size=(2, int(chosen.sum())))
    return read


def window_start(length: int, window: int, random: np.random.Generator) -> int:
    """A random start between two points; a window that would extend beyond the sequence is moved inside.

    Both ends of a sequence are then seen as often as its middle, and the tokens next to them up to three times as often.
    """
    last = max(0, -(-(length - window) // 4) * 4)
    start = 4 * int(random.integers(-(window // 4) + 1, -(-length // 4)))
    return min(max(start, 0), last)


class EvaluationWindows(Dataset):
    """Windows that together predict each token once, of all avatars or the first `max_avatars`.

    A window after the first starts half a window earlier, as context, and counts only its newer half (labels are -100 elsewhere).
    """

    def __init__(self, rows: AvatarRows, window: int, max_avatars: int | None = None, grouped: bool = False):
        self.rows, self.window, self.grouped = rows, window, grouped
        self.items: list[tuple[int, int, int]] = []  # row, start, known tokens
        for row, length in enumerate(rows.lengths[:max_avatars] + 3 * grouped):
            self.items.append((row, 0, 0))
            counted = window
            while counted < length:
                start = max(counted - window // 2 - (counted - window // 2) % 4, counted - window + 4)
                self.items.append((row, start, counted - start))
                counted = start + window

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, start, known = self.items[index]
        ids = lead(self.rows.sequence(row), self.rows.tokenizer.pad_token_id if self.grouped else None)
        ids = ids[start : start + self.window]
        labels = ids.copy()
        labels[:known] = -100
        return {"input_ids": ids, "labels": labels, "drop_condition": False, **self.rows.condition(row, None)}


def collate_windows(
    items: list[Mapping[str, Any]], pad_token_id: int, grouped: bool = False
) -> dict[str, torch.Tensor]:
    """Stack windows (B, L). They are padded on the right, where no real token attends to padding, so there is no mask.

    `grouped` windows (see `TrainWindows`) are padded to whole groups.
    """
    input_ids, labels = (
        pad_sequence([torch.from_numpy(item[name]) for item in items], batch_first=True, padding_value=padding)
        for name, padding in (("input_ids", pad_token_id), ("labels", -100))
    )
    if grouped:
        room = (0, -input_ids.shape[1] % 4)
        input_ids, labels = F.pad(input_ids, room, value=pad_token_id), F.pad(labels, room, value=-100)
    labels[:, : 4 if grouped else 1] = -100  # nothing predicts the first token or group
    dropped = torch.tensor([item["drop_condition"] for item in items])
    batch = {"input_ids": input_ids, "labels": labels, "drop_condition": dropped}
    for name in CONDITION:
        if name in items[0]:
            batch[name] = torch.from_numpy(np.stack([item[name] for item in items]))
    return batch
