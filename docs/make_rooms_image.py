"""Draw `docs/images/rooms.svg`: the packages, their rooms, and the direction of imports.

    python docs/make_rooms_image.py --output docs/images/rooms.svg

The rooms and their order are the import-linter contracts of pyproject.toml, so the drawing shows what `make check` enforces.
"""

import argparse
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORIES = (("training", "eval"), ("modeling",), ("gaussian_tokenizer",))  # top to bottom
WIDTH, ROW, GAP, PADDING, TITLE = 1080, 30, 8, 14, 26  # pixels
FONT = "font-family='system-ui, sans-serif'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "rooms.svg")
    options = parser.parse_args()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {
        contract["containers"][0]: [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]
        for contract in contracts
        if "containers" in contract
    }
    parts, y = [], 0
    for packages in STORIES:
        height = max(TITLE + len(layers[name]) * (ROW + GAP) for name in packages) + PADDING
        width = (WIDTH - (len(packages) - 1) * PADDING) / len(packages)
        for index, name in enumerate(packages):
            parts += draw_package(name, layers[name], index * (width + PADDING), y, width, height)
        y += height + 3 * PADDING
        if packages != STORIES[-1]:
            parts.append(arrow(WIDTH / 2, y - 3 * PADDING + 4, y - 4, "imports"))
    options.output.write_text(
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='-1 -1 {WIDTH + 2} {y - 3 * PADDING + 2}' {FONT}>\n"
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0L8 4L0 8z' fill='#667'/></marker></defs>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def draw_package(name: str, rows: list[list[str]], x: float, y: float, width: float, height: float) -> list[str]:
    """A panel with its rooms, one layer a row; what is in one row does not import each other."""
    parts = [box(x, y, width, height, "#f4f5f8", "#aab"), text(x + PADDING, y + 18, f"{name}/", 14, weight=600)]
    parts.append(arrow(x + width - 16, y + TITLE + 4, y + height - PADDING))
    for number, rooms in enumerate(rows):
        top, room = y + TITLE + number * (ROW + GAP), (width - PADDING - 32 + GAP) / len(rooms)
        for index, title in enumerate(rooms):
            left = x + PADDING + index * room
            parts.append(box(left, top, room - GAP, ROW, "#ffffff", "#99a"))
            # Long names shrink to their box.
            size = min(12.0, (room - GAP - 6) / (0.58 * len(title)))
            parts.append(text(left + (room - GAP) / 2, top + 19, title, size, anchor="middle"))
    return parts


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str) -> str:
    return f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' rx='5' fill='{fill}' stroke='{stroke}'/>"


def text(x: float, y: float, content: str, size: float, anchor: str = "start", weight: int = 400) -> str:
    style = f"font-size='{size:.1f}' font-weight='{weight}' text-anchor='{anchor}' fill='#223'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{escape(content)}</text>"


def arrow(x: float, top: float, bottom: float, label: str = "") -> str:
    line = f"<line x1='{x:.1f}' y1='{top:.1f}' x2='{x:.1f}' y2='{bottom:.1f}' stroke='#667' marker-end='url(#tip)'/>"
    return line + (text(x + 10, (top + bottom) / 2 + 4, label, 12) if label else "")


if __name__ == "__main__":
    main()
