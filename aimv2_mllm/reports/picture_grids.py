"""Grids of pictures as PNG files in memory: what was shown, seen in it, and painted."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from aimv2_mllm.evaluation.answers import is_exact_caption
from aimv2_mllm.evaluation.summary import Painting
from aimv2_mllm.reports.charts import LIGHT, as_png, new_figure


def sheet_grid(paintings: Sequence[Painting]) -> bytes:
    """The paintings side by side as PNG: original, features, prefix, painted, caption below."""
    rows = ("original", "features", "prefix", "painted")
    figure = new_figure(1.5 * len(paintings) + 0.7, 7.5, LIGHT)
    grid = figure.add_gridspec(
        4, len(paintings), left=0.7 / (1.5 * len(paintings) + 0.7), right=0.995, top=0.99,
        bottom=0.19, wspace=0.07, hspace=0.05,
    )  # fmt: skip
    for column, painting in enumerate(paintings):
        pictures = (painting.original, painting.features, painting.shown, painting.painted)
        for row, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(LIGHT.grid)
            if column == 0:
                axes.set_ylabel(rows[row], fontsize=10, color=LIGHT.faint, labelpad=6)
        right = is_exact_caption(painting.caption, painting.sheet)
        words = "\n".join(textwrap.wrap(_printable(painting.caption), 24)[:7])
        axes.text(
            0, -0.07, f"{'✓' if right else '✗'} {words}", transform=axes.transAxes, va="top",
            fontsize=7.8, linespacing=1.35, color=LIGHT.ink if right else "#b3362b",
            parse_math=False,
        )  # fmt: skip
    return as_png(figure, as_laid_out=True)


def dream_grid(
    original: np.ndarray,
    features: np.ndarray,
    columns: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    words: tuple[str, str],
) -> bytes:
    """A dream as PNG: the original above its features; what each prefix showed above what was
    painted; under all the words, a caption and a note.

    `columns` are (title, shown, painted), a column for each prefix.
    """
    pairs = [("original", original, "features", features)]
    pairs += [(title, shown, "painted", painted) for title, shown, painted in columns]
    width = 2.3 * len(pairs) + 0.1
    lines = textwrap.wrap(_printable(words[0]), round(15 * width))[:8]
    notes = textwrap.wrap(words[1], round(16 * width))
    words_height = 0.25 + 0.19 * len(lines) + 0.16 * len(notes)
    figure = new_figure(width, 5.0 + words_height, LIGHT)
    grid = figure.add_gridspec(
        2, len(pairs), left=0.01, right=0.99, top=0.955, wspace=0.04, hspace=0.1,
        bottom=words_height / (5.0 + words_height),
    )  # fmt: skip
    for column, (above, first, below, second) in enumerate(pairs):
        _tile(figure.add_subplot(grid[0, column]), first, above)
        _tile(figure.add_subplot(grid[1, column]), second, below)
    bottom = (words_height - 0.15) / (5.0 + words_height)
    style: dict[str, Any] = {"va": "top", "linespacing": 1.35, "parse_math": False}
    text = figure.text(0.01, bottom, "\n".join(lines), fontsize=10, color=LIGHT.ink, **style)
    figure.canvas.draw()
    end = text.get_window_extent().y0 / figure.bbox.height
    figure.text(0.01, end - 0.015, "\n".join(notes), fontsize=8, color=LIGHT.faint, **style)
    return as_png(figure, as_laid_out=True)


def feature_grid(entries: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> bytes:
    """Pictures above their features as PNG; `entries` are (title, picture, features)."""
    figure = new_figure(1.7 * len(entries), 3.75, LIGHT)
    grid = figure.add_gridspec(
        2, len(entries), left=0.005, right=0.995, top=0.93, bottom=0.005, wspace=0.04, hspace=0.03
    )
    for column, (title, picture, features) in enumerate(entries):
        _tile(figure.add_subplot(grid[0, column]), picture, title)
        _tile(figure.add_subplot(grid[1, column]), features, "")
    return as_png(figure, as_laid_out=True)


def _tile(axes: Axes, picture: np.ndarray, title: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(LIGHT.grid)
    axes.set_title(
        textwrap.shorten(title, 30, placeholder=" …"), loc="left", fontsize=9, color=LIGHT.faint,
        pad=4, parse_math=False,
    )  # fmt: skip


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() and c != "\ufffd" else "·" for c in text)
