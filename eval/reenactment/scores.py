"""From frames to the numbers of the table: per frame, per pair, over all of them with an interval.

The networks of `eval.networks` read every image once; what they read is kept as a file beside the frames and serves every
metric. A metric whose network is missing has no number but a reason. A frame in which no face is found counts as
such and enters no mean. A mean is over all frames of all pairs; its interval is one over source subjects, because frames of
one person are not independent: a bootstrap, of FID a jackknife.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import functional as metrics
from eval.networks.registry import Missing, Networks
from eval.reenactment.clips import Clip
from eval.reenactment.protocol import Pair
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.npz import read_npz

RESAMPLES, CONFIDENCE = 1000, 0.95
NORMAL_95 = 1.959963984540054
IMAGES_AT_ONCE = 16
NETWORKS = ("lpips", "inception", "face", "clip", "arcface")
Features = dict[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
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
METRICS = {
    metric.key: metric for metric in (
    Metric("psnr", "PSNR", "dB", True, ("self",), None, 2),
    Metric("ssim", "SSIM", "", True, ("self",), None),
    Metric("lpips", "LPIPS", "", False, ("self",), "lpips"),
    Metric("fid", "FID", "", False, BOTH, "inception", 2),
    Metric("clip", "CLIP", "", True, BOTH, "clip"),
    Metric("csim", "CSIM", "", True, BOTH, "arcface"),
    Metric("akd", "AKD", "px at 512", False, BOTH, "face", 2),
    Metric("apd", "APD", "mrad", False, BOTH, "face", 2),
    Metric("apd_geodesic", "APD, geodesic", "°", False, BOTH, "face", 2),
    Metric("aed", "AED", "", False, BOTH, "face", 4),
)}  # fmt: skip


def missing_networks(networks: Networks) -> dict[str, str]:
    """Network -> why it is missing and what would bring it."""
    found = {name: getattr(networks, name) for name in NETWORKS}
    return {name: f"{net.reason}; {net.remedy}" for name, net in found.items() if isinstance(net, Missing)}


def describe_networks(networks: Networks) -> dict[str, dict[str, Any]]:
    """Network -> name, package, version, weights and their hash; or what is missing."""
    described = {}
    for name in NETWORKS:
        net = getattr(networks, name)
        missing = isinstance(net, Missing)
        described[name] = {"missing": net.reason, "remedy": net.remedy} if missing else net.describe()
    return described


def read_features(images: np.ndarray, networks: Networks) -> Features:
    """What every network that is there says of images (N, H, W, 3)."""
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images), IMAGES_AT_ONCE):
        some = images[start : start + IMAGES_AT_ONCE]
        for name in ("inception", "clip"):
            net = getattr(networks, name)
            if not isinstance(net, Missing):
                parts.setdefault(name, []).append(net(some))
        if not isinstance(networks.face, Missing):
            reading = networks.face(some)
            for name in ("landmarks", "rotations", "expressions"):
                parts.setdefault(name, []).append(getattr(reading, name))
            if not isinstance(networks.arcface, Missing):  # it needs the landmarks, and has no use without them
                parts.setdefault("arcface", []).append(networks.arcface(some, reading.landmarks))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


class FeatureFiles:
    """Features of frames and images' distances, computed once for the same frames and networks and kept as files."""

    def __init__(self, folder: Path, networks: Networks):
        self.folder, self.networks = folder, networks
        self.networks_key = json.dumps(describe_networks(networks), sort_keys=True)

    def of_clip(self, clip: Clip) -> Features:
        """Of all true frames."""
        path = self.folder / "clips" / f"{clip.subject_id}.npz"
        images = clip.images(range(len(clip)))
        return self._kept(path, images, None)

    def of_frames(self, method: str, pair: Pair, frames: np.ndarray) -> Features:
        """Of a method's frames; of self-reenactment also `psnr`, `ssim` and `lpips` to the truth."""
        path = self.folder / method / pair.mode / f"{pair.name}.npz"
        return self._kept(path, frames, pair.driver.images(pair.rows) if pair.mode == "self" else None)

    def _kept(self, path: Path, images: np.ndarray, reference: np.ndarray | None) -> Features:
        key = hashlib.sha256(self.networks_key.encode())
        key.update(np.ascontiguousarray(images).tobytes())
        if reference is not None:
            key.update(reference.tobytes())
        found = _read_features(path, key.hexdigest())
        if found is not None:
            return found
        features = read_features(images, self.networks)
        if reference is not None:
            features |= image_distances(images, reference, self.networks)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            arrays: dict[str, Any] = features | {"key": np.array(key.hexdigest())}
            np.savez(file, **arrays)
        return features


