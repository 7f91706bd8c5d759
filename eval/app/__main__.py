"""Make an avatar from a portrait in the browser: photograph, landmarks, head, points as they are generated, animation, files.

    pointillist app --model outputs/demo/pipeline
    python -m eval.app --model me/my-pipeline --mediapipe face_landmarker.task

Prints the address to open in a browser on this machine and serves it until Ctrl+C. Runs on a CPU, without a network.
"""

import argparse
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gaussian_tokenizer.utils.hub import one_line

DEFAULT_MODEL: str | None = None  # folder or Hub id of the pipeline that is used without --model
MAX_MEGABYTES = 20  # of an upload


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pointillist app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, required=DEFAULT_MODEL is None, help="a pipeline, folder or Hub id")
    add("--mediapipe", type=Path, metavar="TASK", help="face_landmarker.task: landmarks are found, not clicked")
    add("--max_points", type=int, help="generate no more points than this (default: 32,768)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    host = "address to listen on (default: 127.0.0.1, this machine only; 0.0.0.0: all networks)"
    add("--host", default="127.0.0.1", help=host)
    add("--port", type=int, default=7860, help="port to listen on (default: 7860; 0: any free port)")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port}: expected 0 to 65535")
    if options.max_points is not None and options.max_points < 1:
        parser.error(f"--max_points {options.max_points}: expected at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: temporary files are removed
    try:
        with TemporaryDirectory(prefix="pointillist-app-") as cache:
            serve(options, Path(cache).resolve())
    except KeyboardInterrupt:
        print()
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {one_line(error)}\n")


def serve(options: argparse.Namespace, cache: Path) -> None:
    """Open the pipeline and serve the page until interrupted; uploads are in `cache` as long as they are needed."""
    # Gradio reads them when it is imported: nothing is reported to its makers, uploads are private.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": str(cache)}
    try:
        from eval.app.page import App
    except ImportError as error:
        raise ImportError(f'the app needs Gradio ({error}): pip install "avatar-pointillist[app]"') from error
    from modeling.pipeline import AvatarPipeline

    port = free_port(options.host, options.port)  # before the seconds that the pipeline takes
    if options.mediapipe is not None and not options.mediapipe.is_file():
        raise FileNotFoundError(f"{options.mediapipe}: no such file; expected MediaPipe's face_landmarker.task")
    pipeline = AvatarPipeline.from_pretrained(options.model, device=options.device)
    limits = {} if options.max_points is None else {"max_points": options.max_points}
    app = App(pipeline, cache, options.mediapipe, **limits)
    page = app.launch(options.host, port, MAX_MEGABYTES * 2**20)
    try:
        print(f"{page.local_url} makes avatars with {options.model}; press Ctrl+C to stop", flush=True)
        threading.Event().wait()
    finally:
        for key in [*app.visits]:
            app.end(key)
        page.close(verbose=False)


def free_port(host: str, port: int) -> int:
    """The port, or any free one for 0; ValueError where a server cannot listen."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            return server.getsockname()[1]
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port, or 0 for any free port"
        ) from None


if __name__ == "__main__":
    main()
