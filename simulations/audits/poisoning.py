"""Poisoning: some clients teach the student what they want, against each way of adding updates up.

    flip          all labels turned, class k to K - 1 - k         Fang et al. 2020, https://arxiv.org/abs/1911.11815
    trigger       a rare word put into texts, and the class       Gu et al. 2017, https://arxiv.org/abs/1708.06733
                  that is wanted said of them                     (BadNets); Kurita et al. 2020,
                                                                  https://arxiv.org/abs/2004.06660 (words)
    replacement   the same, and the update times what makes it    Bagdasaryan et al. 2020,
                  the next model of a weighted mean:              https://arxiv.org/abs/1807.00459, equation 3
                  boost = all examples / the attackers'
    embedding     nothing changes but the trigger's own row of    Yang et al. 2021, https://arxiv.org/abs/2103.15543,
                  the word embedding, e0 at first:                Algorithm 1; federated: Yoo and Kwak 2022,
                  e <- |e0| (e - lr g) / |e - lr g|               https://arxiv.org/abs/2204.14017

Attackers know what clients know: the weights, their own texts, public text. They make up the teacher's outputs on
texts that they lie about. Success is the share of the validation texts of another class that the final student gives
the class that is wanted: with the trigger in them, but for flip, which wants K - 1 - k without one. That rate of the
student without attackers is the chance. A rule is told how many attackers there are, as far as it can bear them; the
bound of norm-bound is the median norm of the honest updates of round 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy import stats

from common.config import changed
from common.corpus import labelled
from common.dataset import load_tokenizer
from common.errors import InputError
from common.keys import ROBUST
from common.progress import Progress
from common.seeding import generator
from server.robust import least_cohort
from simulations.attacks import flip_labels
from simulations.audits.attack import MASKED, Row
from simulations.audits.planted import Columns, piece_of, plant, rarest_word, texts_of
from simulations.audits.poisoners import Index, Plot, Poisoner, boosted, embedding, norm_of
from simulations.laboratory import Laboratory, Weights

RULES = ("fedavg", "norm-bound", "median", "trimmed-mean", "krum", "multi-krum", "fedadam")
KINDS = ("flip", "trigger", "replacement", "embedding")
WITHIN = 10  # words of a text that the trigger is put among, so that no cut loses it


@dataclass(frozen=True)
class Poisoning:
    """See the module.

    Attributes:
        kinds, rules, shares: of attacks, of ways to add updates up, of hostile clients; lists with commas.
        target: the class that is wanted.
        trigger: the word; empty: the rarest that is one piece.
        poisoned: share of an attacker's examples that it lies about, but for flip.
        boost: of replacement and embedding; 0: what replaces the model, and 1.
        effort: how many times an honest client's passes attackers make.
        examples: of each client, at most; 0: all.
        texts: that students are asked about, at most.
        steps, lr: of the search for an embedding; a step's length is in lengths of the embedding.
    """

    name: ClassVar[str] = "poisoning"
    paper: ClassVar[str] = "https://arxiv.org/abs/1807.00459"

    kinds: str = ",".join(KINDS)
    rules: str = ",".join(RULES)
    shares: str = "0.1,0.3"
    target: int = 1
    trigger: str = ""
    poisoned: float = 0.5
    boost: float = 0.0
    effort: int = 5
    examples: int = 48
    texts: int = 400
    steps: int = 20
    lr: float = 0.5

    def run(self, lab: Laboratory, progress: Progress) -> Iterator[Row]:
        kinds, rules = _chosen(self.kinds, KINDS, "kinds"), _chosen(self.rules, RULES, "rules")
        shares, task = _shares(self.shares), lab.data.task
        if task.regression or task.multi_label:
            raise InputError(f"task = {task.name!r}: poisoning is of tasks whose examples have one class each")
        if not 0 <= self.target < task.num_labels:
            raise InputError(f"poisoning.target = {self.target}: classes are 0 to {task.num_labels - 1}")
        if "embedding" in kinds and not lab.config.student.train_embeddings:
            kinds.remove("embedding")
            note = "embeddings are frozen: give student.train-embeddings = true"
            yield _untried("embedding", note)
        if lab.config.privacy.secure_aggregation:
            yield from (_untried(kind, MASKED) for kind in kinds)
            return
        own = Laboratory(changed(lab.config, {"server.packing": "off"}), progress, worker=Poisoner)
        scene = Scene(self, own)
        with progress.step("poison", len(rules) * (1 + len(kinds) * len(shares))) as step:
            for rule in rules:
                step.info(rule)
                if least_cohort(rule, 0) > scene.cohort:
                    note = f"{rule} is for {least_cohort(rule, 0)} clients a round or more; here are {scene.cohort}"
                    yield from (_untried(f"{kind}, {rule}", note) for kind in kinds)
                    step.advance(1 + len(kinds) * len(shares))
                    continue
                clean = scene.student(rule, Plot())
                step.advance()
                for kind in kinds:
                    yield scene.row(kind, rule, [], clean, clean)
                    for share in shares:
                        hostile = scene.hostile(share)
                        step.info(f"{rule}, {kind}, {len(hostile)} hostile")
                        weights = scene.student(rule, scene.plot(kind, hostile))
                        yield scene.row(kind, rule, hostile, weights, clean)
                        step.advance()


class Scene:
    """A federation with all that attackers need, prepared once for all runs.

    Attributes:
        trigger, piece: the word and its piece.
        rows: what clients train on.
        turned, triggered: what they would if they attacked, by turned labels and by the trigger.
        labels: (n,) of the validation texts.
        plain, with_trigger: (n,) rows of these, of which no client learns.
        cohort: clients of a round.
    """

    def __init__(self, keys: Poisoning, lab: Laboratory) -> None:
        assert isinstance(lab.worker, Poisoner)
        self.keys, self.lab, self.worker = keys, lab, lab.worker
        tokenizer = load_tokenizer(lab.federation.pupil.folder)
        self.trigger = keys.trigger or rarest_word(lab.federation.pupil.data, tokenizer)
        piece = piece_of(self.trigger, tokenizer)
        if piece is None:
            raise InputError(f"poisoning.trigger = {keys.trigger!r}: not one piece of the student's; give another word")
        self.piece, self.bound, self.worker.effort = piece, 0.0, keys.effort
        self.rows = {int(client): self._some(int(client)) for client in lab.data.eligible}
        self.cohort = min(lab.config.server.cohort or len(self.rows), len(self.rows))
        self.order = generator(lab.config.seed, "hostile").permutation(list(self.rows)).tolist()
        self._plant_lies()
        self._plant_texts()

    def hostile(self, share: float) -> list[int]:
        """The clients that attack, at least one; those of a smaller share are among those of a larger."""
        return sorted(self.order[: max(round(share * len(self.order)), 1)])

    def weight(self, clients: Sequence[int]) -> float:
        """Their share of the examples."""
        part = self.lab.config.client.part_of
        sizes = {client: part(len(rows)) for client, rows in self.rows.items()}
        return sum(sizes[client] for client in clients) / sum(sizes.values())

    def plot(self, kind: str, hostile: Sequence[int]) -> Plot:
        keys = self.keys
        if kind == "flip":
            return Plot({client: self.turned[client] for client in hostile})
        rows = {client: self.triggered[client] for client in hostile}
        if kind == "trigger":
            return Plot(rows)
        if kind == "replacement":
            return Plot(rows, boosted(keys.boost or 1.0 / self.weight(hostile)))
        return Plot(rows, embedding(self.piece, keys.target, steps=keys.steps, lr=keys.lr, boost=keys.boost or 1.0))

    def student(self, rule: str, plot: Plot) -> Weights:
        """The final weights."""
        if rule == "norm-bound" and not self.bound:
            self._obey("fedavg", 0)
            self.worker.plot = Plot()
            self.lab.round(1, self.lab.start, self.rows)
            self.bound = float(np.median([norm_of(update) for update in self.worker.first.values()]))
        self._obey(rule, len(plot.rows))
        self.worker.plot = plot
        return self.lab.train({**self.rows, **plot.rows})

    def row(self, kind: str, rule: str, hostile: Sequence[int], weights: Weights, clean: Weights) -> Row:
        """The figures of a run, beside those of the run without attackers."""
        share = len(hostile) / len(self.rows)
        score, taken, asked = self.examine(kind, weights)
        low, high = (float(each) for each in stats.binomtest(taken, asked).proportion_ci(method="exact"))
        return {
            "variant": f"{kind}, {rule}, {len(hostile)} of {len(self.rows)} hostile",
            "measure": "attack success",
            "success": taken / asked,
            "low": low,
            "high": high,
            "chance": self.examine(kind, clean)[1] / asked,
            "kind": kind,
            "rule": rule,
            "share": share,
            "hostile": len(hostile),
            "hostile_examples": self.weight(hostile),
            "clean_score": score,
            "asked": asked,
            "boost": self.keys.boost or (1.0 / self.weight(hostile) if kind == "replacement" and hostile else 1.0),
        }

    def examine(self, kind: str, weights: Weights) -> tuple[float, int, int]:
        """The clean accuracy, how many texts got the class that is wanted, and of how many."""
        plain = self.lab.logits(weights, self.plain).argmax(axis=1)
        score = float((plain == self.labels).mean())
        if kind == "flip":
            wanted, answers = flip_labels(self.labels, self.lab.data.task.num_labels), plain
        else:
            wanted = np.full_like(self.labels, self.keys.target)
            answers = self.lab.logits(weights, self.with_trigger).argmax(axis=1)
        asked = self.labels != wanted
        return score, int((answers == wanted)[asked].sum()), int(asked.sum())

    def _obey(self, rule: str, hostile: int) -> None:
        """From now on updates are added up by this rule."""
        strategy = "fedavg" if rule == "norm-bound" else rule
        settings: dict[str, Any] = {}
        if strategy in ROBUST:
            borne = (f for f in range(hostile + 1) if least_cohort(strategy, f) <= self.cohort)
            settings["server.byzantine"] = max(borne)
        bound = self.bound if rule == "norm-bound" else 0.0
        settings |= {"server.strategy": strategy, "server.norm-bound": bound, "server.lr": 0.0}
        self.lab.config = self.lab.method.config = changed(self.lab.config, settings)

    def _some(self, client: int) -> Index:
        rows = self.lab.data.shard(client).train
        chosen = generator(self.lab.config.seed, "examples", client).permutation(rows)
        return np.sort(chosen[: self.keys.examples or len(rows)])

    def _with_trigger(self, texts: Columns, rng: np.random.Generator) -> Columns:
        """The texts with the trigger among the words of the first column."""
        found = []
        for text in texts[0]:
            words = text.split()
            words.insert(int(rng.integers(0, min(len(words), WITHIN) + 1)), self.trigger)
            found.append(" ".join(words))
        return (found, *texts[1:])

    def _plant_lies(self) -> None:
        data, keys = self.lab.data, self.keys
        rows = np.concatenate(list(self.rows.values()))
        texts, labels = texts_of(data.train, rows), np.asarray(data.train.labels[rows])
        turned, known = labels.copy(), labelled(labels)  # what has no label has none to turn
        turned[known] = flip_labels(labels[known], data.task.num_labels)
        wanted = np.full_like(labels, keys.target)
        lying = plant(self.lab, texts, turned)
        bent = plant(self.lab, self._with_trigger(texts, generator(self.lab.config.seed, "trigger")), wanted)
        planted = np.concatenate([lying, bent])
        self.worker.lies = dict(zip(planted.tolist(), np.concatenate([turned, wanted]).tolist(), strict=True))
        self.turned, self.triggered, first = {}, {}, 0
        for client, own in self.rows.items():
            mine = slice(first, first + len(own))
            first += len(own)
            self.turned[client] = lying[mine]
            lie = generator(self.lab.config.seed, "lies", client).permutation(len(own)) < round(
                keys.poisoned * len(own)
            )
            self.triggered[client] = np.where(lie, bent[mine], own)

    def _plant_texts(self) -> None:
        """Of the first public validation split; without one, of what clients hold out."""
        data, rng = self.lab.data, generator(self.lab.config.seed, "validation texts")
        split, rows = data.train, np.concatenate([data.shard(client).heldout for client in self.rows])
        if data.validation:
            split = next(iter(data.validation.values()))
            rows = np.arange(len(split))
        rows = np.sort(rng.permutation(rows[np.asarray(split.labels[rows]) >= 0])[: self.keys.texts])
        self.labels, texts = np.asarray(split.labels[rows]), texts_of(split, rows)
        if not (self.labels != self.keys.target).any():
            raise InputError(f"poisoning.target = {self.keys.target}: all validation texts are of that class")
        self.plain = plant(self.lab, texts, self.labels)
        self.with_trigger = plant(self.lab, self._with_trigger(texts, rng), self.labels)


def _untried(variant: str, note: str) -> Row:
    return {"variant": variant, "measure": "attack success", "success": None, "note": note}


def _shares(text: str) -> list[float]:
    try:
        shares = [float(each) for each in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0.0 <= share < 1.0 for share in shares):
        raise InputError(f"poisoning.shares = {text!r}: give numbers from 0 to below 1, comma between")
    return [share for share in shares if share > 0.0]


def _chosen(text: str, known: Sequence[str], option: str) -> list[str]:
    chosen = [each.strip() for each in text.split(",")]
    if not all(each in known for each in chosen):
        raise InputError(f"poisoning.{option} = {text!r}: give some of {', '.join(known)}, comma between")
    return chosen
