"""Animate an avatar and render or export it, from the command line.

    python -m gaussian_tokenizer.animate --avatar subjects/synthetic-0-000000 --motion talk --output talk.gif

The motion is built in, tracked (a flame_param.npz or a folder of them), or a turntable around the head at rest. Output:
images, a page that plays by itself in a browser, the posed Gaussians as a numbered PLY sequence, or the avatar at rest as one
file for a splat viewer.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gaussian_tokenizer.avatars.avatar import open_avatar
from gaussian_tokenizer.avatars.export import UP, save_ply_sequence, save_splats, save_video
from gaussian_tokenizer.avatars.gaussians import Gaussians
from gaussian_tokenizer.avatars.motions import MOTIONS, load_motion, synthetic_motion
from gaussian_tokenizer.avatars.moving_page import PageCamera, save_page
from gaussian_tokenizer.avatars.skinning import ANIMATIONS, Skinning, retarget
from gaussian_tokenizer.geometry.rotations import quaternion_to_matrix
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.rendering.cameras import Cameras
from gaussian_tokenizer.rendering.splatting import render
from gaussian_tokenizer.utils.hub import one_line

DISTANCE = 1.0  # meters from the camera to the middle of the head
ROOM = 1.5  # side of the image, in heights of the skull
BORDER = 1.02  # at least so much more than the extent of skull and hair over all frames
STRAYS = 0.005  # of the Gaussians may stick out, so that a far one does not make the head small
FRAMES_AT_ONCE = 4
LARGE_PAGE = 30e6  # bytes, above which a phone may take long to open it or run out of memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--avatar", required=True, help="a .safetensors avatar, a GaussianAvatars folder or its point_cloud.ply")
    add("--head", help="procedural[:faces], .safetensors, FLAME .pkl, ICT folder (default: the avatar's, if built in)")
    motions = f"{', '.join(MOTIONS)}, turntable, or a flame_param.npz or a folder of them (default: talk)"
    add("--motion", default="talk", help=motions)
    add("--output", type=Path, help="a page: .html; images: .gif, .mp4, or a folder of PNG (no suffix)")
    add("--ply_sequence", type=Path, help="folder for the Gaussians of every frame, 00000.ply, ...")
    add("--export", type=Path, help="the Gaussians at rest for a splat viewer: .ply, .splat or .compressed.ply")
    add("--up", choices=UP, default="y", help="direction of the crown in files; minus_y for SuperSplat (default: y)")
    add("--animation", choices=ANIMATIONS, default="lbs", help="how the Gaussians follow the head")
    add("--image_size", type=int, default=256, help="width and height of the images; a page fills its window")
    add("--fps", type=float, default=25.0, help="frames per second of .html, .gif and .mp4")
    add("--num_frames", type=int, help="frames of a built-in motion (default: 48), or the first frames of a file")
    add("--azimuth", type=float, default=0.0, help="degrees of the camera to the subject's left")
    add("--background", type=float, default=1.0, help="gray behind the head, 0 black to 1 white")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    arguments = parser.parse_args()
    try:
        animate(arguments)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {one_line(error)}\n")


@torch.no_grad()
def animate(arguments: argparse.Namespace) -> None:
    check(arguments)
    avatar = open_avatar(arguments.avatar, arguments.head)
    assert avatar.head is not None
    motion = choose_motion(arguments, avatar.head).to(arguments.device)
    avatar = avatar.to(arguments.device)
    bound = avatar.bind()  # an avatar without colors is refused here
    if arguments.export is not None:
        save_splats(arguments.export, bound.at_rest(), up=arguments.up)
        print(f"{len(avatar):,} Gaussians at rest in {arguments.export}")
    if arguments.ply_sequence is not None:
        parts = posed_parts(bound, motion, arguments.animation)
        progress = tqdm(parts, desc="PLY", total=motion.num_frames, unit="frame")
        count = save_ply_sequence(arguments.ply_sequence, progress, arguments.up)
        print(f"{count} frames of {len(avatar):,} Gaussians in {arguments.ply_sequence}")
    if arguments.output is not None and arguments.output.suffix == ".html":
        write_page(bound, motion, arguments)
    elif arguments.output is not None:
        images = draw(bound, motion, arguments)
        save_video(arguments.output, images, arguments.fps)
        print(f"{len(images)} images of {arguments.image_size} x {arguments.image_size} in {arguments.output}")


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments before anything is loaded; ValueError, or FileNotFoundError for a missing folder."""
    outputs = [path for path in (arguments.output, arguments.ply_sequence, arguments.export) if path is not None]
    if not outputs:
        raise ValueError("nothing to write: give --output, --ply_sequence or --export")
    for path in outputs:
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path}: its folder {path.parent} is not there; create it first")
    if arguments.output is not None and arguments.output.suffix not in ("", ".gif", ".mp4", ".html"):
        raise ValueError(f"--output {arguments.output}: expected .html, .gif, .mp4, or no suffix for a folder of PNG")
    if not 8 <= arguments.image_size <= 8192:
        raise ValueError(f"--image_size {arguments.image_size}: expected 8 to 8192 pixels")
    if arguments.num_frames is not None and arguments.num_frames < 1:
        raise ValueError(f"--num_frames {arguments.num_frames}: expected at least 1")
    if not 0 < arguments.fps <= 1000:
        raise ValueError(f"--fps {arguments.fps}: expected more than 0 and at most 1000 frames per second")
    if not 0 <= arguments.background <= 1:
        raise ValueError(f"--background {arguments.background}: expected 0 (black) to 1 (white)")
    try:
        torch.zeros(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # in a build without CUDA it is an assertion
        raise ValueError(f"--device {arguments.device}: not usable here ({error})") from error


def choose_motion(arguments: argparse.Namespace, head: HeadModel) -> HeadParameters:
    """Head parameters of the frames to show; those of a turntable are at rest."""
    motion, num_frames = arguments.motion, arguments.num_frames or 48
    if motion == "turntable":
        return HeadParameters.zeros(head.n_shape, head.n_expression, num_frames)
    if motion in MOTIONS:
        return synthetic_motion(motion, head, num_frames)
    if not Path(motion).exists():
        built_in = f"built in are {', '.join(MOTIONS)} and turntable"
        raise FileNotFoundError(f"--motion {motion}: no such file or folder; {built_in}")
    return load_motion(motion, head).frame(slice(arguments.num_frames))


def posed_parts(bound: Skinning, motion: HeadParameters, animation: str, at_once: int = 1) -> Iterator[Gaussians]:
    """The motion, `at_once` frames at a time."""
    for start in range(0, motion.num_frames, at_once):
        yield bound.pose(motion.frame(slice(start, start + at_once)), animation)


def write_page(bound: Skinning, motion: HeadParameters, arguments: argparse.Namespace) -> None:
    """The motion as one HTML file, seen as the images would be."""
    azimuths, target, extent = viewpoints(bound, motion, arguments)
    camera = PageCamera(target.tolist(), extent, DISTANCE, arguments.azimuth, 360.0 if len(azimuths) > 1 else 0.0)
    parts = posed_parts(bound, motion, arguments.animation)
    progress = tqdm(parts, desc="page", total=motion.num_frames, unit="frame")
    title = ", ".join(Path(given).absolute().name for given in (arguments.avatar, arguments.motion))
    size = save_page(arguments.output, progress, camera, title, arguments.fps, arguments.background)
    print(f"{motion.num_frames} frames in {arguments.output}, {size / 1e6:.1f} MB")
    if size > LARGE_PAGE:
        print("A phone may not open a page of this size: give fewer --num_frames, or .mp4 as --output")


def viewpoints(
    bound: Skinning, motion: HeadParameters, arguments: argparse.Namespace
) -> tuple[list[float], torch.Tensor, float]:
    """Azimuths of the cameras, of every frame for a turntable, else one; and the `framing` for them."""
    turntable = arguments.motion == "turntable"
    steps = motion.num_frames if turntable else 1
    azimuths = [arguments.azimuth + 360 * index / steps for index in range(steps)]
    return azimuths, *framing(bound, motion.frame(0) if turntable else motion, azimuths)


def draw(bound: Skinning, motion: HeadParameters, arguments: argparse.Namespace) -> np.ndarray:
    """(T, size, size, 3) uint8, the avatar in every frame of the motion."""
    turntable, size = arguments.motion == "turntable", arguments.image_size
    azimuths, target, extent = viewpoints(bound, motion, arguments)
    cameras = Cameras.orbit(target, DISTANCE, azimuths, 0.0, DISTANCE * size / extent, size, size)
    images = []
    with tqdm(total=motion.num_frames, desc="images", unit="frame") as progress:
        for posed in posed_parts(bound, motion, arguments.animation, FRAMES_AT_ONCE):
            start = progress.n
            seen_by = cameras[start : start + posed.num_frames] if turntable else cameras
            image = render(posed, seen_by, background=arguments.background).image
            images.append((image.clamp(0, 1) * 255 + 0.5).byte().cpu().numpy())
            progress.update(posed.num_frames)
    return np.concatenate(images)


def framing(bound: Skinning, motion: HeadParameters, azimuths: Sequence[float]) -> tuple[torch.Tensor, float]:
    """Target of the cameras (3,) and side of the square they see there, meters: the head in all frames, with its hair."""
    head, own = bound.head, bound.own
    # Without the neck, whose length differs between head models.
    skull = ~head.regions["neck"] if "neck" in head.regions else torch.ones_like(head.template[:, 0], dtype=torch.bool)
    at_rest = head.canonical_vertices(own)[skull]
    height = float(at_rest[:, 1].max() - at_rest[:, 1].min())
    frames = [motion.frame(index) for index in range(motion.num_frames)]
    vertices = torch.stack([head.pose(retarget(own, frame, head)).vertices[0, skull] for frame in frames]).flatten(0, 1)
    target = (vertices.amin(0) + vertices.amax(0)) / 2
    hair = hair_thickness(bound.at_rest(), at_rest)
    half = 0.0
    for viewmat in Cameras.orbit(target, DISTANCE, azimuths, 0.0, 1.0, 1, 1).viewmats:
        x, y, depth = (vertices @ viewmat[:3, :3].T + viewmat[:3, 3]).unbind(-1)
        # Closer than the target looks larger; the limit ignores what is too close to be rendered.
        nearness = DISTANCE / (depth - hair).clamp(min=DISTANCE / 4)
        half = max(half, float(((torch.maximum(x.abs(), y.abs()) + hair) * nearness).max()))
    return target, max(ROOM * height, 2 * BORDER * half)


def hair_thickness(gaussians: Gaussians, skull: torch.Tensor) -> float:
    """How far Gaussians (T = 1) stand out above and beside the vertices of a skull (V, 3), meters, at least 0."""
    stretched = quaternion_to_matrix(gaussians.quats[0]) * gaussians.scales[0, :, None]
    reach = 3 * stretched.square().sum(-1).sqrt()  # three standard deviations along each axis, (N, 3)
    above = gaussians.positions[0] + reach - skull.amax(0)
    below = skull.amin(0) - gaussians.positions[0] + reach
    below[:, 1] = 0  # neck and long hair
    return max(0.0, float(torch.maximum(above, below).amax(1).quantile(1 - STRAYS)))


if __name__ == "__main__":
    main()
