"""Inversion: what the server gets back of a client's text from its update, and which defence stops which attack.

    rows      pieces from the word embedding's rows, see `embedding_rows`     recall of different pieces
    longest   length of the longest text from the position embedding's rows   share of victims whose it is
    labels    counts of the classes from the head's bias, see `label_counts`  share of examples counted right
    span      pieces in the span of the first layer's gradients, see `span`   recall of different pieces
    tag, lamp texts whose gradient is like the client's, see `matching`       ROUGE-L

As the federation is configured, rows is tried on round 1: by the server, and by whoever sees the student that is
released (`as_configured`). With ``grid`` each attack is tried in settings that differ from one step of SGD on one
example (FedSGD, the server's best case) in one thing or two: more examples, more steps, AdamW, frozen embeddings,
bfloat16, clipping, noise, a sum of several clients. A figure is the mean over victims. Its chance is what a guess from
public text alone reaches, see `reconstruction`; an attack that finds nothing answers with that guess.

Papers: https://arxiv.org/abs/2205.08514 (rows), https://arxiv.org/abs/2105.09369 (labels),
https://arxiv.org/abs/2405.15586 (span), https://arxiv.org/abs/2103.06819 (tag) and https://arxiv.org/abs/2202.08827
(lamp).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.corpus import labelled
from common.errors import InputError
from common.objective import Examples
from common.progress import Progress
from common.seeding import generator
from common.tokens import Tokens
from simulations.audits.as_configured import pieces_of_clients
from simulations.audits.attack import Row
from simulations.audits.embedding_rows import found_pieces, longest_text
from simulations.audits.inversion_table import MEASURES, Found, summed, summed_up, verdicts
from simulations.audits.label_counts import Signals, count_labels, head_bias, label_error, shared_out, signals_of
from simulations.audits.language import Bigrams
from simulations.audits.matching import Match, ends_of, search
from simulations.audits.reconstruction import Judge
from simulations.audits.span import distances, pieces_in, span_of, text_in
from simulations.audits.victim import Seen, Setting, Victims
from simulations.laboratory import Laboratory

MATCHING = ("tag", "lamp")
SAMPLE = 512  # public examples that the head's signals are learnt from
GRID = (
    Setting(),
    Setting(examples=4),
    Setting(examples=16),
    Setting(steps=8),
    Setting(optimizer="adamw"),
    Setting(optimizer="adamw", steps=8, examples=16),
    Setting(embeddings="frozen"),
    Setting(embeddings="frozen", optimizer="adamw"),
    Setting(precision="bf16"),
    Setting(clip=0.1),
    Setting(clip=0.1, noise=0.001),
    Setting(clip=0.1, noise=0.01),
    Setting(clip=0.1, noise=1.0),
    Setting(clip=0.1, noise=1.0, embeddings="frozen"),
    Setting(cohort=4),
    Setting(cohort=4, clip=0.1, noise=1.0),
)
MATCHED = (Setting(embeddings="frozen"), Setting(), Setting(embeddings="frozen", optimizer="adamw"), GRID[10])


@dataclass(frozen=True)
class Inversion:
    """Attacks on single updates.

    Attributes:
        grid: try all attacks in all settings as well; these are the same whatever defences are configured.
        methods: of the grid, comma between; all: every one.
        victims: clients that are attacked in each setting.
        matched: victims of tag and lamp, which take long; they are tried in the settings of `MATCHED`.
        steps, sweeps: of their searches, see `matching`.
        sgd_lr: learning rate of an SGD step.
        tolerance: of a span check, how far outside a piece may be, as a share of its norm.
        show: put the private text and what was found of it into the rows: for public or made-up text alone.
    """

    name: ClassVar[str] = "inversion"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.15586"

    grid: bool = False
    methods: str = "all"
    victims: int = 3
    matched: int = 1
    steps: int = 100
    sweeps: int = 6
    sgd_lr: float = 0.1
    tolerance: float = 0.01
    show: bool = False

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        """A row for each method and setting."""
        methods = self._methods()
        bench = Bench(self, lab)
        yield from bench.configured()
        work = [
            (method, setting)
            for setting in GRID * self.grid
            for method in methods
            if method not in MATCHING or (setting in MATCHED and self.matched)
        ]
        if self.show and self.grid:
            progress.line("inversion.show: the rows hold private text")
        rows: list[Row] = []
        with progress.step("inversion", len(work)) as step:
            for method, setting in work:
                step.info(f"{method}: {setting}")
                clients = bench.victims.clients(self.matched if method in MATCHING else self.victims)
                if method in MATCHING and not bench.single:
                    row = summed_up(method, setting, ()) | {"note": "it looks for texts of one part and one window"}
                else:
                    row = summed_up(method, setting, [bench.attack(method, setting, client) for client in clients])
                rows.append(row)
                yield row
                step.advance()
        for line in verdicts(rows) if rows else ():
            progress.line(line)

    def _methods(self) -> list[str]:
        asked = list(MEASURES) if self.methods == "all" else [one.strip() for one in self.methods.split(",")]
        wrong = [one for one in asked if one not in MEASURES]
        if wrong:
            raise InputError(f"inversion.methods: no {wrong[0]!r}; give all, or some of {', '.join(MEASURES)}")
        if self.victims < 1 or min(self.steps, self.sweeps, self.matched) < 0 or self.sgd_lr <= 0:
            raise InputError("inversion: victims from 1, steps, sweeps and matched from 0, sgd_lr above 0")
        return asked


@dataclass
class Bench:
    """The attacks, and what they know of the public."""

    options: Inversion
    lab: Laboratory
    victims: Victims = field(init=False)
    judge: Judge = field(init=False)
    updates: dict[tuple[Setting, int], Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.victims = Victims(self.lab, self.options.sgd_lr)
        self.public = np.asarray(self.lab.data.public)
        if not len(self.public):
            raise InputError("data.public-fraction: inversion is held against guesses from public text; give some")
        self.judge = Judge(self.victims.tokenizer, self.victims.special, self.victims.tokens, self.public)
        self.ordinary = np.setdiff1d(np.arange(len(self.victims.tokenizer)), self.victims.special)
        pairs, tokens = len(self.lab.data.task.text_columns) > 1, self.victims.tokens
        kinds = getattr(self.lab.federation.student.config, "type_vocab_size", 1) if tokens.typed else 1
        self.types, self.single = 2 if pairs and kinds > 1 else 1, not pairs and tokens.first is None
        self.longest = int(widest(self.victims.tokens, self.public).max())

    def configured(self) -> Iterator[Row]:
        """Rows of the federation as it is configured."""
        kind = "trained" if self.lab.config.student.train_embeddings else "frozen"
        model = self.victims.students[kind].model
        for who, found in pieces_of_clients(self.lab, model, self.judge, self.victims.special, self.options.victims):
            yield {
                "variant": f"rows: {who}",
                **summed(found, "set_recall", "recall of pieces"),
                "method": "rows",
                "setting": "as configured",
                "embeddings": kind,
            }

    @cached_property
    def prior(self) -> Bigrams:
        return Bigrams.of(self.victims.tokens, self.public, len(self.victims.tokenizer))

    @cached_property
    def asked(self) -> NDArray[np.int64]:
        """Some public rows that have a label."""
        known = self.public[labelled(np.asarray(self.victims.data.train.labels[self.public]))]
        return generator(self.lab.config.seed, "public signals").permutation(known)[:SAMPLE]

    def attack(self, method: str, setting: Setting, client: int) -> Found:
        """Figures of one method on one client; with `show` the texts as well."""
        if (setting, client) not in self.updates:
            if setting not in {one for one, _ in self.updates}:
                self.updates.clear()  # an update is as large as the model
            self.updates[setting, client] = self.victims.seen(setting, client)
        seen, rows = self.updates[setting, client], self.victims.rows(client, setting.examples)
        truth = self.judge.texts(rows)
        if method == "longest":
            return self._longest(seen, rows)
        if method == "labels":
            return self._labels(seen, rows)
        texts = {"rows": self._rows, "span": self._span}.get(method, self._matched)(method, seen, truth)
        if texts is None:
            usual = self.judge.usual(setting.examples)
            return self.judge.of_tokens(usual, truth) | {"nothing": 1.0}
        if method == "rows" or (method == "span" and seen.texts > 1):
            figures: Found = self.judge.of_tokens(texts[0], truth)
        else:
            figures = self.judge.of_texts(texts, truth)
        if self.options.show:
            figures = figures | {"private": _shown(self.judge, truth), "recovered": _shown(self.judge, texts)}
        return figures

    def _rows(self, method: str, seen: Seen, truth: Any) -> list[list[int]] | None:
        found = found_pieces(seen.model, seen.update, self.victims.special)
        return None if found is None or not len(found) else [found.tolist()]

    def _span(self, method: str, seen: Seen, truth: Any) -> list[list[int]] | None:
        span = span_of(seen, 0)
        if span is None or span.full or not span.basis.shape[1]:
            return None
        pieces = np.arange(len(self.victims.tokenizer))
        distance = distances(seen.model, span, pieces, self.longest, seen.compute, types=self.types)
        inside = (text_in if seen.texts == 1 else pieces_in)(distance, pieces, self.options.tolerance)
        text = [int(piece) for piece in inside if piece not in self.victims.special]
        return [text] if text else None

    def _matched(self, method: str, seen: Seen, truth: Sequence[Sequence[int]]) -> list[list[int]] | None:
        """Of texts as long as the longest; pieces whose rows have moved are the only ones tried."""
        known = found_pieces(seen.model, seen.update, self.victims.special)
        pieces = self.ordinary if known is None or not len(known) else known
        match = Match.of(seen, pieces, *ends_of(self.victims.tokenizer))
        return search(
            match, max(map(len, truth)), self.prior if method == "lamp" else None, steps=self.options.steps,
            sweeps=self.options.sweeps, rng=generator(self.lab.config.seed, "matching"),
        )  # fmt: skip

    def _longest(self, seen: Seen, rows: NDArray[np.int64]) -> Found:
        guess, chance = likeliest_longest(widest(self.victims.tokens, self.public), len(rows))
        truth = int(widest(self.victims.tokens, rows).max())
        found = longest_text(seen.model, seen.update)
        nothing = found is None or not found
        return {
            "right": float((guess if nothing else found) == truth),
            "guess_right": chance,
            "nothing": float(nothing),
        }

    def _labels(self, seen: Seen, rows: NDArray[np.int64]) -> Found:
        task, bias = self.lab.data.task, head_bias(seen.model, seen.update)
        if task.regression or task.multi_label or not bias:
            return {"right": None, "guess_right": None}
        data = self.victims.data.train
        if not len(self.asked) or not labelled(np.asarray(data.labels[rows])).all():  # nothing to count
            return {"right": None, "guess_right": None}
        truth = np.bincount(np.asarray(data.labels[rows]), minlength=task.num_labels)
        soft = self.lab.worker.teacher_logits(self.asked)
        signals = signals_of(seen.model, Examples(data, self.asked, soft), seen.recipe, seen.compute)
        known = Signals.of(signals, np.asarray(data.labels[self.asked]), task.num_labels)
        found = count_labels(seen.gradient(bias).numpy(), len(rows), known)
        guess = shared_out(known.shares, len(rows))
        return {"right": 1.0 - label_error(found, truth), "guess_right": 1.0 - label_error(guess, truth)}


def widest(tokens: Tokens, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(len(rows),) word pieces of each row's longest window."""
    return np.asarray(tokens.lengths(rows) // tokens.windows(rows)[1])


def likeliest_longest(lengths: NDArray[np.int64], texts: int) -> tuple[int, float]:
    """The likeliest length of the longest of so many texts that are drawn from some, and how likely it is."""
    values, counts = np.unique(lengths, return_counts=True)
    chances = np.diff((np.cumsum(counts) / len(lengths)) ** texts, prepend=0.0)
    return int(values[chances.argmax()]), float(chances.max())


def _shown(judge: Judge, texts: Sequence[Sequence[int]]) -> str:
    return " / ".join(judge.written(text) for text in texts)
