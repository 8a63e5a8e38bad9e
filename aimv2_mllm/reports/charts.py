"""The report's pictures as PNG files in memory: loss curves, bars of accuracy; colours and axes.

Figures are objects of their own (never pyplot's), so that nothing is left behind in a process.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Picture:
    """A PNG with its file name and what it shows; `dark` is the same on dark ground."""

    name: str
    alt: str
    png: bytes
    dark: bytes = b""

    @property
    def uri(self) -> str:
        """The picture itself as an address, so that a page needs no file beside it."""
        return _uri(self.png)

    @property
    def dark_uri(self) -> str:
        """The same on dark ground."""
        return _uri(self.dark or self.png)


class Palette(NamedTuple):
    """The colours of a picture on light or dark ground; `series` go from the model to controls."""

    ground: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]


LIGHT = Palette(
    "#ffffff", "#1f2733", "#697586", "#e7eaee", ("#2f6fb0", "#8fa4ba", "#bcc8d4", "#dfe5ea")
)
DARK = Palette(
    "#161b22", "#e3e8ee", "#93a0b0", "#2a323d", ("#6ea8e6", "#64778d", "#46536a", "#323c4a")
)

# A loss part -> its name and unit; the text part is a caption's in pre-training, else an answer's.
PARTS = {"image": ("pixel loss", "squared error"), "text": ("answer loss", "nats per token")}
CAPTION_PART = ("caption loss", "nats per token")


def loss_curves(lines: Sequence[Mapping[str, Any]], palette: Palette) -> bytes:
    """The training loss against samples, one panel for each part of it, as PNG.

    `lines` are a stage's `metrics.jsonl`.
    """
    # A part that is nothing throughout was not part of what was learned.
    parts = [part for part in PARTS if any(line.get(part) for line in lines)]
    names = PARTS | ({"text": CAPTION_PART} if "image" in lines[0] else {})
    figure = new_figure(3.9 * len(parts), 2.5, palette)
    for column, part in enumerate(parts):
        axes = figure.add_subplot(1, len(parts), column + 1)
        calm(axes, palette)
        samples = [line["samples"] for line in lines]
        axes.plot(
            samples, [line[part] for line in lines], color=palette.series[0], linewidth=1.6,
            marker="o" if len(lines) < 12 else "", markersize=3,
        )  # fmt: skip
        name, unit = names[part]
        axes.set_title(name, loc="left", fontsize=10, color=palette.ink)
        axes.set_xlabel("training samples", fontsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xlim(0, samples[-1])
        axes.set_ylim(0, 1.06 * max(line[part] for line in lines))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    return as_png(figure)


def accuracy_bars(
    series: Mapping[str, Mapping[str, float]],
    palette: Palette,
    *,
    label: str = "right answers, % of questions",
) -> bytes:
    """Horizontal bars of accuracy, 0 to 100 %, as PNG: a group for each kind of question.

    `series` are the model and its controls: name -> kind -> share of right answers.
    """
    assert len(series) <= len(palette.series), list(series)
    kinds = list(next(iter(series.values())))
    figure = new_figure(7.4, 0.7 + 0.56 * len(kinds), palette)
    axes = figure.add_subplot()
    calm(axes, palette)
    height = 0.8 / len(series)
    for row, ((name, shares), colour) in enumerate(zip(series.items(), palette.series)):  # noqa: B905
        places = np.arange(len(kinds)) + (row - (len(series) - 1) / 2) * height
        values = [100 * shares[kind] for kind in kinds]
        bars = axes.barh(places, values, height * 0.88, color=colour, label=name)
        is_model = row == 0
        axes.bar_label(
            bars, fmt="%.0f", padding=3, fontsize=8 if is_model else 6.5,
            color=palette.ink if is_model else palette.faint,
        )  # fmt: skip
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlim(0, 106)
    axes.set_xlabel(label, fontsize=8)
    axes.grid(visible=False, axis="y")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), frameon=False, fontsize=8,
        labelcolor=palette.ink, borderaxespad=0.2, handlelength=1.1, columnspacing=1.4,
    )  # fmt: skip
    return as_png(figure)


def picture(pixels: np.ndarray, least_side: int = 168) -> bytes:
    """An (H, W, 3) uint8 picture as PNG, its pixels enlarged until it has the side."""
    times = max(1, -(-least_side // pixels.shape[0]))
    large = pixels.repeat(times, axis=0).repeat(times, axis=1)
    stream = io.BytesIO()
    Image.fromarray(large).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def new_figure(width: float, height: float, palette: Palette) -> Figure:
    figure = Figure((width, height), dpi=DOTS_PER_INCH, facecolor=palette.ground)
    FigureCanvasAgg(figure)
    return figure


def calm(axes: Axes, palette: Palette) -> None:
    axes.set_facecolor(palette.ground)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(palette.grid)
    axes.grid(visible=True, axis="both", color=palette.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, colors=palette.faint, labelcolor=palette.faint)
    axes.xaxis.label.set_color(palette.faint)
    axes.yaxis.label.set_color(palette.faint)


def as_png(figure: Figure, *, as_laid_out: bool = False) -> bytes:
    if not as_laid_out:
        figure.tight_layout(pad=0.6, w_pad=2)
    stream = io.BytesIO()
    # Without the mark of the software, equal numbers give equal files.
    figure.savefig(
        stream,
        format="png",
        metadata={"Software": None},
        bbox_inches="tight" if as_laid_out else None,
    )
    return stream.getvalue()


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
