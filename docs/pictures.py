"""Draws the picture of the way, for light and for dark pages: ``python docs/pictures.py``.

The two times in it are those of the search for twice the speed of ViT-B/16 in the committed
``speed.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
NETWORK, ROW = "ViT-B/16, batch 1, float32", "search 2 x"
# Okabe and Ito's blue and orange, which colour-blind readers tell apart, beside greys.
THEMES = {
    "light": {
        "ink": "#24292f",
        "soft": "#57606a",
        "kept": "#0072B2",
        "gone": "#9aa4af",
        "bar": "#D55E00",
    },
    "dark": {
        "ink": "#e6edf3",
        "soft": "#9198a1",
        "kept": "#56B4E9",
        "gone": "#5b6570",
        "bar": "#E69F00",
    },
}
CELL, GAP = 13, 2
HIDDEN = 8
KEPT = (0, 2, 3, 6)  # the units that stay: columns of the first kernel, rows of the second
PANELS = ("dense", "masks", "compact", "measured")
SAYS = (
    "fn(params, x)",
    "whole units that belong together",
    "the same function, certified",
    "on your device",
)
WIDTH, HEIGHT = 860, 220
LEFT = (28, 238, 448, 650)


def times() -> tuple[float, float]:
    """Returns milliseconds: of the dense network and of the one that the search found."""
    (path,) = RESULTS.glob("*/speed.json")
    rows = json.loads(path.read_text())["networks"][NETWORK]["rows"]
    return tuple(1e3 * rows[name]["median_seconds"] for name in ("dense", ROW))  # type: ignore[return-value]


def text(x: float, y: float, said: str, color: str, size: int = 13, weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{color}" font-size="{size}" font-weight="{weight}">'
        f"{said}</text>"
    )


def grid(
    x: float, y: float, rows: int, columns: int, gone: set[tuple[int, int]], theme: dict[str, str]
) -> str:
    step = CELL + GAP
    cells = []
    for i in range(rows):
        for j in range(columns):
            at = f'x="{x + j * step:g}" y="{y + i * step:g}" width="{CELL}" height="{CELL}" rx="2"'
            if (i, j) in gone:
                cells.append(
                    f'<rect {at} fill="none" stroke="{theme["gone"]}" stroke-dasharray="2 2"/>'
                )
            else:
                cells.append(f'<rect {at} fill="{theme["kept"]}"/>')
    return "".join(cells)


def kernels(x: float, removed: set[int], hidden: int, theme: dict[str, str]) -> str:
    """A kernel (4, hidden) above one (hidden, 3), the removed units empty in both."""
    up = {(i, j) for i in range(4) for j in removed}
    down = {(i, j) for i in removed for j in range(3)}
    first = grid(x, 58, 4, hidden, up, theme)
    right = x + hidden * (CELL + GAP) + 10
    return first + grid(right, 58, hidden, 3, down, theme)


def bars(x: float, theme: dict[str, str]) -> str:
    dense, small = times()
    scale = 120 / dense
    parts = []
    for y, name, ms, color in (
        (74, "dense", dense, theme["soft"]),
        (122, "compact", small, theme["bar"]),
    ):
        parts.append(text(x, y - 6, name, theme["ink"]))
        parts.append(
            f'<rect x="{x}" y="{y}" width="{ms * scale:.1f}" height="16" rx="2" fill="{color}"/>'
        )
        parts.append(text(x + ms * scale + 6, y + 13, f"{ms:.0f} ms", theme["ink"]))
    return "".join(parts) + text(
        x, 172, f"{NETWORK.partition(',')[0]}: {dense / small:.2f} x", theme["ink"], weight="600"
    )


def arrow(x: float, theme: dict[str, str]) -> str:
    line = f"M{x} 108h22m-6 -5l6 5l-6 5"
    return f'<path d="{line}" fill="none" stroke="{theme["soft"]}" stroke-width="1.6"/>'


def picture(theme: dict[str, str]) -> str:
    removed = set(range(HIDDEN)) - set(KEPT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" role="img">',
        f"<title>{', '.join(PANELS)}</title>",
    ]
    for x, name, said in zip(LEFT, PANELS, SAYS):
        parts.append(text(x, 24, name, theme["ink"], 16, "600"))
        parts.append(text(x, 42, said, theme["soft"], 12))
    parts += [
        kernels(LEFT[0], set(), HIDDEN, theme),
        kernels(LEFT[1], removed, HIDDEN, theme),
        kernels(LEFT[2], set(), len(KEPT), theme),
        bars(LEFT[3], theme),
        *(arrow(x - 29, theme) for x in LEFT[1:]),
        text(LEFT[0], 204, "two kernels, eight hidden units", theme["soft"], 12),
        text(LEFT[1], 204, "True = kept", theme["soft"], 12),
        text(LEFT[2], 204, "smaller dense kernels", theme["soft"], 12),
        text(LEFT[3], 204, "medians, interleaved", theme["soft"], 12),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def draw() -> dict[Path, str]:
    """Returns each file with what it should hold."""
    return {HERE / "_static" / f"way-{name}.svg": picture(theme) for name, theme in THEMES.items()}


if __name__ == "__main__":
    for path, drawn in draw().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(drawn)
