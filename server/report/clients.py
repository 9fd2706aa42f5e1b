"""What the clients hold: sizes of their shards and a heat map of client by label."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.report.page import Figure, Section, Table
from server.report.plots import CARD, COLOURS, INK, canvas, short, svg
from server.report.read import Run
from server.report.words import listed, many, share

MOST_CLIENTS, MOST_LABELS = 48, 20  # that can be told apart in a plot
TITLE = "The clients' shards"
Counts = NDArray[np.int64]


def shards(run: Run) -> Section:
    """Client by label, of all clients or of some that stand for them; or why nobody is told."""
    if run.shards is None or not run.shards[2].any():
        return Section(TITLE, [_why_not(run)])
    names, counts, sizes = run.shards
    shown = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[:MOST_LABELS])
    order = np.flatnonzero(sizes)
    every = len(order) <= MOST_CLIENTS
    if not every:
        by_size = order[np.argsort(sizes[order], kind="stable")]
        order = by_size[np.linspace(0, len(order) - 1, MOST_CLIENTS).round().astype(int)]
    common = [names[label] for label in shown]
    drawn = _draw(common, counts[np.ix_(order, shown)], sizes[order], order, every=every)
    note = "Above: examples of a client, held-out ones included. Below: the denser, the larger a label's share of them."
    if not every:
        note += (
            f" {MOST_CLIENTS} of {many(int((sizes > 0).sum()), 'client')} are drawn, evenly spaced from the smallest "
            "shard to the largest."
        )
    if len(shown) < len(names):
        rest = 1.0 - counts[:, shown].sum() / max(counts.sum(), 1)
        note += f" The {len(shown)} commonest of {len(names):,} labels are drawn; the others have {share(rest)}."
    rows = [(f"client {one}", *(f"{count:,}" for count in (*counts[one, shown], sizes[one]))) for one in order]
    table = Table("Private examples by client and label", ("", *common, "all"), rows)
    return Section(TITLE, [Figure(drawn, _words(counts, sizes), note, [table])])


def _why_not(run: Run) -> str:
    if run.key("privacy.unit", "none") != "none" or run.key("privacy.secure-aggregation", False):
        return "Not told: this run protects its clients, and what their shards hold is theirs."
    if run.key("data.private") == "at-clients":
        return "Not known: the private texts are with the clients, and the server never sees them."
    return "Not there: the run left no shards.json (it ended before its first round, or an earlier version wrote it)."


def _words(counts: Counts, sizes: Counts) -> str:
    there = counts[sizes > 0]
    held, top = sizes[sizes > 0], (there.max(axis=1) / sizes[sizes > 0])
    words = [
        f"{many(len(held), 'client')} hold {held.sum():,} private examples, {held.min():,} to {held.max():,} each, in "
        f"the median {np.median(held):,.0f}"
    ]
    words.append(f"a client's commonest label has {share(float(np.median(top)))} of its examples in the median")
    if alone := int(((there > 0).sum(axis=1) == 1)[top == 1.0].sum()):
        words.append(f"{many(alone, 'client')} {'has' if alone == 1 else 'have'} one label alone")
    if left := int((sizes == 0).sum()):
        words.append(f"{many(left, 'client')} without examples {'is' if left == 1 else 'are'} left out")
    return f"{listed(words)}."


def _draw(names: list[str], counts: Counts, sizes: Counts, order: Counts, *, every: bool) -> str:
    """Args: counts: (clients, labels) of what is shown; sizes: (clients,) of all."""
    from matplotlib.patches import Patch

    clients, labels = counts.shape
    figure, (above, below) = canvas(
        1.9 + 0.2 * max(labels, 3), 2, 1, sharex=True, height_ratios=(0.9, 0.2 * max(labels, 3))
    )
    shares = counts / sizes[:, None]
    most = float(shares.max()) or 1.0  # none, where no text has any of several labels
    above.bar(range(clients), sizes, 0.8, color=COLOURS[5])
    above.set_ylabel("examples")
    above.locator_params(axis="y", nbins=3)
    above.grid(axis="y")
    below.pcolormesh(
        np.arange(clients + 1) - 0.5,
        np.arange(labels + 1) - 0.5,
        _cells(shares / most),
        edgecolors=CARD,
        linewidth=0.5,
    )
    below.set_yticks(range(labels), [short(name, 16) for name in names])
    below.invert_yaxis()
    below.tick_params(length=0)
    below.spines[:].set_visible(False)
    _client_ticks(below, order, every=every)
    shades = [Patch(facecolor=(*_rgb(COLOURS[0]), part), edgecolor=INK, lw=0.4, label=f"{100 * part * most:.2g} %")
              for part in (0.0, 0.25, 0.5, 0.75, 1.0)]  # fmt: skip
    figure.legend(handles=shades, loc="outside lower left", ncols=5, handlelength=1, columnspacing=1)
    return svg(figure, "shards")


def _cells(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """(labels, clients, 4) one colour, the denser the larger the share: that is right on a light ground and a dark."""
    colours = np.empty((*shares.T.shape, 4))
    colours[..., :3], colours[..., 3] = _rgb(COLOURS[0]), shares.T
    return colours


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def _client_ticks(axes: Any, order: Counts, *, every: bool) -> None:
    if not every:
        axes.set_xticks([0, len(order) - 1], ["smallest", "largest"])
        axes.set_xlabel("clients by the size of their shards")
        return
    step = max(1, -(-len(order) // 16))
    places = range(0, len(order), step)
    axes.set_xticks(list(places), [str(order[place]) for place in places])
    axes.set_xlabel("client")
