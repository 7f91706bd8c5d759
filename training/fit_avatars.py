"""Fit a Gaussian avatar to every tracked subject of a folder, with 4 to 15 Gaussians on every occupied face.

    accelerate launch training/fit_avatars.py training/configs/fit_demo.yaml --data subjects --head procedural:600 \\
        --output_dir avatars                                                               # minutes a subject on one CPU core
    accelerate launch training/fit_avatars.py training/configs/fit_paper.yaml --data tracked --head flame.safetensors \\
        --output_dir avatars --shorten 20                                                  # on one GPU or several, 30,000 steps

The same command resumes an interrupted run: finished subjects are kept, interrupted ones continue from their checkpoints, failed
ones are named. The output is what `gaussian_tokenizer.build_corpus` reads, each folder with `fit_report.json` and `fit.png`.
"""

import hashlib
import os
import shutil
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.captures.frame import Frame
from gaussian_tokenizer.captures.loading import find_trackings, load_tracking
from gaussian_tokenizer.captures.subject import write_subject
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.loading import load_head
from gaussian_tokenizer.utils.disk import disk_is_full
from gaussian_tokenizer.utils.hub import one_line
from training.common.arguments import exit_on_user_error, parse_arguments
from training.common.process import Interrupted, StopSignals, warn_of_missing_processes
from training.fitting.arguments import FitArguments, FitSettings
from training.fitting.images import evenly_spread
from training.fitting.optimization import Fit, optimize
from training.fitting.queue import Job, order_of
from training.fitting.report import fit_report, write_report
from training.fitting.state import FitState, saved_identity

POLL_SECONDS = 1.0
STEPS_BETWEEN_UPDATES = 50  # of the numbers in the progress bar
IN_METADATA = ("psnr", "psnr_tokenized", "num_points", "iterations")  # entries of the report for the avatar's metadata


def main() -> None:
    arguments, settings = parse_arguments(sys.argv[1:], FitArguments, FitSettings, description=__doc__)
    # Subjects are independent, so the processes form no group in which one could delay or stop the others.
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    warn_of_missing_processes(processes)
    torch.set_num_threads(1)  # sums then have the same order on every machine
    head = load_head(arguments.head)
    jobs = [Job(path, Path(arguments.output_dir)) for path in find_trackings(arguments.data)]
    finished = [job.is_finished(settings.to_dict()) for job in jobs]
    for job in jobs:
        job.check_checkpoint({"settings": settings.to_dict()})
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    worker = Worker(arguments, settings, head)
    if process == 0:
        print(f"{len(jobs)} subjects, {sum(finished)} finished; {processes} processes, {worker.device}", flush=True)
    try:
        with worker.signals:
            worker.work_through(order_of(jobs, process, processes))
    except OSError as error:
        if not disk_is_full(error):
            raise
        advice = "Finished subjects and earlier checkpoints are complete; free space and run the same command again"
        raise ValueError(f"the disk is full ({error}). {advice}") from error
    failures = {job.name: failure["reason"] for job in jobs if (failure := job.failure()) is not None}
    if process == 0:
        print(f"{len(jobs) - len(failures)} avatars in {arguments.output_dir}", flush=True)
    if failures:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in failures.items())
        sys.exit(f"{len(failures)} of {len(jobs)} subjects failed; --retry_failed true tries them again:{lines}")


