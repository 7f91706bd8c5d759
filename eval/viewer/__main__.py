"""View avatars in the browser: rotate, animate, color, compare and save them.

    python -m eval.viewer --avatar subjects/synthetic-0-000000
    python -m eval.viewer --avatar fitted --head flame.safetensors --compare generated --motion flame_param.npz
    python -m eval.viewer --model outputs/demo/pipeline --image outputs/demo/portrait.png

Prints the address to open in a browser on this machine and serves it until Ctrl+C. Runs on a CPU.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.viewer.controls import motions
from gaussian_tokenizer.avatars.avatar import GaussianAvatar, open_avatar
from gaussian_tokenizer.utils.hub import one_line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.viewer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--avatar", type=Path, help="a GaussianAvatars folder or a .safetensors avatar")
    source.add_argument("--model", help="a pipeline (folder or Hub id) that generates the avatar from --image")
    add = parser.add_argument
    add("--image", type=Path, help="portrait for --model")
    add("--seed", type=int, default=0, help="seed of generation with --model (default: 0)")
    add("--compare", type=Path, help="a second avatar of the same head model, shown on the right")
    heads = "procedural:600, a .safetensors, a FLAME .pkl, an ICT folder (default: the procedural one of the avatar)"
    add("--head", help=f"head model of --avatar: {heads}")
    add("--motion", help="a flame_param.npz or a folder of them, in addition to the built-in motions")
    host = "address to listen on (default: 127.0.0.1, this machine only; 0.0.0.0: all networks)"
    add("--host", default="127.0.0.1", help=host)
    add("--port", type=int, default=8080, help="port to listen on (default: 8080; 0: any free port)")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.image is None):
        parser.error("--model and --image are needed together: the pipeline and its portrait")
    if options.model is not None and options.head is not None:
        parser.error("--head only applies to --avatar; a pipeline has its own head model")
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port}: expected 0 to 65535")
    try:
        view(options)
    except KeyboardInterrupt:
        print()
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {one_line(error)}\n")


def view(options: argparse.Namespace) -> None:
    """Open the avatars and serve them until interrupted."""
    try:
        from eval.viewer.page import Page, check_address, open_server
    except ImportError as error:
        raise ImportError(f'the viewer needs viser ({error}): pip install "avatar-pointillist[viewer]"') from error
    torch.set_num_threads(1)  # posing gains little from threads, and the browser needs the other cores
    check_address(options.host, options.port)  # before the minutes that generating an avatar may take
    if options.model is None:
        name, first = name_of(options.avatar), open_avatar(options.avatar, options.head)
    else:
        from gaussian_tokenizer.tokenizer.image_files import open_image
        from modeling.pipeline import AvatarPipeline

        portrait = open_image(options.image)
        generated = AvatarPipeline.from_pretrained(options.model)(portrait, seed=options.seed, progress=True)
        assert isinstance(generated, GaussianAvatar)
        name, first = options.image.stem, generated
    assert first.head is not None
    avatars = {name: first}
    if options.compare is not None:
        second = name_of(options.compare)
        second = second if second != name else f"{second} (compared)"
        avatars[second] = GaussianAvatar.load(options.compare, head=first.head)
    played = motions(first.head, options.motion, first)
    server = open_server(options.host, options.port)
    try:
        page = Page(server, avatars, played)
        address = f"http://{options.host}:{server.get_port()}"
        print(f"{address} shows {', '.join(avatars)}; press Ctrl+C to stop", flush=True)
        page.run()
    finally:
        server.stop()


def name_of(path: Path) -> str:
    return path.resolve().name.removesuffix(".safetensors")


if __name__ == "__main__":
    main()
