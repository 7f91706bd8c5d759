"""Convert a FLAME pickle into a head model file, once: `python -m gaussian_tokenizer.flame flame2023.pkl flame.safetensors`."""

import argparse
from pathlib import Path

from gaussian_tokenizer.heads.flame import read_flame
from gaussian_tokenizer.heads.landmarks import with_landmarks


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a FLAME pickle into a head model file, once.")
    parser.add_argument("pickle", type=Path, help="generic_model.pkl (2020), flame2023.pkl, ...")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--teeth", action=argparse.BooleanOptionalAction, default=True, help="GaussianAvatars' teeth")
    embeddings = "landmark_embedding.npy (DECA, VHAP) or flame_static_embedding.pkl: landmarks to put on the head"
    parser.add_argument("--landmark_embedding", type=Path, help=embeddings)
    arguments = parser.parse_args()
    try:
        head = read_flame(arguments.pickle, teeth=arguments.teeth)
        if arguments.landmark_embedding is not None:
            head = with_landmarks(head, arguments.landmark_embedding)
        head.save(arguments.output)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{head.n_vertices:,} vertices and {head.n_faces:,} faces in {arguments.output}")


if __name__ == "__main__":
    main()
