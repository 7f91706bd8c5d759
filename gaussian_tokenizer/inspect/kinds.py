"""The kinds of files and folders that `inspect` knows: how each is recognized, and a function that fills a `Report`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.avatar_files import METADATA_NAME, PARAMETERS_NAME, PLY_NAME
from gaussian_tokenizer.captures.checks import Problem, find_problems, warning
from gaussian_tokenizer.captures.frame import has_alpha, load_image
from gaussian_tokenizer.captures.loading import EXPECTED, read_tracking, recognize
from gaussian_tokenizer.captures.subject import Subject, shared_ids
from gaussian_tokenizer.captures.tracking import Tracking
from gaussian_tokenizer.captures.transforms_json import CANONICAL_NAME
from gaussian_tokenizer.corpus.corpus import MANIFEST_NAME, load_corpus, shards_of
from gaussian_tokenizer.corpus.schema import CONFIGURATIONS
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.head_parameters import HeadParameters
from gaussian_tokenizer.heads.ict import NEUTRAL
from gaussian_tokenizer.heads.loading import built_in_head, load_head
from gaussian_tokenizer.inspect.splats import compressed_ply_facts, ply_kind, splat_facts, world_ply_facts
from gaussian_tokenizer.utils.json_files import read_json

TRACKINGS = {
    "vhap": "a VHAP dataset folder of several cameras",
    "monocular": "a VHAP dataset folder of one camera",
    "union": "a UNION of VHAP dataset folders",
    "vhap_raw": "VHAP's raw tracking",
    "pixel3dmm": "a Pixel3DMM tracking",
}
VIEWERS = "open it in a splat viewer; docs/animation.md says which open what"


@dataclass
class Report:
    """What `inspect` found."""

    path: Path
    what: str
    facts: dict[str, Any] = field(default_factory=dict)  # plain JSON values
    problems: list[Problem] = field(default_factory=list)
    next: list[str] = field(default_factory=list)  # commands that show more, or use it
    tracking: Tracking | None = None
    head: HeadModel | None = None

    @property
    def has_errors(self) -> bool:
        return any(problem.is_error for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        problems = [{"text": each.text, "severity": "error" if each.is_error else "warning"} for each in self.problems]
        return {"path": str(self.path), "what": self.what, **self.facts, "problems": problems, "next": self.next}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.what}"]
        lines += [f"  {name:<14}{_readable(value)}" for name, value in self.facts.items()]
        lines += [f"  {'ERROR' if each.is_error else 'warning'}: {each.text}" for each in self.problems]
        lines += [] if self.problems else ["  nothing wrong found"]
        return "\n".join([*lines, *(f"  next: {each}" for each in self.next)])


# Fills the report, with the head model that the user gave; an error it raises is one more problem.
Describe = Callable[[Report, HeadModel | None], None]
Kind = tuple[Describe, str, list[str]]  # with the name of the kind, and commands that show more


def kind_of(path: Path) -> Kind:
    if recognize(path) is not None:
        return _tracking, "a tracking", []
    if path.is_file():
        return _kind_of_file(path)
    ict = "a head model, ICT-FaceKit"
    kinds: tuple[tuple[str, Describe, str, str, str], ...] = (
        ("pipeline.json", _pipeline, "an avatar pipeline", "AvatarPipeline.from_pretrained", "docs/pipeline.md"),
        ("config.json", _model, "a model", "AutoModel.from_pretrained", "docs/model.md and docs/decoder.md"),
        ("processor_config.json", _tokenizer, "a tokenizer", "GaussianTokenizer.from_pretrained", "docs/tokenizer.md"),
        (NEUTRAL, _head, ict, "load_head", "docs/heads.md"),
        (f"FaceXModel/{NEUTRAL}", _head, ict, "load_head", "docs/heads.md"),
    )
    if (path / MANIFEST_NAME).is_file():
        return _corpus, "a corpus", [f"python -m gaussian_tokenizer.build_corpus validate {path}"]
    for name, describe, what, function, page in kinds:
        if (path / name).is_file():
            return describe, what, [f"{function}('{path}'), see {page}"]
    if _has_avatar(path):
        return _avatar, "a GaussianAvatars result folder", [_animate(path)]
    if _subjects_in(path):
        commands = (f"inspect {path}/<one>", f"build_corpus --avatars {path} --help")
        return _many, "a folder of subjects", [f"python -m gaussian_tokenizer.{command}" for command in commands]
    return _unknown, "a folder", []


def _kind_of_file(path: Path) -> Kind:
    head = f"load_head('{path}'), see docs/heads.md"
    if path.suffix == ".npz":
        return _motion, "head parameters", [f"python -m gaussian_tokenizer.animate --motion {path} --help"]
    if path.suffix == ".ply":
        return _kind_of_ply(path)
    if path.suffix == ".splat":
        return _splats(splat_facts), "world-space Gaussians in antimatter15's .splat", [VIEWERS]
    if path.suffix == ".pkl":
        return _head, "a head model, FLAME", [head]
    if path.suffix != ".safetensors":
        return _unknown, "a file", []
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.metadata() or {}
    except SafetensorError:
        return _weights, "a damaged safetensors file", []
    if "head_model" in keys:
        return _head, "a head model", [head]
    if "gaussian_avatar" in keys:
        return _avatar, "an avatar", [_animate(path)]
    return _weights, "weights of a model", [f"python -m gaussian_tokenizer.inspect {path.parent}"]


def _kind_of_ply(path: Path) -> Kind:
    kind = ply_kind(path)
    if kind == "compressed":
        return _splats(compressed_ply_facts), "world-space Gaussians in SuperSplat's compressed PLY", [VIEWERS]
    if kind == "bound":
        return _avatar, "a PLY of Gaussians", [_animate(path)]
    return _splats(world_ply_facts), "a PLY of world-space Gaussians, for splat viewers", [VIEWERS]


def _animate(path: Path) -> str:
    return f"python -m gaussian_tokenizer.animate --avatar {path} --help"


def _splats(facts: Callable[[Path], dict[str, Any]]) -> Describe:
    return lambda report, head: report.facts.update(facts(report.path))


def _subjects_in(path: Path) -> list[Path]:
    folders = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    return [each for each in folders if recognize(each) is not None or _has_avatar(each)]


# ---- descriptions


def _tracking(report: Report, head: HeadModel | None) -> None:
    path, facts = report.path, report.facts
    metadata = read_json(path / METADATA_NAME) if (path / METADATA_NAME).is_file() else {}
    made_on = str(metadata.get("head_name", ""))
    head = report.head = head or built_in_head(made_on)
    tracking = report.tracking = read_tracking(path, head)
    params, timesteps = tracking.params, tracking.timesteps
    report.what = TRACKINGS[tracking.kind]
    terms = {key: metadata.get(key, "unknown") for key in ("license", "consent")}
    facts["subject"] = {"id": tracking.subject_id, **terms}
    if tracking.frames:
        facts |= _facts_of_frames(tracking)
    facts["timesteps"] = {"count": len(timesteps), "first": timesteps[0], "last": timesteps[-1]}
    if tracking.kind == "union":
        facts["sequences"] = tracking.metadata["sequences"]
    facts["splits"] = {name: len(rows) for name, rows in tracking.splits.items()}
    facts["head"] = {"name": made_on or (head.name if head else "unknown"), **_sizes(params)}
    unchecked = "no head model given, so cameras and masks were not compared with the head; give --head"
    report.problems += [warning(unchecked)] if head is None else find_problems(tracking, head)
    if tracking.kind in ("vhap", "monocular", "union") and not (path / CANONICAL_NAME).is_file():
        report.problems.append(warning(f"has no {CANONICAL_NAME}, by which GaussianAvatars recognizes such a folder"))
    if not report.has_errors:
        script = "accelerate launch training/fit_avatars.py training/configs/fit_demo.yaml"
        spec = made_on if made_on.startswith("procedural") else "HEAD"
        report.next = [f"{script} --data {path} --head {spec} --output_dir avatars"]
    if _has_avatar(path):
        facts["avatar"] = {"gaussians": len(GaussianAvatar.load(path, head=head))}


def _facts_of_frames(tracking: Tracking) -> dict[str, Any]:
    frames = tracking.frames
    heads = [tracking.params.translation[tracking.row(frame)].double().numpy() for frame in frames]
    positions = [np.linalg.inv(frame.viewmat)[:3, 3] for frame in frames]
    return {
        "images": {
            "count": len(frames),
            "size": list(dict.fromkeys(f"{frame.width}x{frame.height}" for frame in frames)),
            "alpha": has_alpha(load_image(frames[0].image)),
            "masks": sum(frame.mask is not None for frame in frames),
        },
        "cameras": {
            "count": len({frame.camera for frame in frames}),
            "focal_pixels": _range([frame.fx for frame in frames]),
            "meters_from_the_head": _range([float(np.linalg.norm(a - b)) for a, b in zip(positions, heads)]),
        },
    }


def _avatar(report: Report, head: HeadModel | None) -> None:
    avatar = GaussianAvatar.load(report.path, head=head)
    _, occupied = avatar.faces.unique(return_counts=True)  # bincount needs memory up to the largest index
    report.facts["gaussians"] = {"count": len(avatar), "sh_degree": avatar.sh_degree}
    if avatar.folder_sh_degree is not None:
        report.facts["gaussians"]["sh_degree_of_the_file"] = avatar.folder_sh_degree
    report.facts["faces"] = {
        "occupied": len(occupied),
        "points_on_one": f"{int(occupied.min())} to {int(occupied.max())}, median {int(occupied.median())}",
    }
    report.facts["head"] = {"name": avatar.head_name or "unknown"} | (_sizes(avatar.params) if avatar.params else {})
    if avatar.params is not None:
        report.facts["frames"] = avatar.params.num_frames
    elif report.path.is_dir():
        report.problems.append(warning(f"has no {PARAMETERS_NAME}, so the shape of the head is unknown"))


def _many(report: Report, head: HeadModel | None) -> None:
    folders = _subjects_in(report.path)
    ids = []
    for folder in folders:
        try:
            ids.append((Subject.open(folder).avatar_id, folder.name))
        except ValueError as error:
            report.problems.append(Problem(str(error)))
    for avatar_id, names in shared_ids(ids).items():
        text = f"{', '.join(names)} have one id, {avatar_id!r}; give each its own in {METADATA_NAME}"
        report.problems.append(Problem(text))
    forms = Counter(form for folder in folders if (form := recognize(folder)) is not None)
    report.facts["folders"] = len(folders)
    report.facts["avatars"] = sum(_has_avatar(folder) for folder in folders)
    report.facts["trackings"] = {"count": sum(forms.values()), **forms}


def _motion(report: Report, head: HeadModel | None) -> None:
    params = HeadParameters.load(report.path)
    report.facts["frames"] = params.num_frames
    report.facts["head"] = _sizes(params)
    if head is not None:
        head.check(params)


def _head(report: Report, head: HeadModel | None) -> None:
    model = load_head(report.path)
    report.facts["name"], report.facts["hash"] = model.name, model.hash
    report.facts["mesh"] = {"vertices": model.n_vertices, "faces": model.n_faces}
    report.facts["parameters"] = {"shape": model.n_shape, "expressions": model.n_expression}
    report.facts["regions"] = sorted(model.regions)


def _corpus(report: Report, head: HeadModel | None) -> None:
    corpus = load_corpus(report.path)
    for configuration in CONFIGURATIONS:
        shards = {split: shards_of(corpus.manifest, configuration, split) for split in corpus.splits}
        rows = {split: sum(shard["rows"] for shard in own) for split, own in shards.items() if own}
        report.facts[configuration] = {"shards": sum(map(len, shards.values())), **rows}
    tokenizer = corpus.tokenizer
    report.facts["tokenizer"] = {name: getattr(tokenizer, name) for name in ("n_bins", "n_faces", "token_order")}


def _pipeline(report: Report, head: HeadModel | None) -> None:
    components = read_json(report.path / "pipeline.json").get("components", [])
    if not isinstance(components, list):
        raise ValueError(f"components in pipeline.json are {components!r}, expected a list of folder names")
    report.facts["components"] = components
    report.problems += [Problem(f"lacks {each}/") for each in components if not (report.path / str(each)).is_dir()]


def _model(report: Report, head: HeadModel | None) -> None:
    config = read_json(report.path / "config.json")
    report.facts["model_type"] = config.get("model_type", "unknown")
    weights = sorted(report.path.glob("*.safetensors"))
    size = sum(each.stat().st_size for each in weights)
    report.facts["weights"] = {"files": len(weights), "megabytes": round(size / 1e6, 1)}
    if not weights:
        report.problems.append(Problem("has a config.json, but no weights (*.safetensors)"))


def _tokenizer(report: Report, head: HeadModel | None) -> None:
    config = read_json(report.path / "processor_config.json")
    report.facts["settings"] = {key: config.get(key) for key in ("processor_class", "n_bins", "n_faces")}


def _weights(report: Report, head: HeadModel | None) -> None:
    with safe_open(report.path, framework="pt") as file:
        report.facts["tensors"] = len(list(file.keys()))


def _unknown(report: Report, head: HeadModel | None) -> None:
    raise ValueError(
        f"nothing this toolkit knows; expected {EXPECTED}, an avatar, a folder of these, a corpus, a model, a pipeline, "
        "head parameters (.npz) or a head model"
    )


# ---- helpers


def _has_avatar(path: Path) -> bool:
    return (path / PLY_NAME).is_file() or any(path.glob(f"point_cloud/iteration_*/{PLY_NAME}"))


def _sizes(params: HeadParameters) -> dict[str, Any]:
    offsets = [name for name in ("static_offset", "dynamic_offset") if name in params.tensors()]
    return {"shape": len(params.shape), "expressions": params.expr.shape[1], "offsets": offsets or "none"}


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_readable(each)}" for key, each in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
