"""Matplotlib's figures as SVG that belongs to the page: its colours, its font, ids that no other figure has.

Colours are drawn as placeholders and written as the page's CSS variables, so that one drawing is right in light and
dark. Text stays text. The same figure gives the same bytes.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WIDTH = 4.6  # inches: 331 points, about the width of a phone, so that text stays as large as it is drawn
LONGEST = 18  # characters of a name in a plot
CROWDED = 30  # points of a line from which on they have no marks

# what matplotlib is told, and what the page calls it; series begin at C1
INK, SOFT, LINE, CARD = "#010101", "#020202", "#030303", "#040404"
COLOURS = ("#0a0101", "#0a0202", "#0a0303", "#0a0404", "#0a0505", "#0a0606")
_NAMES = {INK: "ink", SOFT: "soft", LINE: "line", CARD: "card"} | {c: f"c{n}" for n, c in enumerate(COLOURS, start=1)}
_THEME = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.5, "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "axes.labelsize": 10.5, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "legend.fontsize": 10, "legend.frameon": False, "legend.handlelength": 1.6, "legend.columnspacing": 1.2,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT,
    "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.grid": False, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "hatch.color": SOFT,
}  # fmt: skip


@contextmanager
def theme() -> Iterator[None]:
    """Draw inside it."""
    import matplotlib as mpl

    with mpl.rc_context(_THEME), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's font has it
        yield


def canvas(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of the page's width, so many inches high, and its axes."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def rounds_axis(axes: Any) -> None:
    """An axis of whole rounds."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y")


def legend_above(figure: Any, axes: Any, columns: int = 2) -> None:
    """The legend over the plot, where it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper left", ncols=columns)


def mark(points: int, shape: str = "o") -> str:
    """The mark of a line's points; many points have none."""
    return shape if points <= CROWDED else ""


def short(name: str, longest: int = LONGEST) -> str:
    """A name as it fits into a plot: on one line, without characters that cannot be seen, cut where it is long."""
    seen = "".join(" " if char.isspace() else char for char in name)
    seen = "".join(char for char in seen if unicodedata.category(char)[0] != "C").strip()
    return seen if len(seen) <= longest else seen[: longest - 1].rstrip() + "…"


def svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element.

    Args:
        name: other figures of the page have others; letters, digits and hyphens.
    """
    import matplotlib as mpl

    drawn = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    head, mark_, rest = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    text = f"<svg {box[0]} aria-hidden='true' stroke-linejoin='round'{mark_}{rest}"
    text = re.sub(r"font(-family)?: ([^;\"]*?)('?DejaVu Sans'?[^;\"]*)", _own_font, text)
    text = re.sub(r"#0[0-9a-f]{5}\b", lambda found: _variable(found[0]), text)
    return _own_ids(re.sub(r"\n\s*", "\n", text), name)


def _own_font(found: re.Match[str]) -> str:
    return f"font{found[1] or ''}: {found[2]}system-ui, sans-serif"


def _variable(colour: str) -> str:
    return f"var(--{_NAMES[colour]})" if colour in _NAMES else colour


def _own_ids(text: str, name: str) -> str:
    """Ids that nothing refers to go, the others get the figure's name before them."""
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    return re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', text)
