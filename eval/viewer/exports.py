"""Files for the browser to save: PLY and `.splat` of the current pose, a zip of the whole avatar."""

import io
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gaussian_tokenizer.avatars.avatar import GaussianAvatar
from gaussian_tokenizer.avatars.export import save_splats
from gaussian_tokenizer.heads.head_parameters import HeadParameters


@torch.inference_mode()
def splat_bytes(avatar: GaussianAvatar, params: HeadParameters, suffix: str) -> bytes:
    """The Gaussians in the one frame of `params` as `.ply` or `.splat`; ImportError without gsplat."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"avatar{suffix}"
        save_splats(path, avatar.posed(params))
        return path.read_bytes()


def folder_bytes(avatar: GaussianAvatar, name: str) -> bytes:
    """A zip of the GaussianAvatars folder `name`, with the same bytes for the same avatar."""
    content = io.BytesIO()
    with TemporaryDirectory() as temporary, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        folder = Path(temporary) / name
        avatar.save(folder)
        for path in sorted(folder.rglob("*")):
            entry = zipfile.ZipInfo(str(path.relative_to(temporary)))  # dated 1980: no timestamp
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return content.getvalue()