def image_distances(frames: np.ndarray, reference: np.ndarray, networks: Networks) -> Features:
    """`psnr`, `ssim` and, if its network is there, `lpips` of every frame."""
    distances = {"psnr": metrics.psnr(frames, reference), "ssim": metrics.ssim(frames, reference)}
    if not isinstance(networks.lpips, Missing):
        parts = range(0, len(frames), IMAGES_AT_ONCE)
        some = [slice(start, start + IMAGES_AT_ONCE) for start in parts]
        distances["lpips"] = np.concatenate([networks.lpips(frames[part], reference[part]) for part in some])
    return distances


def frame_values(pair: Pair, frames: Features, source: Features, driver: Features) -> dict[str, np.ndarray]:
    """metric -> (N,), NaN where no face was found; `source` and `driver` are the features of all true frames of their clips.

    Motion (AKD, APD, AED) is compared with the driver's frame. The person (CLIP, CSIM) is compared with the true frame in
    self-reenactment, and with the source portrait in cross-reenactment, where there is none.
    """
    rows = np.array(pair.rows)
    values: Features = {name: frames[name] for name in ("psnr", "ssim", "lpips") if name in frames}
    for key, feature in (("clip", "clip"), ("csim", "arcface")):
        if feature in frames:
            person = driver[feature][rows] if pair.mode == "self" else np.repeat(source[feature][:1], len(rows), 0)
            values[key] = metrics.cosine_similarity(frames[feature], person)
    if "landmarks" in frames:
        to_512 = 512 / max(pair.driver.size)
        rotations = frames["rotations"], driver["rotations"][rows]
        values["akd"] = metrics.keypoint_distance(frames["landmarks"], driver["landmarks"][rows]) * to_512
        values["apd"] = metrics.pose_distance_euler(*rotations) * 1000
        values["apd_geodesic"] = np.degrees(metrics.pose_distance_geodesic(*rotations))
        values["aed"] = metrics.expression_distance(frames["expressions"], driver["expressions"][rows])
    return values


def faces_not_found(pair: Pair, frames: Features, driver: Features) -> dict[str, Any]:
    """In how many frames the detector found no face: of the method, and of the driver."""
    lost = {"frames": frames["landmarks"], "driver": driver["landmarks"][np.array(pair.rows)]}
    return {"of": len(pair.rows)} | {name: int(np.isnan(each).any((1, 2)).sum()) for name, each in lost.items()}


def resample(count: int, seed: int) -> np.ndarray:
    """(RESAMPLES, count) subjects drawn with replacement; the same draws for every method and metric."""
    return np.random.default_rng((seed, count)).integers(0, count, (RESAMPLES, count))


def mean_with_interval(per_pair: Sequence[np.ndarray], draws: np.ndarray) -> dict[str, Any]:
    """Mean over all frames that have a value, and its interval over subjects (None for a single one)."""
    sums = np.array([np.nansum(values) for values in per_pair])
    counts = np.array([np.count_nonzero(~np.isnan(values)) for values in per_pair])
    if counts.sum() == 0:
        return {"na": "no face was found in any frame"}
    weights = counts[draws].sum(1)
    # A draw of only subjects without a face says nothing.
    means = sums[draws].sum(1)[weights > 0] / weights[weights > 0]
    low, high = _interval(means) if len(per_pair) > 1 else (None, None)
    summary = {"value": float(sums.sum() / counts.sum()), "low": low, "high": high}
    return summary | {"frames": int(counts.sum()), "subjects": int(np.count_nonzero(counts))}


