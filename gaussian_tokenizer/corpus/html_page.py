"""A page about a corpus, one HTML file that needs no other: figures, their image, portraits, licenses and consent."""

import base64
import html
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from gaussian_tokenizer.corpus.corpus import Corpus
from gaussian_tokenizer.corpus.stats import Statistics, statistics_plot, statistics_rows
from gaussian_tokenizer.tokenizer.image_files import open_image
from gaussian_tokenizer.utils.atomic import atomic_file

PORTRAITS, COLUMNS, PORTRAIT_SIZE = 48, 12, 96
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}h1,td,p{overflow-wrap:anywhere}"
    "td,th{text-align:left;padding:.2em 1.5em .2em 0;vertical-align:top}th{font-weight:normal;color:#666}"
    "img{max-width:100%}"
)


def write_page(corpus: Corpus, figures: Statistics, path: str | os.PathLike) -> Path:
    """Write the page to `path`, or to `index.html` in it if that is no name of an HTML file; returns where it is."""
    path, name = Path(path), corpus.path.name
    if path.suffix.lower() not in (".html", ".htm"):
        path.mkdir(parents=True, exist_ok=True)
        path /= "index.html"
    parts = [f"<h1>{html.escape(name)}</h1>", _table(statistics_rows(figures))]
    parts += [_image(statistics_plot(figures), "statistics")]
    portraits = list(first_images(corpus, PORTRAITS))
    if portraits:
        parts += ["<h2>Portraits</h2>", _image(_contact_sheet([image for _, image in portraits]), "portraits")]
        parts += [f"<p>The first image of {html.escape(', '.join(avatar_id for avatar_id, _ in portraits))}.</p>"]
    parts += ["<h2>License and consent</h2>", _licenses(figures)]
    page = (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    )
    page += f"<title>{html.escape(name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    with atomic_file(path) as file:
        file.write(page.encode())
    return path


def first_images(corpus: Corpus, count: int) -> Iterator[tuple[str, Image.Image]]:
    """(avatar_id, image) of the first frame of so many avatars; only the row groups they lie in are read."""
    previous = None
    for shard in corpus.manifest["shards"]:
        if shard["configuration"] != "frames":
            continue
        with corpus.files.open(shard["file"]) as stream, pq.ParquetFile(stream) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["avatar_id"])["avatar_id"].to_pylist()
                rows = [row for row, avatar_id in enumerate(ids) if avatar_id != (ids[row - 1] if row else previous)]
                previous = ids[-1]
                if rows:
                    images = file.read_row_group(group, columns=["image"])["image"]
                    for row in rows[:count]:
                        yield ids[row], open_image(images[row].as_py()["bytes"])
                count -= len(rows)
                if count <= 0:
                    return


def _contact_sheet(images: list[Image.Image]) -> bytes:
    size = PORTRAIT_SIZE
    sheet = Image.new("RGB", (size * min(COLUMNS, len(images)), size * -(-len(images) // COLUMNS)), "white")
    for number, image in enumerate(images):
        small = image.convert("RGBA")
        small.thumbnail((size, size))
        row, column = divmod(number, COLUMNS)
        sheet.paste(small, (column * size + (size - small.width) // 2, row * size + (size - small.height) // 2), small)
    stream = io.BytesIO()
    sheet.save(stream, format="PNG")
    return stream.getvalue()


def _licenses(figures: Statistics) -> str:
    rows = [("license", name, f"{count:,} subjects") for name, count in figures.licenses.items()]
    rows += [("consent", name, f"{count:,} subjects") for name, count in figures.consents.items()]
    return _table(rows)


def _table(rows: Iterable[Sequence[str]]) -> str:
    lines = ("".join(f"<{'td' if i else 'th'}>{html.escape(cell)}" for i, cell in enumerate(row)) for row in rows)
    return f"<table><tr>{'<tr>'.join(lines)}</table>"


def _image(data: bytes, name: str) -> str:
    return f"<p><img alt='{name}' src='data:image/png;base64,{base64.b64encode(data).decode()}'></p>"
