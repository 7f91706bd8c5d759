"""Find the head in a photograph, from the command line: its shape, expression and jaw, and the camera.

    pointillist fit-portrait photo.jpg --landmarks points.json --head procedural:2000 --output_dir outputs/me

The folder has the layout of a VHAP export of one image, which `load_tracking` reads: images/, flame_param/, transforms.json;
and fit.png, the head drawn over the photograph, and fit.json with the residuals.
"""

import argparse
import sys
from pathlib import Path

from gaussian_tokenizer.captures.contact_sheet import draw_fit
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.landmark_files import detect_landmarks, read_landmarks
from gaussian_tokenizer.captures.portrait import fit_portrait
from gaussian_tokenizer.captures.subject import METADATA_NAME
from gaussian_tokenizer.captures.transforms_json import write_frames
from gaussian_tokenizer.heads.landmarks import with_landmarks
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.tokenizer.processing_conditions import upright
from gaussian_tokenizer.utils.atomic import atomic_folder
from gaussian_tokenizer.utils.hub import one_line
from gaussian_tokenizer.utils.json_files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="pointillist fit-portrait", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("image", type=Path, help="photograph; turned upright as its EXIF says, as the landmarks must be")
    add("--landmarks", type=Path, help='68 or 51 iBUG points in pixels: JSON {"landmarks": [[x, y], ...]}, or npz')
    add("--mediapipe", type=Path, metavar="TASK", help="face_landmarker.task, with which mediapipe finds landmarks")
    add("--head", default="procedural:2000", help="procedural[:faces], .safetensors, FLAME .pkl, ICT folder")
    add(
        "--landmark_embedding",
        type=Path,
        help="FLAME's landmarks: landmark_embedding.npy or flame_static_embedding.pkl",
    )
    add("--focal", type=float, help="focal length in pixels (default: estimated)")
    add("--output_dir", type=Path, required=True, help="folder to write; replaced if it is there")
    arguments = parser.parse_args()
    try:
        fit(arguments)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {one_line(error)}\n")


def fit(arguments: argparse.Namespace) -> None:
    """Fit, write the folder, and print how well the head fits."""
    if (arguments.landmarks is None) == (arguments.mediapipe is None):
        raise ValueError("give either --landmarks, a file, or --mediapipe, a network that finds them")
    image = upright(arguments.image)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    head = load_head(arguments.head)
    if arguments.landmark_embedding is not None:
        head = with_landmarks(head, arguments.landmark_embedding)
    if arguments.landmarks is not None:
        landmarks, confidences = read_landmarks(arguments.landmarks)
    else:
        landmarks, confidences = detect_landmarks(image, arguments.mediapipe), None
    found = fit_portrait(landmarks, head, (image.height, image.width), arguments.focal, confidences)

    viewmat, K = found.camera.viewmats[0].double().numpy(), found.camera.Ks[0].tolist()
    lens = {"fx": K[0][0], "fy": K[1][1], "cx": K[0][2], "cy": K[1][2]}
    frame = Frame(0, 0, viewmat, **lens, width=image.width, height=image.height, image=image, params=found.params)
    arguments.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(arguments.output_dir) as folder:
        write_frames(folder, [frame])
        about = {"avatar_id": arguments.output_dir.name, "head_name": head.name, "head_hash": head.hash}
        write_json(folder / METADATA_NAME, about)
        draw_fit(frame, head, landmarks, found.landmarks.numpy()).save(folder / "fit.png")
        residuals = [round(float(each), 3) for each in found.residuals]
        report = {"rms_pixels": found.rms, "residuals_pixels": residuals, "warnings": list(found.warnings)}
        write_json(folder / "fit.json", report)
    for each in found.warnings:
        print(f"warning: {each}", file=sys.stderr)
    print(
        f"{len(residuals)} landmarks within {found.rms:.2f} pixels (root mean square), focal length {lens['fx']:.0f} "
        f"pixels; head, camera and fit.png in {arguments.output_dir}"
    )


if __name__ == "__main__":
    main()