class Worker:
    """One process: fits subjects that no other process is fitting until all are finished or have failed."""

    def __init__(self, arguments: FitArguments, settings: FitSettings, head: HeadModel):
        self.arguments, self.settings, self.head = arguments, settings, head
        self.place = int(os.environ.get("LOCAL_RANK", 0))
        on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
        if on_gpu and not torch.cuda.is_available():
            raise ValueError("--device cuda: this PyTorch sees no GPU; give --device cpu")
        self.device = torch.device("cuda", self.place % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
        self.signals = StopSignals()

    def interrupted(self, where: str) -> Interrupted:
        return Interrupted(f"{where}; run the same command again to resume from there", self.signals.received[0])

    def work_through(self, jobs: list[Job]) -> None:
        before = {job.name: job.failure() for job in jobs}
        while jobs:
            elsewhere = []
            for job in jobs:
                if self.signals.received:
                    raise self.interrupted("stopped between two subjects")
                if job.is_finished(self.settings.to_dict()):
                    continue
                with job.claim() as mine:
                    if not mine:
                        elsewhere.append(job)
                    elif job.is_finished(self.settings.to_dict()):
                        job.clean()
                    # Not a subject on which another process has just failed.
                    elif (last := job.failure()) is None or (self.arguments.retry_failed and last == before[job.name]):
                        self.attempt(job)
            jobs = elsewhere
            if jobs:  # a process that fits one of them may die
                time.sleep(POLL_SECONDS)

    def attempt(self, job: Job) -> None:
        """Fit a subject and record its failure. A full disk, which affects all subjects, ends the run."""
        try:
            self.fit(job)
        except Interrupted:
            raise
        except Exception as error:
            if isinstance(error, OSError) and disk_is_full(error):
                raise
            reason = one_line(error)
            if not isinstance(error, ValueError | OSError):
                reason = f"{type(error).__name__}: {reason}"
            job.record_failure(reason, traceback=traceback.format_exc().splitlines())
            tqdm.write(f"{job.name} failed: {reason}", file=sys.stderr)

    def fit(self, job: Job) -> None:
        tracking = load_tracking(job.source, self.head)
        fit = Fit(tracking, self.head, self.settings, self.device, self.arguments.image_cache)
        identity = {"settings": self.settings.to_dict(), "data": fingerprint(tracking, self.head)}
        if job.failure() is not None and job.checkpoint.exists() and saved_identity(job.checkpoint) != identity:
            job.checkpoint.unlink()  # its data may have been corrected
        job.check_checkpoint(identity)
        state = FitState.load(job.checkpoint, self.device) if job.checkpoint.exists() else fit.begin()
        self.optimize(job, fit, state, identity)
        avatar = fit.avatar(state)
        report = fit_report(fit, state, avatar, self.arguments.max_eval_images) | {"settings": self.settings.to_dict()}
        staging = job.work / "result"
        shutil.rmtree(staging, ignore_errors=True)
        frames = result_frames(fit, avatar, self.arguments.max_result_images)
        metadata = {"avatar_id": tracking.subject_id, "fit": {name: report[name] for name in IN_METADATA}}
        write_subject(staging, avatar, frames, tracking.metadata | metadata)
        write_report(fit, avatar, report, staging)
        staging.rename(job.result)
        job.clean()
        faces = report["points_per_face"]
        psnr = "" if report["psnr"] is None else f"; held-out camera {report['psnr']:.2f} dB"
        tqdm.write(f"{job.name}: {report['num_points']:,} points, {faces['min']} to {faces['max']} on a face{psnr}")

    def optimize(self, job: Job, fit: Fit, state: FitState, identity: dict) -> None:
        """Run the remaining steps, with checkpoints and a progress bar."""
        clocks = {"wall": time.perf_counter, "cpu": time.process_time}
        begin = {name: clock() - state.seconds[name] for name, clock in clocks.items()}
        total, done, hidden = fit.settings.iterations, state.iteration, self.arguments.disable_tqdm

        def after_step(state: FitState, loss: float) -> None:
            bar.update()
            if state.iteration % STEPS_BETWEEN_UPDATES == 0:
                bar.set_postfix(points=f"{len(state.gaussians):,}", loss=f"{loss:.4f}")
            if state.iteration == total or self.signals.received or state.iteration % self.arguments.save_every == 0:
                state.seconds = {name: clock() - begin[name] for name, clock in clocks.items()}
                state.save(job.checkpoint, identity)
            if self.signals.received:
                raise self.interrupted(f"{job.name} saved after {state.iteration:,} of {total:,} steps")

        with tqdm(
            desc=job.name, total=total, initial=done, unit="step", position=self.place, mininterval=1.0, disable=hidden
        ) as bar:
            optimize(fit, state, after_step)


def fingerprint(tracking: Tracking, head: HeadModel) -> str:
    """16 hex digits of the input of a fit, without the content of the images."""
    digest = hashlib.sha256(head.hash.encode())
    for frame in tracking.frames:
        size = frame.image.stat().st_size if isinstance(frame.image, Path) else 0
        digest.update(repr((frame.timestep, frame.camera, frame.viewmat.tolist(), frame.K.tolist(), size)).encode())
    for name, value in tracking.params.tensors().items():
        digest.update(name.encode() + np.ascontiguousarray(value.numpy()).tobytes())
    digest.update(repr(sorted(tracking.splits.items())).encode())
    return digest.hexdigest()[:16]


def result_frames(fit: Fit, avatar: GaussianAvatar, count: int | None) -> list[Frame]:
    """Images for the corpus: transparent outside the subject, with the fitted head parameters."""
    assert avatar.params is not None
    frames = []
    for index in evenly_spread(fit.tracking, range(len(fit.tracking.frames)), count):
        frame = fit.tracking.frames[index]
        image = frame.image
        if frame.mask is not None or not (isinstance(image, Path) and image.suffix.lower() == ".png"):
            image = (fit.images.rgba(index) * 255).round().to(torch.uint8).cpu().numpy()
        params = avatar.params.frame(fit.images.row(index))
        frames.append(replace(frame, image=image, mask=None, params=params))
    return frames


if __name__ == "__main__":
    exit_on_user_error(main)