def fid_with_interval(made: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> dict[str, Any]:
    """FID of all frames against all real ones, and its interval over subjects by the jackknife, none for a single subject.

    Not a bootstrap: a resampled set repeats frames and is of fewer different ones, which raises FID by more than it varies.
    Leaving one subject out after the other repeats nothing.
    """
    value = metrics.frechet_distance(np.concatenate(made), np.concatenate(real))
    low, high, count = None, None, len(made)
    if count > 1:
        left_out = [[index for index in range(count) if index != left] for left in range(count)]
        without = np.array([
            metrics.frechet_distance(np.concatenate([made[i] for i in rest]), np.concatenate([real[i] for i in rest]))
            for rest in left_out
        ])  # fmt: skip
        reach = NORMAL_95 * float(np.sqrt((count - 1) * np.square(without - without.mean()).mean()))
        low, high = max(0.0, value - reach), value + reach
    summary = {"value": value, "low": low, "high": high, "frames": sum(map(len, made))}
    return summary | {"real_frames": sum(map(len, real)), "subjects": count}


def summarize(
    pairs: Sequence[Pair],
    frames: Sequence[Features],
    clips: Mapping[str, Features],
    missing: Mapping[str, str],
    seed: int,
) -> dict[str, Any]:
    """Everything the results say of one method in one mode; `frames` in the order of `pairs`, `clips` by subject."""
    mode, draws = pairs[0].mode, resample(len(pairs), seed)
    of = [(clips[pair.source.subject_id], clips[pair.driver.subject_id]) for pair in pairs]
    values = [frame_values(pair, own, *both) for pair, own, both in zip(pairs, frames, of)]
    table: dict[str, Any] = {}
    for metric in METRICS.values():
        if mode not in metric.modes:
            continue
        if metric.network is not None and metric.network in missing:
            table[metric.key] = {"na": missing[metric.network], "network": metric.network}
        elif metric.key == "fid":
            # Cross-reenactment has no true frames: the source's real ones show whom it should look like.
            real = [source["inception"][np.array(range(1, len(pair.source)))] for pair, (source, _) in zip(pairs, of)]
            table["fid"] = fid_with_interval([own["inception"] for own in frames], real)
        else:
            table[metric.key] = mean_with_interval([each[metric.key] for each in values], draws)
    per_pair = {
        pair.name: {
            "mean": {key: float(np.nanmean(v)) if (~np.isnan(v)).any() else None for key, v in each.items()},
            "frames": {key: v.tolist() for key, v in each.items()},
        }
        for pair, each in zip(pairs, values)
    }
    result = {"metrics": table, "num_frames": sum(len(pair.rows) for pair in pairs), "pairs": per_pair}
    if "face" not in missing:
        lost = [faces_not_found(pair, own, driver) for pair, own, (_, driver) in zip(pairs, frames, of)]
        result["faces_not_found"] = {key: sum(each[key] for each in lost) for key in ("frames", "driver", "of")}
    return result


def _interval(values: np.ndarray) -> tuple[float, float]:
    # Values that occur, not between them: between two infinite PSNR there is no number.
    tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    low, high = np.quantile(values, tails, method="inverted_cdf")
    return float(low), float(high)


def _read_features(path: Path, key: str) -> Features | None:
    """The arrays of a file of this key; None if it is of other frames or networks, or not whole."""
    try:
        arrays, _ = read_npz(path)
    except (OSError, ValueError):
        return None
    return arrays if str(arrays.pop("key", "")) == key else None
