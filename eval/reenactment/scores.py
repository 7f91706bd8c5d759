"""From frames to the numbers of the table: per frame, per pair, and over all pairs with an interval.

Networks read every image once; their features are kept in files. Frames in which no face is found are counted and enter no mean.
A mean is over all frames of all pairs; its interval is over source subjects, because frames of one subject are not independent.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import functional as metrics
from eval.networks.registry import Networks
from eval.networks.weights import Missing
from eval.reenactment.clips import Clip
from eval.reenactment.protocol import Pair
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.npz import read_npz

RESAMPLES, CONFIDENCE = 1000, 0.95
NORMAL_95 = 1.959963984540054
Features = dict[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """A column of the results table."""

    key: str
    title: str
    unit: str
    higher_is_better: bool
    modes: tuple[str, ...]
    network: str | None  # that it needs
    digits: int = 3

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"


BOTH = ("self", "cross")
_METRICS = (
    Metric("psnr", "PSNR", "dB", True, ("self",), None, 2),
    Metric("ssim", "SSIM", "", True, ("self",), None),
    Metric("coverage", "Coverage", "", True, ("self",), None),
    Metric("lpips", "LPIPS", "", False, ("self",), "lpips"),
    Metric("fid", "FID", "", False, BOTH, "inception", 2),
    Metric("clip", "CLIP", "", True, BOTH, "clip"),
    Metric("csim", "CSIM", "", True, BOTH, "arcface"),
    Metric("akd", "AKD", "px at 512", False, BOTH, "face", 2),
    Metric("apd", "APD", "mrad", False, BOTH, "face", 2),
    Metric("apd_geodesic", "APD, geodesic", "°", False, BOTH, "face", 2),
    Metric("aed", "AED", "", False, BOTH, "face", 4),
)
METRICS = {metric.key: metric for metric in _METRICS}


def describe_networks(networks: Networks) -> dict[str, dict[str, str]]:
    """Network -> name, package, version, weights and their hash; or what is missing and its remedy."""
    return {name: net.about for name, net in vars(networks).items()}


def missing_networks(networks: Networks) -> dict[str, str]:
    """Network -> why it is missing, and the remedy."""
    found = vars(networks).items()
    return {name: f"{net.reason}; {net.remedy}" for name, net in found if isinstance(net, Missing)}


def read_features(images: np.ndarray, networks: Networks) -> Features:
    """What the available networks read from images (N, H, W, 3)."""
    whole = {"inception": networks.inception, "clip": networks.clip}
    features: Features = {name: net(images) for name, net in whole.items() if not isinstance(net, Missing)}
    if not isinstance(networks.face, Missing):
        reading = networks.face(images)
        features |= vars(reading)
        if not isinstance(networks.arcface, Missing):  # it needs the landmarks
            features["arcface"] = networks.arcface(images, reading.landmarks)
    return features


class FeatureFiles:
    """Features of frames and their distances to the truth, computed once per frames and networks and kept in files."""

    def __init__(self, folder: Path, networks: Networks):
        self.folder, self.networks = folder, networks
        self.networks_key = json.dumps(describe_networks(networks), sort_keys=True)

    def of_clip(self, clip: Clip) -> Features:
        """Of all true frames."""
        return self._load(self.folder / "clips" / f"{clip.subject_id}.npz", clip.images(range(len(clip))), None)

    def of_frames(self, method: str, pair: Pair, frames: np.ndarray, alphas: np.ndarray | None = None) -> Features:
        """Of a method's frames; in self-reenactment also `psnr`, `ssim`, `lpips` and, with `alphas`, `coverage` of the truth."""
        own = pair.mode == "self"
        truth = pair.driver.images(pair.rows) if own else None
        covering = (alphas, pair.driver.alphas(pair.rows)) if own and alphas is not None else ()
        return self._load(self.folder / method / pair.mode / f"{pair.name}.npz", frames, truth, covering)

    def _load(
        self, path: Path, images: np.ndarray, truth: np.ndarray | None, alphas: Sequence[np.ndarray] = ()
    ) -> Features:
        digest = hashlib.sha256(self.networks_key.encode())
        for stack in (images, truth, *alphas):
            digest.update(b"" if stack is None else stack.tobytes())
        key = digest.hexdigest()
        with contextlib.suppress(OSError, ValueError):  # a damaged file is made again
            kept, _ = read_npz(path)
            if str(kept.pop("key", "")) == key:
                return kept
        features = read_features(images, self.networks)
        if truth is not None:
            features |= {"psnr": metrics.psnr(images, truth), "ssim": metrics.ssim(images, truth)}
            if not isinstance(self.networks.lpips, Missing):
                features["lpips"] = self.networks.lpips(images, truth)
        if alphas:
            features["coverage"] = metrics.coverage(*alphas)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            arrays: dict[str, Any] = features | {"key": np.array(key)}
            np.savez(file, **arrays)
        return features


