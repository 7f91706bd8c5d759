"""The configs that come with the toolkit, found by name wherever it is installed."""

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def find_config(name: str) -> Path:
    """The YAML file at the path `name`, or the toolkit's config of that name: `debug` is training/configs/debug.yaml.

    Raises `FileNotFoundError` that lists the names where there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name not in shipped:
        raise FileNotFoundError(f"{name}: no such config file; give a path, or a name of {', '.join(shipped)}")
    return shipped[name]
