"""Draws the picture of the way: ``python docs/pictures.py``.

For light and for dark pages; in one row, and in two for narrow screens. The times in it are those
of the search for twice the speed of ViT-B/16 in the committed ``speed.json``.
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
    "units that belong together",
    "the same function, certified",
    "on your device",
)
BELOW = (
    "two kernels, 8 hidden units",
    "True = kept",
    "smaller dense kernels",
    "medians, interleaved",
)
# Where panels stand, and how large a picture is.
LAYOUTS = {
    "": (((28, 0), (238, 0), (448, 0), (650, 0)), 860, 220),
    "narrow-": (((30, 0), (238, 0), (30, 216), (238, 216)), 420, 432),
}


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


def kernels(removed: set[int], hidden: int, theme: dict[str, str]) -> str:
    """A kernel (4, hidden) above one (hidden, 3), the removed units empty in both."""
    up = {(i, j) for i in range(4) for j in removed}
    down = {(i, j) for i in removed for j in range(3)}
    right = hidden * (CELL + GAP) + 10
    return grid(0, 58, 4, hidden, up, theme) + grid(right, 58, hidden, 3, down, theme)


def bars(theme: dict[str, str]) -> str:
    dense, small = times()
    scale = 120 / dense
    parts = []
    for y, name, ms, color in (
        (74, "dense", dense, theme["soft"]),
        (122, "compact", small, theme["bar"]),
    ):
        parts.append(text(0, y - 6, name, theme["ink"]))
        parts.append(
            f'<rect x="0" y="{y}" width="{ms * scale:.1f}" height="16" rx="2" fill="{color}"/>'
        )
        parts.append(text(ms * scale + 6, y + 13, f"{ms:.0f} ms", theme["ink"]))
    said = f"{NETWORK.partition(',')[0]}: {dense / small:.2f} x"
    return "".join(parts) + text(0, 172, said, theme["ink"], weight="600")


def arrow(theme: dict[str, str]) -> str:
    """From the panel before."""
    line = "M-27 108h20m-6 -5l6 5l-6 5"
    return f'<path d="{line}" fill="none" stroke="{theme["soft"]}" stroke-width="1.6"/>'


def panels(theme: dict[str, str]) -> list[str]:
    removed = set(range(HIDDEN)) - set(KEPT)
    drawn = (
        kernels(set(), HIDDEN, theme),
        arrow(theme) + kernels(removed, HIDDEN, theme),
        arrow(theme) + kernels(set(), len(KEPT), theme),
        arrow(theme) + bars(theme),
    )
    return [
        text(0, 24, name, theme["ink"], 16, "600")
        + text(0, 42, said, theme["soft"])
        + shown
        + text(0, 204, below, theme["soft"])
        for name, said, shown, below in zip(PANELS, SAYS, drawn, BELOW)
    ]


def picture(theme: dict[str, str], layout: str) -> str:
    places, width, height = LAYOUTS[layout]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="system-ui, sans-serif" role="img">',
        f"<title>{', '.join(PANELS)}</title>",
        *(f'<g transform="translate({x} {y})">{panel}</g>'
          for (x, y), panel in zip(places, panels(theme))),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def draw() -> dict[Path, str]:
    """Returns each file with what it should hold."""
    return {
        HERE / "_static" / f"way-{layout}{name}.svg": picture(theme, layout)
        for layout in LAYOUTS
        for name, theme in THEMES.items()
    }


if __name__ == "__main__":
    for path, drawn in draw().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(drawn)
