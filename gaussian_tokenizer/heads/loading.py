"""`load_head` opens every kind of head model."""

from pathlib import Path

from gaussian_tokenizer.heads.flame import read_flame
from gaussian_tokenizer.heads.head_model import HeadModel
from gaussian_tokenizer.heads.ict import read_ict
from gaussian_tokenizer.heads.procedural_head import build_procedural_head


def load_head(spec: str | Path) -> HeadModel:
    """The head model `spec` names.

    "procedural" or "procedural:600" (that many faces), a `.safetensors` file written by `HeadModel.save`, a FLAME
    `.pkl`, or an ICT-FaceKit folder.
    """
    kind, _, argument = str(spec).partition(":")
    if kind == "procedural":
        if argument and not argument.isdecimal():
            raise ValueError(f"head {str(spec)!r}: expected a number of faces after the colon, as in 'procedural:600'")
        return build_procedural_head(int(argument)) if argument else build_procedural_head()
    path = Path(spec)
    if path.is_dir():
        return read_ict(path)
    if path.suffix == ".safetensors":
        return HeadModel.load(path)
    if path.suffix == ".pkl":
        return read_flame(path)
    found = "a file of unknown kind" if path.exists() else "nothing there"
    raise ValueError(
        f"head {str(spec)!r}: {found}; expected 'procedural', 'procedural:N', a .safetensors file, "
        "a FLAME .pkl or an ICT-FaceKit folder"
    )


def built_in_head(name: str | None) -> HeadModel | None:
    """The built-in head that a file says it was made on, "procedural:600"; None if `name` is that of another head model."""
    return load_head(name) if name is not None and name.partition(":")[0] == "procedural" else None
