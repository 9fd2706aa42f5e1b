"""The student's shape drawn against its teacher's: layers, heads, neurons and word pieces that are kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.report.page import Figure, Section, Table
from server.report.plots import COLOURS, INK, SOFT, canvas, svg
from server.report.read import Run
from server.report.words import number, share

TITLE = "The student's shape"
SQUARES = 16  # heads that can be drawn one by one


@dataclass(frozen=True)
class Model:
    """A model as it is drawn.

    Attributes:
        layers: of the teacher's (or of what the student is cut from) those that it has.
        heads: of each of them the numbers of the heads.
        hidden, rank: width of the word embedding, and of its factors; 0: it is one matrix.
    """

    name: str
    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    neurons: int
    pieces: int
    hidden: int
    rank: int
    params: int


def shape(run: Run) -> Section:
    """Drawn, and as a table; or why it is not there."""
    teacher, student = _models(run)
    if student is None:
        return Section(TITLE, ["Not there: the student's shape is told when a run ends."])
    if teacher is None:
        said = f"Of the teacher no shape is told: an earlier version wrote this run. {_words_alone(student)}."
        return Section(TITLE, [said, _table([student])])
    foreign = bool(run.key("student.model")) or max(student.layers) >= len(teacher.layers)
    note = "Squares are attention heads, bars the neurons of the feed-forward network, the block below the word pieces."
    note += (
        " What is left out is empty." if not foreign else " The student was cut from another model than the teacher."
    )
    if foreign:  # its heads have no place among the teacher's
        student = replace(student, heads=tuple(tuple(range(len(each))) for each in student.heads))
    words = _words_alone(student, teacher) if foreign else _words(teacher, student)
    figure = Figure(_draw(teacher, student, foreign=foreign), words, note, [_table([teacher, student])])
    return Section(TITLE, [figure])


def _models(run: Run) -> tuple[Model | None, Model | None]:
    found: list[Model | None] = []
    for name in ("teacher", "student"):
        about = run.summary.get(name, {})
        figures, kept = about.get("shape"), run.kept if name == "student" else {}
        if not figures or "hidden" not in figures:
            figures = figures and {**figures, "hidden": 0}
        found.append(_model(name, figures, kept, about["params"]) if figures else None)
    return found[0], found[1]


def _model(name: str, figures: dict[str, Any], kept: dict[str, Any], params: int) -> Model:
    layers = tuple(figures["layers"])
    heads = tuple(tuple(range(figures["heads"])) for _ in layers)
    if tuple(kept.get("layers", ())) == layers:
        heads = tuple(tuple(sorted(each)) for each in kept["heads"])
    sizes = {part: int(figures[part]) for part in ("neurons", "pieces", "hidden", "rank")}
    return Model(name, layers, heads, **sizes, params=params)


def _words(teacher: Model, student: Model) -> str:
    layers = ", ".join(map(str, student.layers))
    return (
        f"The student has {len(student.layers)} of {len(teacher.layers)} layers ({layers}), in each of them "
        f"{len(student.heads[0])} of {len(teacher.heads[0])} heads and {student.neurons:,} of {teacher.neurons:,} "
        f"neurons, and {student.pieces:,} of {teacher.pieces:,} word pieces{_rank(student)}: "
        f"{student.params:,} of {teacher.params:,} parameters, {share(student.params / teacher.params)}."
    )


def _words_alone(student: Model, teacher: Model | None = None) -> str:
    words = f"The student has {len(student.layers)} layers with {len(student.heads[0])} heads each"
    if teacher is None:
        return words
    return (
        f"{words}, {student.neurons:,} neurons in each, and {student.pieces:,} word pieces{_rank(student)}: "
        f"{student.params:,} parameters, {share(student.params / teacher.params)} of its teacher's {teacher.params:,}."
    )


def _rank(model: Model) -> str:
    return f" in an embedding of rank {model.rank:,}" if model.rank else ""


def _table(models: Sequence[Model]) -> Table:
    rows = [
        ("layers", *(", ".join(map(str, model.layers)) for model in models)),
        ("heads in each", *(number(len(model.heads[0])) for model in models)),
        ("neurons in each", *(number(model.neurons) for model in models)),
        ("word pieces", *(number(model.pieces) for model in models)),
        ("embedding", *(f"rank {model.rank}" if model.rank else "one matrix" for model in models)),
        ("parameters", *(number(model.params) for model in models)),
    ]
    return Table("Shapes", ("", *(model.name for model in models)), rows)


def _draw(teacher: Model, student: Model, *, foreign: bool) -> str:
    rows = max(len(teacher.layers), len(student.layers))
    tall = min(0.36, 9.0 / rows)
    figure, axes = canvas(tall * rows + 1.35)
    axes.set(xlim=(-0.12, 2.13), ylim=(-2.2, rows))
    axes.axis("off")
    for column, model in enumerate((teacher, student)):
        left, colour = column * 1.1, (COLOURS[5], COLOURS[0])[column]
        places = range(len(model.layers)) if foreign else model.layers
        have = dict(zip(places, model.heads, strict=True))
        for row in range(rows):
            width = model.neurons / max(teacher.neurons, student.neurons)
            _layer(axes, (left, row), have.get(row), max(len(teacher.heads[0]), len(model.heads[0])), width, colour)
        _words_block(axes, left, model, teacher, colour)
        axes.text(left, -1.75, f"{model.params:,} parameters", fontsize=10, va="center")
        axes.text(left, rows + 0.05, model.name, weight="bold", va="bottom")
    for row in range(rows):
        axes.text(-0.04, row + 0.45, str(row), ha="right", va="center", fontsize=9, color=SOFT)
    return svg(figure, "shape")


def _layer(  # noqa: PLR0917
    axes: Any, corner: tuple[float, float], heads: tuple[int, ...] | None, most: int, width: float, colour: str
) -> None:
    """One layer in a box of 1 x 0.9: heads above, neurons below; empty where the model does not have it."""
    from matplotlib.patches import Rectangle

    left, bottom = corner
    dashed: dict[str, Any] = {"facecolor": "none", "edgecolor": SOFT, "lw": 0.6}
    if heads is None:
        axes.add_patch(Rectangle((left, bottom + 0.05), 1, 0.8, linestyle="--", **dashed))
        return
    if most <= SQUARES:
        step = 1 / most
        for head in range(most):
            look: dict[str, Any] = {"facecolor": colour, "lw": 0} if head in heads else dashed
            axes.add_patch(Rectangle((left + head * step, bottom + 0.47), 0.84 * step, 0.38, **look))
    else:
        axes.add_patch(Rectangle((left, bottom + 0.47), 1, 0.38, **dashed))
        axes.add_patch(Rectangle((left, bottom + 0.47), len(heads) / most, 0.38, facecolor=colour, lw=0))
    axes.add_patch(Rectangle((left, bottom + 0.08), 1, 0.28, **dashed))
    axes.add_patch(Rectangle((left, bottom + 0.08), width, 0.28, facecolor=colour, lw=0, alpha=0.65))


def _words_block(axes: Any, left: float, model: Model, teacher: Model, colour: str) -> None:
    """The word embedding: as wide as it has pieces, as high as its matrix is wide."""
    from matplotlib.patches import Rectangle

    high = 0.8 * (model.rank / teacher.hidden if model.rank and teacher.hidden else 1.0)
    dashed: dict[str, Any] = {"facecolor": "none", "edgecolor": SOFT, "lw": 0.6}
    axes.add_patch(Rectangle((left, -1.05), 1, 0.8, **dashed))
    wide = min(model.pieces / max(teacher.pieces, 1), 1.0)
    axes.add_patch(Rectangle((left, -1.05), wide, high, facecolor=colour, lw=0, alpha=0.4))
    said = f"{model.pieces:,} word pieces" + (f", rank {model.rank}" if model.rank else "")
    axes.text(left, -1.32, said, fontsize=10, va="center", color=INK)
