"""The dataset card of a corpus, `templates/card.md.j2` with a YAML header that names files, columns and row counts."""

from collections import Counter
from typing import Any

import yaml
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from gaussian_tokenizer.captures.subject import About
from gaussian_tokenizer.corpus.corpus import shards_of
from gaussian_tokenizer.corpus.sources import SubjectSummary
from gaussian_tokenizer.tokenizer.point_codec import PointCodec
from gaussian_tokenizer.utils.templates import render_template

# Licenses that the Hub knows by their lower-case name; anything else is "other".
HUB_LICENSES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
LISTED_SUBJECTS = 100
SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (float("inf"), "n>1M"))


def card_text(
    manifest: dict[str, Any], subjects: list[SubjectSummary], features: dict[str, Features], tokenizer: PointCodec
) -> str:
    """The content of README.md; `features` are the columns of each configuration."""
    settings, splits = manifest["tokenizer"], manifest["splits"]
    subjects = sorted(subjects, key=lambda subject: subject.avatar_id)
    counts = ("subjects", "frames", "num_points", "num_tokens")
    return render_template(
        __package__,
        "card.md.j2",
        header=yaml.safe_dump(_header(manifest, subjects, features), sort_keys=False, allow_unicode=True),
        slots=tokenizer.slots,
        axis_order=tokenizer.axis_order,
        head=manifest["head"],
        tokenizer=settings,
        bounds=[[round(edge, 4) for edge in corner] for corner in settings["bounds"]],
        num_out_of_bounds=sum(split["num_out_of_bounds"] for split in splits.values()),
        splits=[[name, *(f"{split[count]:,}" for count in counts)] for name, split in splits.items()],
        about=list(About._fields),
        groups=[[*about, count] for about, count in sorted(Counter(subject.about for subject in subjects).items())],
        num_subjects=len(subjects),
        listed=[[each.avatar_id, *each.about, f"{each.num_points:,}"] for each in subjects[:LISTED_SUBJECTS]],
        unknown=[subject.avatar_id for subject in subjects if subject.about.missing],
        max_listed=LISTED_SUBJECTS,
        skipped=[[entry["folder"], entry["reason"]] for entry in manifest["skipped"]],
    )


def _header(manifest: dict[str, Any], subjects: list[SubjectSummary], features: dict[str, Features]) -> dict[str, Any]:
    licenses = {subject.about.license.lower() for subject in subjects}
    configs: list[dict[str, Any]] = []
    infos = DatasetInfosDict()
    for configuration, columns in features.items():
        splits, files = SplitDict(dataset_name="corpus"), []
        for split in manifest["splits"]:
            if shards := shards_of(manifest, configuration, split):
                rows, size = (sum(shard[what] for shard in shards) for what in ("rows", "bytes"))
                splits.add(SplitInfo(split, num_bytes=size, num_examples=rows))
                files.append({"split": split, "path": f"{configuration}/{split}-*.parquet"})
        if files:
            size = sum(info.num_bytes for info in splits.values())
            infos[configuration] = DatasetInfo(features=columns, splits=splits, download_size=size, dataset_size=size)
            configs.append({"config_name": configuration, "data_files": files})
    card = DatasetCardData(
        license=licenses.pop() if len(licenses) == 1 and licenses <= {*HUB_LICENSES} else "other",
        tags=["gaussian-splatting", "head-avatars", "3d", "avatar-pointillist"],
        size_categories=next(name for limit, name in SIZES if len(subjects) < limit),
        configs=[{**configs[0], "default": True}, *configs[1:]],
    )
    infos.to_dataset_card_data(card)
    return card.to_dict()