def frame_values(pair: Pair, frames: Features, source: Features, driver: Features) -> Features:
    """metric -> (N,), NaN where no face was found; `source` and `driver` are the features of all true frames of their clips.

    Motion (AKD, APD, AED) is compared with the driver's frame; identity and appearance (CSIM, CLIP) with the true frame in
    self-reenactment, and with the source portrait in cross-reenactment.
    """
    rows = np.array(pair.rows)
    values: Features = {name: frames[name] for name in ("psnr", "ssim", "coverage", "lpips") if name in frames}
    for key, feature in (("clip", "clip"), ("csim", "arcface")):
        if feature in frames:
            subject = driver[feature][rows] if pair.mode == "self" else np.repeat(source[feature][:1], len(rows), 0)
            values[key] = metrics.cosine_similarity(frames[feature], subject)
    if "landmarks" in frames:
        to_512 = 512 / max(pair.driver.size)
        rotations = frames["rotations"], driver["rotations"][rows]
        values["akd"] = metrics.keypoint_distance(frames["landmarks"], driver["landmarks"][rows]) * to_512
        values["apd"] = metrics.pose_distance_euler(*rotations) * 1000
        values["apd_geodesic"] = np.degrees(metrics.pose_distance_geodesic(*rotations))
        values["aed"] = metrics.expression_distance(frames["expressions"], driver["expressions"][rows])
    return values


def resample(count: int, seed: int) -> np.ndarray:
    """(RESAMPLES, count) subjects drawn with replacement: the same draws for every method and metric."""
    return np.random.default_rng((seed, count)).integers(0, count, (RESAMPLES, count))


def mean_with_interval(
    per_pair: Sequence[np.ndarray], draws: np.ndarray, without: str = "no face was found in any frame"
) -> dict[str, Any]:
    """Mean over all frames that have a value, and its bootstrap interval over subjects (None for a single subject).

    `without` is the reason if none has one.
    """
    sums = np.array([np.nansum(values) for values in per_pair])
    counts = np.array([np.count_nonzero(~np.isnan(values)) for values in per_pair])
    if counts.sum() == 0:
        return {"na": without}
    weights = counts[draws].sum(1)
    low, high = None, None
    if len(per_pair) > 1:
        means = sums[draws].sum(1)[weights > 0] / weights[weights > 0]  # without draws in which no frame has a value
        tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        # Values that occur rather than interpolated ones: between two infinite PSNRs there is no number.
        low, high = np.quantile(means, tails, method="inverted_cdf").tolist()
    summary = {"value": float(sums.sum() / counts.sum()), "low": low, "high": high}
    return summary | {"frames": int(counts.sum()), "subjects": int(np.count_nonzero(counts))}


def fid_with_interval(made: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> dict[str, Any]:
    """FID of all frames against all real ones, and its interval over subjects (None for a single one).

    A jackknife, because the repeated frames of a bootstrap alone raise FID by more than it varies.
    """
    value = metrics.frechet_distance(np.concatenate(made), np.concatenate(real))
    low, high, count = None, None, len(made)
    if count > 1:
        without = []
        for left in range(count):
            some = (np.concatenate([*features[:left], *features[left + 1 :]]) for features in (made, real))
            without.append(metrics.frechet_distance(*some))
        reach = NORMAL_95 * float(np.sqrt((count - 1) * np.var(without)))
        low, high = max(0.0, value - reach), value + reach
    summary = {"value": value, "low": low, "high": high, "frames": sum(map(len, made))}
    return summary | {"real_frames": sum(map(len, real)), "subjects": count}


def summarize(
    pairs: Sequence[Pair], frames: Sequence[Features], clips: dict[str, Features], missing: dict[str, str], seed: int
) -> dict[str, Any]:
    """The results of one method in one mode; `frames` in the order of `pairs`, `clips` by subject."""
    mode, draws = pairs[0].mode, resample(len(pairs), seed)
    sources = [clips[pair.source.subject_id] for pair in pairs]
    drivers = [clips[pair.driver.subject_id] for pair in pairs]
    values = [frame_values(*each) for each in zip(pairs, frames, sources, drivers)]
    table: dict[str, Any] = {}
    for metric in METRICS.values():
        if mode not in metric.modes:
            continue
        if metric.network is not None and metric.network in missing:
            table[metric.key] = {"na": missing[metric.network], "network": metric.network}
        elif metric.key == "fid":
            # Against the source's own frames: cross-reenactment has no true ones.
            real = [source["inception"][pair.source.num_references :] for pair, source in zip(pairs, sources)]
            table["fid"] = fid_with_interval([own["inception"] for own in frames], real)
        elif metric.key == "coverage" and metric.key not in values[0]:
            table[metric.key] = {"na": "the frames have no alpha"}
        else:
            without = ["the true images have no alpha"] if metric.key == "coverage" else []
            table[metric.key] = mean_with_interval([each[metric.key] for each in values], draws, *without)
    per_pair = {
        pair.name: {
            "mean": {key: float(np.nanmean(v)) if (~np.isnan(v)).any() else None for key, v in each.items()},
            "frames": {key: v.tolist() for key, v in each.items()},
        }
        for pair, each in zip(pairs, values)
    }
    num_frames = sum(len(pair.rows) for pair in pairs)
    result = {"metrics": table, "num_frames": num_frames, "pairs": per_pair}
    if "face" not in missing:
        lost = [np.isnan(own["landmarks"]).any((1, 2)).sum() for own in frames]
        driver = [np.isnan(own["landmarks"][np.array(p.rows)]).any((1, 2)).sum() for p, own in zip(pairs, drivers)]
        result["faces_not_found"] = {"frames": int(sum(lost)), "driver": int(sum(driver)), "of": num_frames}
    return result
