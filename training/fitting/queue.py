"""The queue of subjects to fit. Folders are the only state that processes, of several machines too, share.

<output>/<subject>/                   a finished avatar with fit_report.json, moved here as a whole
<output>/.fit/<subject>/checkpoint.safetensors, failed.json, claim (locked by the process that fits the subject)
"""

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.json_files import read_json, to_json
from gaussian_tokenizer.utils.locks import exclusive
from training.fitting.report import REPORT_NAME
from training.fitting.state import differences, saved_identity


class Job:
    """One subject to be fitted, from the tracking `source` into a folder of `output`."""

    def __init__(self, source: Path, output: Path):
        self.source = source
        self.name = (source if source.is_dir() else source.parent).resolve().name
        self.result = output / self.name
        self.work = output / ".fit" / self.name
        self.checkpoint = self.work / "checkpoint.safetensors"
        self.failed = self.work / "failed.json"

    def is_finished(self, settings: Mapping[str, Any]) -> bool:
        """ValueError if the subject's folder was not fitted with these settings."""
        if not self.result.exists():
            return False
        try:
            found = read_json(self.result / REPORT_NAME)["settings"]
        except (OSError, ValueError, KeyError):
            raise ValueError(
                f"{self.result} exists, but was not fitted (no {REPORT_NAME}); give another --output_dir, or remove it"
            ) from None
        if found != dict(settings):
            raise ValueError(
                f"{self.result}: fitted with other settings: {differences(found, settings)}; give the same, another "
                "--output_dir, or remove it"
            )
        return True

    def check_checkpoint(self, identity: Mapping[str, Any]) -> None:
        """ValueError if there is a checkpoint that disagrees with these parts of a fit's identity."""
        saved = saved_identity(self.checkpoint) if self.checkpoint.exists() else identity
        found = {name: saved.get(name) for name in identity}
        if found != dict(identity):
            raise ValueError(
                f"{self.checkpoint}: begun with other settings or data: {differences(found, identity)}; give the same, or remove "
                "it to begin again"
            )

    def failure(self) -> dict[str, Any] | None:
        """`reason` and number of `attempts` if the subject failed."""
        try:
            failure = read_json(self.failed)
            return {"reason": str(failure["reason"]), "attempts": int(failure["attempts"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.failed}: does not say why the subject failed; remove it") from None

    def record_failure(self, reason: str, **more: Any) -> None:
        attempts = (self.failure() or {"attempts": 0})["attempts"] + 1
        failure = {"subject": self.name, "reason": reason, "attempts": attempts, **more}
        with atomic_file(self.failed) as file:
            file.write(to_json(failure).encode())

    def claim(self) -> AbstractContextManager[bool]:
        """Whether this process has the subject to itself within the block."""
        return exclusive(self.work / "claim")

    def clean(self) -> None:
        """Remove checkpoint, failure and claim."""
        shutil.rmtree(self.work, ignore_errors=True)


def order_of(jobs: list[Job], process: int, processes: int) -> list[Job]:
    """Every process begins with its share, every n-th subject, and continues with those of the others."""
    return [job for shift in range(processes) for job in jobs[(process + shift) % processes :: processes]]
