"""The rows of the table: what they have access to, and that rendering again gives the same bytes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench import repainted, same_avatar
from PIL import Image

from eval.reenactment.clips import open_dataset
from eval.reenactment.methods import (
    compared,
    copy_source,
    flame_position_maker,
    make_avatars,
    mean_image,
    ours_maker,
    render_pair,
    rendered,
    truth,
    vertex_avatar,
)
from eval.reenactment.protocol import frame_name, make_pairs
from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.rendering.splatting import render
from modeling import AvatarPipeline, GaussianDecoder, GaussianDecoderConfig

LIMITS = dict(max_points=12, max_points_per_face=15)


@pytest.fixture(scope="module")
def pairs(clips):
    return make_pairs(clips, "both", 0)


@pytest.fixture(scope="module")
def ours(bench_pipeline, clips, tmp_path_factory):
    """Folder with the avatars of all clips, and their generation stats."""
    output = tmp_path_factory.mktemp("ours")
    return output, make_avatars("ours", ours_maker(bench_pipeline, 3, **LIMITS), clips, output, 2)


def test_the_truth_is_what_the_clip_shows_and_exists_in_self_reenactment_only(pairs):
    assert np.array_equal(truth().frames(pairs[0]), pairs[0].driver.images([1, 2, 3]))
    assert list(truth().absent) == ["cross"]


def test_copy_source_shows_the_portrait_for_every_frame(pairs):
    frames = copy_source().frames(pairs[-1])
    assert len(frames) == 3 and all(np.array_equal(frame, pairs[-1].source.image(0)) for frame in frames)


def test_the_mean_image_is_made_of_subjects_that_are_neither_source_nor_driver(clips):
    own, cross = make_pairs(clips, "self", 0)[0], make_pairs(clips, "cross", 0)[0]
    others = [clip.image(0).astype(float) for clip in clips[1:]]
    assert np.abs(mean_image(clips).frames(own)[0] - sum(others) / 2).max() <= 0.51
    third = next(clip for clip in clips if clip not in (cross.source, cross.driver))
    assert np.array_equal(mean_image(clips).frames(cross)[2], third.image(0))

    black = [repainted(clips[0], 0), *clips[1:]]  # other images of the judged subject change nothing
    changed = make_pairs(black, "self", 0)[0]
    assert np.array_equal(mean_image(black).frames(changed), mean_image(clips).frames(own))
    assert list(mean_image(clips[:2]).absent) == ["cross"] and list(mean_image(clips[:1]).absent) == ["self", "cross"]


def test_an_avatar_made_alone_is_the_one_that_the_pipeline_makes(bench_pipeline, clips, tmp_path):
    make_avatars("ours", ours_maker(bench_pipeline, 3, **LIMITS), clips[:1], tmp_path, 1)
    kept = GaussianAvatar.load(tmp_path / "avatars" / "ours" / clips[0].subject_id, head=bench_pipeline.head)
    direct = bench_pipeline(clips[0].read(0), clips[0].params.frame(0), seed=3, **LIMITS)
    assert same_avatar(kept, direct)


@pytest.mark.parametrize("mode", ["full", "flame_position"])
def test_reference_frames_are_read_for_the_avatar_and_nothing_else_of_the_clip(
    bench_pipeline, subjects, bench_head, mode
):
    torch.manual_seed(0)
    config = bench_pipeline.gaussian_decoder.config.to_dict() | {"read_portrait": True, "mode": mode}
    decoder = GaussianDecoder(GaussianDecoderConfig.from_dict(config)).eval()
    if mode == "full":
        parts = bench_pipeline.tokenizer, bench_pipeline.point_model, decoder, bench_head
        make = ours_maker(AvatarPipeline(*parts), 3, **LIMITS)
    else:
        make = flame_position_maker(bench_pipeline, decoder)
    (clip,) = open_dataset(subjects, bench_head, num_subjects=1, num_references=3)

    def avatar(black: tuple[int, ...] = ()) -> GaussianAvatar:
        read = lambda row: Image.new("RGBA", (32, 32), "black") if row in black else clip.read(row)  # noqa: E731
        return make([replace(clip, read=read)])[0][0]

    base = avatar()
    assert same_avatar(base, avatar(black=(3, 4, 5, 6, 7))) and not same_avatar(base, avatar(black=(2,)))
    assert not same_avatar(base, make([replace(clip, num_references=1)])[0][0])


def test_tokens_and_points_of_an_avatar_are_recorded(ours, clips, bench_pipeline):
    output, stats = ours
    for clip, each in zip(clips, stats):
        avatar = GaussianAvatar.load(output / "avatars" / "ours" / clip.subject_id)
        assert each["gaussians"] == len(avatar) == each["tokens"] // 4 and each["seconds"] > 0
    assert [each["batch"] for each in stats] == [2, 2, 1]


def test_existing_avatars_are_not_made_again(ours, clips):
    output, stats = ours

    def refuse(_):
        raise AssertionError("made again")

    assert make_avatars("ours", refuse, clips, output, 2) == stats


def test_a_rendered_frame_is_the_avatar_with_the_drivers_motion_and_camera_on_its_own_shape(
    ours, pairs, bench_pipeline, tmp_path
):
    pair = pairs[-1]
    avatar = GaussianAvatar.load(ours[0] / "avatars" / "ours" / pair.source.subject_id, head=bench_pipeline.head)
    render_pair(avatar, pair, tmp_path / "frames", tmp_path / "alphas")
    on_own_shape = replace(pair.driver.params.frame(2), shape=pair.source.params.shape)
    drawn = render(avatar.posed(on_own_shape), pair.driver.cameras[2].to(torch.float32))
    image, alpha = drawn.image[0], drawn.alpha[0, ..., 0]
    read = np.asarray(Image.open(pair.path(tmp_path / "frames") / frame_name(2)))
    assert np.abs(read - image.clamp(0, 1).numpy() * 255).max() <= 1
    assert (read < 250).any()
    read = np.asarray(Image.open(pair.path(tmp_path / "alphas") / frame_name(2)))
    assert np.abs(read - alpha.numpy() * 255).max() <= 1 and read.max() > 0


def test_deleted_frames_are_rendered_again_with_the_same_bytes(ours, pairs, bench_pipeline):
    method = rendered("ours", "", bench_pipeline.head, ours[0], "cpu")
    first = method.frames(pairs[0])
    files = sorted(pairs[0].path(ours[0] / "frames" / "ours").iterdir())
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    assert np.array_equal(method.frames(pairs[0]), first)
    assert [file.read_bytes() for file in files] == before


def test_flame_position_places_a_gaussian_on_every_vertex(bench_pipeline, flame_position, clips):
    head, params = bench_pipeline.head, clips[1].params.frame(0)
    ((avatar, _),) = flame_position_maker(bench_pipeline, flame_position)(clips[1:2])
    vertices = head.canonical_vertices(params)
    inputs = bench_pipeline.inputs([clips[1].read(0)], [params])
    with torch.no_grad():
        offsets = flame_position(positions=vertices[None].float(), pixel_values=inputs["pixel_values"]).offsets[0]
    positions = avatar.canonical_gaussians().positions[0]
    assert torch.allclose(positions, (vertices + offsets).float(), atol=1e-5)
    corners = head.faces[avatar.faces]
    assert (corners == torch.arange(head.n_vertices)[:, None]).any(1).all()


def test_flame_position_binds_several_gaussians_to_a_face_of_their_vertex(bench_head, flame_position, clips):
    config = GaussianDecoderConfig.from_dict(flame_position.config.to_dict() | {"gaussians_per_point": 2})
    decoder = GaussianDecoder(config).eval()
    params, pixels = clips[1].params.frame(0), torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0))
    avatar = vertex_avatar(bench_head, decoder, pixels, params)
    corners = bench_head.faces[avatar.faces]
    assert (corners == torch.arange(bench_head.n_vertices).repeat_interleave(2)[:, None]).any(1).all()
    away = (
        avatar.canonical_gaussians().positions[0].unflatten(0, (-1, 2)) - bench_head.canonical_vertices(params)[:, None]
    )
    assert (away.norm(dim=-1) < config.init_scale).all() and (away[:, 0] != away[:, 1]).any(1).all()


def test_a_folder_with_a_wrong_frame_gives_no_row_in_that_mode_only(pairs, tmp_path):
    for pair in pairs:
        pair.path(tmp_path).mkdir(parents=True)
        for row in pair.rows:
            Image.fromarray(pair.driver.image(row)).save(pair.path(tmp_path) / frame_name(row))
    assert not compared("peer", tmp_path, pairs).absent
    (pairs[0].path(tmp_path) / frame_name(2)).unlink()
    assert compared("peer", tmp_path, pairs).absent == {"self": (f"missing: self/{pairs[0].name}/00002.png",)}
    assert json.dumps(compared("peer", tmp_path / "nowhere", pairs).absent).count("no folder") == 2
