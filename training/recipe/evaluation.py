"""A pipeline on held-out subjects: avatars from portrait and head mesh, compared with the true ones and drawn."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.corpus.corpus import Corpus
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.point_plots import draw_comparison
from gaussian_tokenizer.rendering.portrait_points import Portrait
from modeling import AvatarPipeline
from modeling.point_features import point_features
from training.decoder.subjects import (
    SubjectRows,
    collate_subjects,
    laid_on,
    mean_image_metrics,
    mean_images,
    portrait_of,
)
from training.recipe.report import (
    compare_points,
    draw_avatars,
    draw_motion,
    image_metrics,
    judge,
    nll_of_another,
    true_frames,
)

SHOWN = 8  # subjects in the images


def generate(pipeline: AvatarPipeline, corpus: Corpus, count: int, seed: int, output: Path) -> dict[str, Any]:
    """Avatars of the first `count` held-out subjects, compared with the true ones and drawn; entries of the report."""
    reads = pipeline.gaussian_decoder.config.read_portrait or pipeline.point_model.config.read_portrait
    subjects = SubjectRows(corpus, "validation", pipeline.point_model.input_names, None, reads, pipeline.head)
    rows = range(min(count, len(subjects)))
    items = [subjects.subject(row, None) for row in rows]
    for item in items if reads else ():
        item["portrait"] = laid_on(item["portrait"], np.ones((1, 3), np.float32))
    params = [shape_parameters(pipeline, item["shape"]) for item in items]
    read = [portrait_of(collate_subjects([item], 0), 0) if reads else None for item in items]
    portraits = [subjects.frames[subjects.frame_rows(row)[0]]["image"] for row in rows]
    max_points = 2 * (int(subjects.rows.lengths.max()) // 4)
    torch.set_num_threads(1)  # one thread multiplies matrices this small faster than two
    begin = time.perf_counter()
    inputs = pipeline.inputs(portraits, params, read)
    generated = pipeline.generate(inputs, seed=seed, max_points=max_points, max_points_per_face=15, progress=True)
    tokens = int((generated.sequences < pipeline.tokenizer.bos_token_id).sum())
    print(f"{tokens:,} tokens in {time.perf_counter() - begin:.1f} s", flush=True)

    truth = [pipeline.tokenizer.decode(subjects.rows.sequence(row)) for row in range(len(subjects))]
    means = mean_images(SubjectRows(corpus, "train"))
    results, clouds, avatars = [], [], []
    for row, features in zip(rows, pipeline.decode_points(generated)[1]):
        avatar_id = subjects.rows.ids[row]
        points, invalid = judge(pipeline.tokenizer, generated.sequences[row].numpy())
        avatar = pipeline.decode_attributes(points, features, inputs["pixel_values"][row], params[row], read[row])
        avatar.save(output / "generated" / avatar_id)
        frames = true_frames(subjects, row)
        mean_psnr, mean_ssim = mean_image_metrics(means, subjects, list(subjects.frame_rows(row)))
        limit = reencoded(pipeline, subjects, row, inputs, params[row], read[row])  # what perfect points would give
        images = {"heldout": image_metrics(avatar, frames), "reencoded": image_metrics(limit, frames)}
        images["mean_image"] = (float(mean_psnr.mean()), float(mean_ssim.mean()))
        results.append(
            {"avatar_id": avatar_id, **compare_points(points, invalid, truth, row)}
            | {f"{metric}_{name}": images[name][i] for i, metric in enumerate(("psnr", "ssim")) for name in images}
        )
        clouds.append((avatar_id, portraits[row], {"true": truth[row]["positions"], "generated": points["positions"]}))
        avatars.append((avatar_id, portraits[row], avatar))
    (output / "images").mkdir(parents=True, exist_ok=True)
    draw_comparison(output / "images" / "generated.png", clouds[:SHOWN])
    draw_avatars(output / "images" / "avatars.png", avatars[:SHOWN])
    draw_motion(output / "images" / "motion.gif", avatars)
    portraits[0].save(output / "portrait.png")  # for the examples of the README

    averages = {key: float(np.mean([result[key] for result in results])) for key in results[0] if key != "avatar_id"}
    return {
        "generated": results,
        "mean_chamfer_own": averages["chamfer_own"],
        "mean_chamfer_others": averages["chamfer_others"],
        "closest_is_own": averages["closest_is_own"],
        "heldout_nll_other_condition": nll_of_another(pipeline.point_model, subjects.rows),
        **{key: value for key, value in averages.items() if key.startswith(("psnr_", "ssim_"))},
    }


def shape_parameters(pipeline: AvatarPipeline, shape: np.ndarray) -> HeadParameters:
    """The head parameters that a tracker would find for a portrait: here the true shape."""
    zeros = HeadParameters.zeros(pipeline.head.n_shape, pipeline.head.n_expression)
    zeros.shape.copy_(torch.from_numpy(shape))
    return zeros


def reencoded(
    pipeline: AvatarPipeline,
    subjects: SubjectRows,
    row: int,
    inputs: dict[str, Tensor],
    params: HeadParameters,
    read: Portrait | None = None,
) -> GaussianAvatar:
    """The avatar that the decoder makes of a subject's true points."""
    ids = torch.from_numpy(subjects.rows.sequence(row))[None]
    condition = pipeline.point_model.select_inputs({name: value[row : row + 1] for name, value in inputs.items()})
    features = point_features(pipeline.point_model, ids, **condition)[0]
    points, pixels = pipeline.tokenizer.decode(ids[0]), inputs["pixel_values"][row]
    return pipeline.decode_attributes(points, features, pixels, params, read)
