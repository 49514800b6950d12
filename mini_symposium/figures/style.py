"""The look of all figures, and `Picture`: a matplotlib figure that is saved together with the numbers it draws.

The rules:

- the same numbers give the same bytes, so that a figure changes in git only when a result did;
- each picture names its scale and says what to look at;
- `matplotlib.figure.Figure`, never pyplot: its global state breaks when a widget draws from another thread.
"""

import io
import textwrap
import warnings
from pathlib import Path

import pandas as pd
from matplotlib import patheffects, style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mini_symposium.files.writing import written_whole

SCALES = {
    "tiny": "tiny: random weights",
    "proxy": "proxy: SmolLM2-135M",
    "gemma-3-270m": "base: Gemma-3-270M",
    "Qwen2.5-Coder-0.5B-Instruct": "half: Qwen2.5-Coder-0.5B",
    "Qwen2.5-Coder-1.5B-Instruct": "large: Qwen2.5-Coder-1.5B",
    "paper": "paper: Mistral-7B",
}
"""{scale of a recipe: its name in pictures}, by size."""
RATES_DO_NOT_TRANSFER = {"proxy": " (learning rates do not transfer to 7B)"}

INK, GREY, PALE = "#222222", "#5c5c5c", "#dddddd"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito: safe for colour-blind eyes
LINES = ("-", (0, (7, 2)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5)), (0, (3, 1.5, 1, 1.5)))
SHAPES = ("o", "s", "^", "D", "v")
"""Line style and marker beside each of COLOURS: a reader who sees grey still tells learning rates apart."""
COLOUR_MAP = "viridis"
WIDTH, DPI = 9.0, 150  # inches; 1350 pixels, so that 10 points are still 13 pixels in a README 830 pixels wide
HALO = [patheffects.withStroke(linewidth=3, foreground="white")]
"""Path effects that keep a text readable where it crosses lines or dots."""

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same on every machine
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a dataset may contain "$5"
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": "#ececec",
    "legend.frameon": False,
}


def styled():
    """Context of matplotlib's defaults and STYLE, without the user's matplotlibrc.

    Needed while a picture is made, and again while it is rendered, because ticks are made only then.
    """
    return style.context(["default", STYLE])


class Picture(Figure):
    """A Figure that shows itself in a notebook without pyplot and is saved with the numbers that it draws."""

    drawn: pd.DataFrame
    """The numbers drawn, a row for each mark."""

    def png(self) -> bytes:
        """The PNG file: the same bytes each time, without a date or a version.

        A character that the font lacks is drawn as a box, without a warning.
        """
        with styled(), io.BytesIO() as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            self.draw_without_rendering()
            # A second layout would start from the positions of the first and end elsewhere.
            self.set_layout_engine("none")
            for axes in self.axes:
                # The layout solver's last bits differ between processes; they could move an edge to the next pixel.
                axes.set_position([round(bound, 6) for bound in axes.get_position(original=True).bounds])
            self.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
            return file.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict]:
        return self.png(), {"width": round(WIDTH * 100)}

    def save(self, path: str | Path) -> "Picture":
        """Write `path`.png, and `path`.csv with the numbers drawn; return the picture, so that a notebook shows it.

        If drawing fails, both files stay as they were. Raises an InputError if the directory cannot be written.
        """
        with written_whole(f"{path}.csv") as csv, written_whole(f"{path}.png") as png:
            self.drawn.to_csv(csv, index=False, float_format="%.6g", lineterminator="\n", encoding="utf-8")
            png.write_bytes(self.png())
        return self


def as_written(value: float) -> float:
    """`value` rounded as the csv rounds it, so that a picture redrawn from its csv has the same bytes.

    >>> as_written(2 / 3)
    0.666667
    """
    return float(f"{value:.6g}")


def scientific(value: float) -> str:
    """`value` in short scientific notation.

    >>> [scientific(x) for x in (1e-4, 2.5e-5, 0.0038999)]
    ['1e-4', '2.5e-5', '3.9e-3']
    """
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def short(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters, cut between words.

    >>> short("Why is the sky blue,\\nand not violet?", 24)
    'Why is the sky blue, …'
    """
    line = " ".join(text.split())
    if len(line) > width:
        line = textwrap.shorten(line, width, placeholder=" …") if " " in line[:width] else line[: width - 1] + "…"
    return line


def titled(height: float, title: str, scale: str, caption: str, rates: bool = True) -> Picture:
    """An empty picture with its heading: the title, then the scale and what to look at.

    The axes below the heading are `height` inches high. If learning `rates` are shown, the proxy's heading adds that
    they do not transfer.
    """
    scale_name = SCALES.get(scale, scale) + (RATES_DO_NOT_TRANSFER.get(scale, "") if rates else "")
    lines = textwrap.wrap(f"{scale_name}. {caption}", 118)
    total = height + 0.42 + 0.18 * len(lines)
    figure = Picture(figsize=(WIDTH, total), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(rect=(0.005, 0.01, 0.99, height / total - 0.01), w_pad=0.06, wspace=0.03)
    figure.text(0.1 / WIDTH, 1 - 0.1 / total, title, va="top", weight="bold", size=12)
    figure.text(0.1 / WIDTH, 1 - 0.36 / total, "\n".join(lines), va="top", color=GREY, size=9.5, linespacing=1.25)
    return figure


def log_axis(axes) -> None:
    """Make the x axis logarithmic, with a tick for each decade, written as learning rates are."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: scientific(x)))
    axes.xaxis.set_minor_locator(NullLocator())


def name_rows(axes, at, names, size: float = 10) -> None:
    """Name the row at each y position, with the first row on top and without an axis line."""
    axes.set_yticks(at, names, color=INK, fontsize=size)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_inverted(True)
