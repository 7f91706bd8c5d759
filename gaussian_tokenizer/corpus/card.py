"""The dataset card of a corpus: what the Hub and `load_dataset` read, and what a person should know of the persons in it.

The YAML header names the files of both configurations, their columns and row counts; the text says how to open the
corpus, what its columns mean, and under which license and with whose consent each subject is in it.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from gaussian_tokenizer.corpus.corpus import CONFIGURATIONS, shards_of
from gaussian_tokenizer.corpus.planning import unknown
from gaussian_tokenizer.corpus.schema import avatars_features, frames_features
from gaussian_tokenizer.corpus.sources import ABOUT, SubjectSummary
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.tokenizer.processing_gaussian_tokenizer import GaussianTokenizer
from gaussian_tokenizer.utils.atomic import atomic_file

# Of the licenses subjects give to captures; the Hub knows each under the lower-case name, anything else is "other".
HUB_LICENSES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
LISTED_SUBJECTS = 100


def write_card(
    path: Path,
    manifest: dict[str, Any],
    subjects: list[SubjectSummary],
    tokenizer: GaussianTokenizer,
    head: HeadModel,
    static_offset: bool,
) -> None:
    """Write README.md, atomically."""
    features = {"avatars": avatars_features(tokenizer, head, static_offset), "frames": frames_features(head)}
    header = yaml.safe_dump(_header(manifest, subjects, features), sort_keys=False, allow_unicode=True)
    with atomic_file(path) as file:
        file.write(f"---\n{header}---\n\n{_text(manifest, subjects, tokenizer.axis_order)}".encode())


def _header(manifest: dict[str, Any], subjects: list[SubjectSummary], features: dict[str, Features]) -> dict[str, Any]:
    licenses = {subject.about[ABOUT.index("license")].lower() for subject in subjects}
    license = next(iter(licenses)) if len(licenses) == 1 else "other"
    configs: list[dict[str, Any]] = []
    infos = DatasetInfosDict()
    for configuration in CONFIGURATIONS:
        splits, files = SplitDict(dataset_name="corpus"), []
        for split in manifest["splits"]:
            shards = shards_of(manifest, configuration, split)
            if shards:
                rows, size = (sum(shard[what] for shard in shards) for what in ("rows", "bytes"))
                splits.add(SplitInfo(split, num_bytes=size, num_examples=rows))
                files.append({"split": split, "path": f"{configuration}/{split}-*.parquet"})
        if files:
            size = sum(info.num_bytes for info in splits.values())
            infos[configuration] = DatasetInfo(
                features=features[configuration], splits=splits, download_size=size, dataset_size=size
            )
            configs.append({"config_name": configuration, "data_files": files})
    card = DatasetCardData(
        license=license if license in HUB_LICENSES else "other",
        tags=["gaussian-splatting", "head-avatars", "3d", "avatar-pointillist"],
        size_categories=_size_category(len(subjects)),
        configs=[{**configs[0], "default": True}, *configs[1:]],
    )
    infos.to_dataset_card_data(card)
    return card.to_dict()


def _text(manifest: dict[str, Any], subjects: list[SubjectSummary], axis_order: str) -> str:
    head, tokenizer = manifest["head"], manifest["tokenizer"]
    lo, hi = ([round(edge, 4) for edge in corner] for corner in tokenizer["bounds"])
    splits = [
        [name, *(f"{counts[what]:,}" for what in ("subjects", "frames", "num_points", "num_tokens"))]
        for name, counts in manifest["splits"].items()
    ]
    outside = sum(counts["num_out_of_bounds"] for counts in manifest["splits"].values())
    groups = Counter(subject.about for subject in subjects)
    listed = [
        [subject.avatar_id, *subject.about, f"{subject.num_points:,}"]
        for subject in sorted(subjects, key=lambda subject: subject.avatar_id)[:LISTED_SUBJECTS]
    ]
    more = len(subjects) - len(listed)
    without = sorted(subject.avatar_id for subject in subjects if unknown(subject))
    skipped = [[entry["folder"], entry["reason"]] for entry in manifest["skipped"]]
    parts = [
        "# Corpus of tokenized Gaussian head avatars",
        "Each subject is a cloud of Gaussians, every one anchored to a face of a head model, written as a sequence of "
        f"tokens `x y z face` a point, sorted by the bins of {', '.join(axis_order)} and the face.",
        "```python\nfrom datasets import load_dataset\n\n"
        'avatars = load_dataset("path/or/repository", "avatars", split="train")\n'
        'frames = load_dataset("path/or/repository", "frames", split="train", streaming=True)\n```',
        f"Head model: {head['name']} (hash {head['hash']}, {head['n_vertices']:,} vertices, {head['n_faces']:,} faces). "
        f"Tokenizer (in `tokenizer/`): {tokenizer['n_bins']} bins an axis between {lo} and {hi} m, "
        f"{tokenizer['vocab_size']:,} ids; {outside:,} points lay outside and were moved to the border.",
        _table(["split", "subjects", "frames", "points", "tokens"], splits),
        "## Columns",
        "`avatars`: `avatar_id`; `input_ids`; `num_points`; `num_out_of_bounds`; `points_per_face` (entry k: how many "
        "faces have k points); head parameters of the first frame (`shape`, `expr`, `rotation`, `neck_pose`, "
        "`jaw_pose`, `eyes_pose`: axis-angle in radians; `translation` and, where subjects have it, `static_offset`: "
        "meters); `head_vertices` and `head_normals` of the canonical head (own shape, no expression, no pose; "
        "meters); `license`, `consent`, `metadata` (JSON) and `split`.",
        "`frames`: `avatar_id`, `timestep`, `camera`, `image`; `fx`, `fy`, `cx`, `cy` in pixels from the upper left "
        "corner, `width`, `height`; `viewmat`, world-to-camera with OpenCV axes (x right, y down, z forward), meters; "
        "head parameters of the frame. Shape and static offset are the subject's.",
        "## License and consent",
        "The subjects are subjects, or made to look like subjects: use them only as their license and their consent allow. "
        "No subject is in two splits.",
        _table([*ABOUT, "subjects"], [[*about, str(count)] for about, count in sorted(groups.items())]),
        "## Subjects",
        _table(["avatar_id", *ABOUT, "points"], listed)
        + (f"\n\n... and {more:,} more; see the columns of `avatars`." if more else ""),
    ]
    if without:
        names = ", ".join(without[:LISTED_SUBJECTS]) + (", ..." if len(without) > LISTED_SUBJECTS else "")
        parts += [
            "## Unknown license or consent",
            f"For {len(without):,} subjects it is not known under which license or with whose consent they are in here: "
            f"{names}. Find out before you use or pass on this corpus.",
        ]
    if skipped:
        parts += ["## Left out", _table(["folder", "reason"], skipped)]
    return "\n\n".join(parts) + "\n"


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def _size_category(count: int) -> str:
    for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M")):
        if count < limit:
            return name
    return "n>1M"
