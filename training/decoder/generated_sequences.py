"""Sequences that the point model writes for the subjects it was trained on, for training the decoder on what it will meet.

At use the decoder dresses points that the point model wrote, which lie elsewhere than the true ones; a decoder that has seen true
points only takes every one of them at its word. One that has also seen written points, beside the true images of the same
person, learns to move them (exposure bias, Bengio et al. 2015, https://arxiv.org/abs/1506.03099; here of the second network).

Each subject is written once, from its first portrait and its mesh, and kept in a folder: a file is named by all it depends on, so
a resumed run writes nothing again, and another point model nothing wrong. Processes share the work.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tqdm.auto import tqdm

from gaussian_tokenizer.utils.atomic import atomic_file
from modeling import PointillistForCausalLM
from modeling.pipeline import SAMPLING
from modeling.point_features import fingerprint
from training.decoder.subjects import SubjectRows

BATCH = 32  # sequences written together; part of what decides the random numbers
MAX_POINTS_PER_FACE = 15


def generated_sequences(
    point_model: PointillistForCausalLM, subjects: SubjectRows, folder: Path, seed: int, progress: bool = True
) -> list[np.ndarray]:
    """Token ids (L,) int64 of every subject as the point model writes them; all are whole sequences.

    Args:
        point_model: on the device where it is to run.
        subjects: a split with portraits.
        folder: where they are kept; made if it is not there.
        seed: of the sampling.
    """
    state = PartialState()
    longest = int(subjects.rows.lengths[: len(subjects)].max()) // 4
    depends = [fingerprint(point_model), sorted(SAMPLING.items()), longest, seed, len(subjects), BATCH]
    digest = hashlib.sha256(json.dumps([*depends, subjects.rows.ids[: len(subjects)]]).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    batches = [range(begin, min(begin + BATCH, len(subjects))) for begin in range(0, len(subjects), BATCH)]
    paths = [folder / f"{digest}-{number:05d}.safetensors" for number in range(len(batches))]
    own = range(state.process_index, len(batches), state.num_processes)
    for number in tqdm(own, "writing sequences", disable=not (progress and state.is_main_process)):
        if _read(paths[number]) is None:
            ids = _write(point_model, subjects, batches[number], longest, seed + number)
            with atomic_file(paths[number]) as file:
                file.write(save({str(row): sequence for row, sequence in zip(batches[number], ids)}))
    state.wait_for_everyone()
    sequences: dict[int, np.ndarray] = {}
    for path in paths:
        found = _read(path)
        assert found is not None
        sequences |= {int(row): sequence for row, sequence in found.items()}
    return [sequences[row] for row in range(len(subjects))]


@torch.no_grad()
def _write(
    point_model: PointillistForCausalLM, subjects: SubjectRows, rows: range, longest: int, seed: int
) -> list[np.ndarray]:
    items = [subjects.rows.condition(row, None) for row in rows]
    condition = {
        name: torch.from_numpy(np.stack([item[name] for item in items])).to(point_model.device)
        for name in point_model.select_inputs(items[0])
    }
    with torch.random.fork_rng(devices=[] if point_model.device.type == "cpu" else [point_model.device]):
        torch.manual_seed(seed)
        ids = point_model.generate(
            **condition, **SAMPLING, max_points=longest, max_points_per_face=MAX_POINTS_PER_FACE
        ).cpu()
    lengths = (ids < point_model.config.bos_token_id).sum(1)  # one cut by the limit lacks its end, which a sequence may
    return [row[: 1 + 4 * (int(length) // 4)].numpy() for row, length in zip(ids, lengths)]


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        return load(path.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None
