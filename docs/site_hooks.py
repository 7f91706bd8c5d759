"""The pages of the site that lie outside docs/: the repository's own files, under the links that GitHub follows too.

mkdocs looks into docs/ alone. Here CHANGELOG.md, CONTRIBUTING.md, RELEASE.md and the results of the benchmarks join the site at its
root, and links between the two places (`../CHANGELOG.md`, `docs/log.md`) lose their folder.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "RELEASE.md"),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))),
)


def on_files(files, config):
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    return re.sub(r"\]\((?:\.\./|docs/)", "](", markdown)
