"""Sequences that the point model generates for its training subjects, as training data of the decoder.

At inference the decoder gets generated points. One that was also trained on them, with the true images as targets, learns to
correct their positions (exposure bias, Bengio et al. 2015, https://arxiv.org/abs/1506.03099; here of the second network).
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

BATCH = 32  # sequences generated together; the random numbers depend on it
MAX_POINTS_PER_FACE = 15


def generated_sequences(
    point_model: PointillistForCausalLM, subjects: SubjectRows, folder: Path, seed: int, progress: bool = True
) -> list[np.ndarray]:
    """Token ids (L,) int64 of a whole sequence for every subject, generated from its first portrait and its mesh.

    Processes share the work. The folder, created if missing, keeps the sequences in files named by a hash of everything that
    they depend on, so that a resumed run generates nothing again and another point model never finds them.
    """
    state = PartialState()
    ids = subjects.rows.ids[: len(subjects)]
    max_points = int(subjects.rows.lengths[: len(subjects)].max()) // 4
    depends = [fingerprint(point_model), sorted(SAMPLING.items()), max_points, seed, len(subjects), BATCH, ids]
    digest = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    batches = [range(begin, min(begin + BATCH, len(subjects))) for begin in range(0, len(subjects), BATCH)]
    paths = [folder / f"{digest}-{number:05d}.safetensors" for number in range(len(batches))]
    share = range(state.process_index, len(batches), state.num_processes)
    for number in tqdm(share, "generating sequences", disable=not (progress and state.is_main_process)):
        try:
            load(paths[number].read_bytes())
        except (FileNotFoundError, SafetensorError):  # missing or damaged
            generated = _generate(point_model, subjects, batches[number], max_points, seed + number)
            with atomic_file(paths[number]) as file:
                file.write(save({str(row): sequence for row, sequence in zip(batches[number], generated)}))
    state.wait_for_everyone()
    sequences: dict[str, np.ndarray] = {}
    for path in paths:
        sequences |= load(path.read_bytes())
    return [sequences[str(row)] for row in range(len(subjects))]


@torch.no_grad()
def _generate(
    point_model: PointillistForCausalLM, subjects: SubjectRows, rows: range, max_points: int, seed: int
) -> list[np.ndarray]:
    items = [subjects.rows.condition(row, None) for row in rows]
    device, config = point_model.device, point_model.config
    names = point_model.select_inputs(items[0])
    condition = {name: torch.from_numpy(np.stack([item[name] for item in items])).to(device) for name in names}
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        limits = {"max_points": max_points, "max_points_per_face": MAX_POINTS_PER_FACE}
        ids = point_model.generate(**condition, **SAMPLING, **limits).cpu()
    lengths = (ids < config.bos_token_id).sum(1)  # without eos, which a sequence that reached max_points lacks
    return [row[: 1 + 4 * (int(length) // 4)].numpy() for row, length in zip(ids, lengths)]
