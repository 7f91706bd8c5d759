"""Builds corpora in processes that are killed, or stopped, right before a chosen file-system operation.

    python killed_builds.py FOLDER        one JSON job a line on standard input, one JSON result a line on standard output

Each job is a process of its own, forked from this one, which has no threads. Operations are what changes something in
FOLDER: make, rename and remove, opening a file to write, locking, exchanging two folders. They are counted by an audit
hook, so no function is replaced and none is forgotten.
"""

import json
import os
import signal
import sys
from pathlib import Path

from gaussian_tokenizer.corpus import building
from gaussian_tokenizer.corpus.options import BuildSettings
from gaussian_tokenizer.heads.procedural_head import build_procedural_head
from gaussian_tokenizer.synthetic.source import SyntheticSettings, SyntheticSource
from gaussian_tokenizer.utils import atomic

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
FOLDER, HEAD = sys.argv[1], build_procedural_head(600)


def changes_something(event: str, arguments: tuple) -> bool:
    if event == "open":
        path, _, flags = arguments
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(written) and isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(FOLDER)
    if event in CHANGES:  # a relative name is one in an open folder that is being removed
        path = os.fsdecode(arguments[0])
        return path.startswith(FOLDER) or not path.startswith("/")
    return event == "fcntl.flock" or (event == "ctypes.dlsym" and arguments[1] == "renameat2")


def build(job: dict) -> dict:
    steps = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal steps
        if changes_something(event, arguments):
            steps += 1
            if steps == job["at"]:
                os.kill(os.getpid(), getattr(signal, job["signal"]))

    os.fsync = lambda descriptor: None  # nobody pulls the plug here
    if not job["exchange"]:
        atomic.exchange_names = building.exchange_names = lambda first, second: False
    sys.addaudithook(count)
    source = job["subjects"]
    if isinstance(source, int):
        source = SyntheticSource(source, SyntheticSettings(image_size=16, num_points=20))
    try:
        settings = BuildSettings(**job["settings"])
        building.build(
            source, HEAD, Path(job["output"]), settings, overwrite=job["overwrite"], num_proc=1, progress=False
        )
    except Exception as error:
        return {"outcome": "refused" if isinstance(error, ValueError) else "failed", "message": repr(error)}
    return {"outcome": "built", "steps": steps}


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "continue" in job:
            process = job["continue"]
            os.kill(process, signal.SIGCONT)
        else:
            process = os.fork()
            if process == 0:
                print(json.dumps(build(job)), flush=True)
                os._exit(0)
        _, status = os.waitpid(process, os.WUNTRACED)
        if os.WIFSIGNALED(status):
            print(json.dumps({"outcome": "killed"}), flush=True)
        elif os.WIFSTOPPED(status):
            print(json.dumps({"outcome": "stopped", "process": process}), flush=True)


if __name__ == "__main__":
    main()
