"""A page about a corpus, one HTML file that needs no other: its stats and their plot, portraits, licenses and consent."""

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from gaussian_tokenizer.corpus.corpus import Corpus, shards_of
from gaussian_tokenizer.corpus.options import count_of
from gaussian_tokenizer.corpus.stats import CorpusStats, plot_stats, stats_rows
from gaussian_tokenizer.tokenizer.image_files import open_image
from gaussian_tokenizer.utils.atomic import atomic_file
from gaussian_tokenizer.utils.templates import render_template

PORTRAITS, COLUMNS, PORTRAIT_SIZE = 48, 12, 96


def write_page(corpus: Corpus, stats: CorpusStats, path: str | os.PathLike) -> Path:
    """Write the page to `path`, or to `index.html` in that folder unless it is named `.html`; returns its path."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        path.mkdir(parents=True, exist_ok=True)
        path /= "index.html"
    portraits = dict(first_images(corpus, PORTRAITS))
    terms = {"license": stats.licenses, "consent": stats.consents}
    page = render_template(
        __package__,
        "page.html.j2",
        title=corpus.path.name,
        stats=stats_rows(stats),
        plot=base64.b64encode(plot_stats(stats)).decode(),
        portraits=list(portraits),
        contact_sheet=_contact_sheet(list(portraits.values())) if portraits else "",
        terms=[(kind, *each, count_of(n, "subject")) for kind, counts in terms.items() for *each, n in counts.items()],
    )
    with atomic_file(path) as file:
        file.write(page.encode())
    return path


def first_images(corpus: Corpus, count: int) -> Iterator[tuple[str, Image.Image]]:
    """(avatar_id, image) of the first frame of up to `count` avatars; only the row groups that hold them are read."""
    previous = None
    for shard in shards_of(corpus.manifest, "frames"):
        with corpus.open_shard(shard) as stream, pq.ParquetFile(stream) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["avatar_id"])["avatar_id"].to_pylist()
                rows = [row for row, (before, own) in enumerate(zip([previous, *ids], ids)) if before != own]
                previous = ids[-1]
                images = file.read_row_group(group, columns=["image"])["image"] if rows else []
                for row in rows[:count]:
                    yield ids[row], open_image(images[row].as_py()["bytes"])
                count -= len(rows)
                if count <= 0:
                    return


def _contact_sheet(images: list[Image.Image]) -> str:
    """Small images in rows, as PNG in base64."""
    size = PORTRAIT_SIZE
    sheet = Image.new("RGB", (size * min(COLUMNS, len(images)), size * -(-len(images) // COLUMNS)), "white")
    for number, image in enumerate(images):
        small = image.convert("RGBA")
        small.thumbnail((size, size))
        row, column = divmod(number, COLUMNS)
        sheet.paste(small, (column * size + (size - small.width) // 2, row * size + (size - small.height) // 2), small)
    stream = io.BytesIO()
    sheet.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()
