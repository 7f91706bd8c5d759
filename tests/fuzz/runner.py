"""Runs of damaged files in a process of its own, which may hang, crash and eat memory; what it finds is kept.

Allowed are ValueError, FileNotFoundError and a valid object, within SECONDS of processor time and MEGABYTES of memory.
Case `index` of `seed` is always the same file: format, file and mutations depend on the two numbers alone.
"""

import json
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

SECONDS, MEGABYTES, ADDRESS_SPACE = 5, 400, 6 * 2**30
STUCK = 60  # seconds without a case, after which the process is ended from outside


@dataclass(frozen=True)
class Finding:
    seed: int
    index: int
    format: str
    what: str  # the exception, or "hang", "memory", "crash"
    where: str  # the last line of the toolkit's own that was on the way
    file: str  # the damaged file


def fuzz(
    folder: Path, seed: int, minutes: float, start: int = 0, count: int | None = None, only: str = ""
) -> tuple[int, list[Finding]]:
    """Read damaged files until the time or `count` is over; how many were read, and the findings."""
    (folder / "findings").mkdir(parents=True, exist_ok=True)
    progress, findings, end = folder / "progress", folder / "findings.jsonl", time.monotonic() + 60 * minutes
    findings.unlink(missing_ok=True)
    last = start + count if count is not None else 2**62
    index = start
    while index < last and (left := end - time.monotonic()) > 0:
        _note(progress, index, "?")
        command = [sys.executable, "-m", "tests.fuzz", "--folder", str(folder), "--seed", str(seed), "--work"]
        command += ["--start", str(index), "--stop", str(last), "--minutes", str(left / 60), "--only", only]
        # libtiff and others speak about every damage.
        with open(folder / "stderr", "wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as child:
            stuck = _wait(child, progress)
        number, _, name = progress.read_text().strip().partition(" ")
        name = name.strip()
        index = int(number)
        if child.returncode and name == "?":
            raise RuntimeError(f"the files could not be made, see {folder / 'stderr'}")
        if child.returncode:
            what = "hang" if stuck else f"crash (status {child.returncode})"
            _keep(findings, Finding(seed, index, name, what, "", str(folder / "current")), folder)
            index += 1
    found = [Finding(**json.loads(line)) for line in findings.read_text().splitlines()] if findings.exists() else []
    return index - start, found


def _wait(child: subprocess.Popen, progress: Path) -> bool:
    """Whether the process had to be ended: no case was done for STUCK seconds (its start may take longer)."""
    while True:
        try:
            child.wait(1)
            return False
        except subprocess.TimeoutExpired:
            idle = time.time() - progress.stat().st_mtime
            if idle > STUCK * (5 if progress.read_text().strip().endswith("?") else 1):
                child.kill()
                return True


# ---- in the child


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


def work(folder: Path, seed: int, start: int, stop: int, minutes: float, only: str) -> None:
    """Cases `start` to `stop`; ends early, after writing down how far it came, where memory was lost."""
    from tempfile import TemporaryDirectory

    from tests.fuzz.formats import make_formats
    from tests.fuzz.mutations import damage

    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * minutes
    with TemporaryDirectory() as temporary:
        formats = make_formats(Path(temporary))
        names = [name for name, each in formats.items() for _ in range(each.weight) if only in name]
        contents = {path: path.read_bytes() for each in formats.values() for path in each.files}
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        signal.signal(signal.SIGPROF, _hang)
        for index in range(start, stop):
            rng = Random(f"{seed} {index}")
            name = rng.choice(names)
            each = formats[name]
            path = rng.choice(each.files)
            content = damage(contents[path], [contents[other] for other in each.files], rng, each.mutations)
            _note(folder / "progress", index, name)
            (folder / "current").write_bytes(content)
            path.write_bytes(content)
            before = _peak()
            what, where = _outcome(each, path)
            path.write_bytes(contents[path])
            grown = _peak() - before
            if grown > MEGABYTES:
                what = f"memory: {grown:.0f} MB more"
            if what:
                _keep(folder / "findings.jsonl", Finding(seed, index, name, what, where, str(path)), folder)
            if time.monotonic() > end or grown > MEGABYTES:
                _note(folder / "progress", index + 1, name)
                return
        _note(folder / "progress", stop, name)


def _outcome(each, path: Path) -> tuple[str, str]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        each.read(path)
    except (ValueError, FileNotFoundError, *each.allowed):
        return "", ""
    except (Exception, Hang) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if each.foreign and f"/{each.foreign}/" in traceback.extract_tb(error.__traceback__)[-1].filename:
            return "", ""
        own = [at for at in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in at.filename]
        own = [at for at in own if "/tests/" not in at.filename] or own
        return (
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            f"{Path(own[-1].filename).name}:{own[-1].lineno}",
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "", ""


def _note(progress: Path, index: int, name: str) -> None:
    """How far it came, in one write: the process may end at any moment."""
    with open(progress, "r+" if progress.exists() else "w") as file:
        file.write(f"{index:<20} {name:<40}\n")


def _hang(*_: object) -> None:
    raise Hang(f"more than {SECONDS} s of processor time")


def _peak() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _keep(findings: Path, finding: Finding, folder: Path) -> None:
    """Keep the damaged file under the case's number and the name it had."""
    suffix = Path(finding.file).suffix
    kept = folder / "findings" / f"{finding.seed}-{finding.index}{suffix}"
    kept.write_bytes((folder / "current").read_bytes())
    with open(findings, "a") as file:
        file.write(json.dumps(asdict(finding) | {"file": str(kept)}) + "\n")
