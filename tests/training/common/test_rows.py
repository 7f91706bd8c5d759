"""Conditions of training are those that a pipeline makes of the same subject's files."""

import numpy as np
import pytest
import torch
from PIL import Image

from gaussian_tokenizer.captures.loading import load_tracking
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.rendering.portrait_points import Portrait, face_pixels
from modeling import PointillistConfig, PointillistForCausalLM
from training.common.rows import CONDITION, AvatarRows
from training.pretraining.windows import TrainWindows, collate_windows

HEAD = build_procedural_head(600)


def of_files(tracking, frame) -> tuple[Image.Image, torch.Tensor]:
    """The image of a frame, and what the faces read of it."""
    image = Image.fromarray((255 * tracking.image(frame)).round().to(torch.uint8).numpy())
    params = tracking.params.frame(tracking.timesteps.index(tracking.frames[frame].timestep))
    camera = tracking.cameras([frame]).to(torch.float32)
    return image, face_pixels(Portrait.of(image, params, camera, HEAD, 56), HEAD)


def test_faces_read_the_same_in_training_and_from_the_subjects_files(corpus, tiny_corpus):
    rows = AvatarRows(corpus, "train", CONDITION)
    frames = corpus.frames("train").select_columns(["camera", "timestep"])
    for row in (0, 5):
        tracking = load_tracking(tiny_corpus.parent / "avatars" / rows.ids[row], HEAD)
        for chosen in rows.frame_rows[rows.ids[row]]:
            one = frames[chosen]
            (frame,) = [
                i
                for i, each in enumerate(tracking.frames)
                if (each.camera, each.timestep) == (one["camera"], one["timestep"])
            ]
            image, expected = of_files(tracking, frame)
            found = rows.condition(row, None, chosen)
            np.testing.assert_allclose(found["face_pixels"], expected, atol=1e-4)
            np.testing.assert_array_equal(found["pixel_values"], corpus.tokenizer(images=image)["pixel_values"][0])
            assert (expected[:, 36] == 1).sum() > 50  # faces that are seen
        other = rows.condition(row, None, chosen, Image.new("RGBA", image.size, "red"))
        red, green, blue, alpha = other["face_pixels"][:, :4].T
        assert np.allclose(red, alpha, atol=1e-6) and not green.any() and not blue.any() and (alpha > 0.99).sum() > 50


def test_faces_read_portraits_of_a_model_without_a_portrait_encoder(corpus):
    config = PointillistConfig(
        n_bins=64, n_faces=HEAD.n_faces, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        head_dim=16, sliding_window=16, level="point", mesh_aware_faces=True, read_portrait=True, use_vision_encoder=False,
        use_point_encoder=False,
    )  # fmt: skip
    model = PointillistForCausalLM(config)
    rows = AvatarRows(corpus, "train", model.input_names)
    windows = TrainWindows(rows, 64, 4, seed=0, condition_dropout=0.0, grouped=True, augment_portraits=True)
    batch = collate_windows([windows[0], windows[1]], config.pad_token_id, grouped=True)
    assert "pixel_values" not in batch and batch["face_pixels"].shape == (2, HEAD.n_faces, 74)
    batch = {name: value for name, value in batch.items() if not name.startswith("head_")}
    assert model(**batch).loss.isfinite()


def test_a_head_model_that_is_not_the_corpus_own_is_refused(corpus):
    with pytest.raises(ValueError, match="procedural:600"):
        AvatarRows(corpus, "train", CONDITION, build_procedural_head(2000))
