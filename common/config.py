"""Every key of a run, in one typed model.

The same keys come from a TOML file (sections), from ``-s section.key=value`` on the command line and from
``flwr run . --run-config``. Values are scalars, because that is all Flower carries; lists are written with
commas. A key that does not exist or a value that does not fit raises `InputError` before anything starts.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import InputError
from common.tiers import Size, read_sizes

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=1e6, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0.0, le=10.0, allow_inf_nan=False)]
Scalar = str | int | float | bool
Strategy = Literal[
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "median", "trimmed-mean", "krum", "multi-krum",
    "feddf", "fedmd", "ds-fl", "fedkd",
]  # fmt: skip
STRATEGIES = get_args(Strategy)
ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
AUTO_BUDGET = -1  # a `client.micro-budget` that is found on the device
ROBUST = ("median", "trimmed-mean", "krum", "multi-krum")  # need each client's own update
FUSED = ("feddf",)  # need it too
VOTING = ("fedmd", "ds-fl")  # outputs on public text travel, and no weights
PUBLIC = ("feddf", *VOTING)  # need public text
KEEPING = (*VOTING, "fedkd")  # clients keep a model of their own on their disks


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class _Section(BaseModel):
    # strict: every source of keys is typed, and `rounds=true` must not mean 1
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, alias_generator=_kebab, validate_default=True
    )


class DataKeys(_Section):
    source: str = Field("", description="empty: the hub's nyu-mll/glue; a folder laid out like it; a file for `text`")
    validation: str = Field("", description="for `text`: a file scored at the server; empty: part of the public split")
    clients: int = Field(0, ge=0, description="number of clients; 0: 10, or one per value for `natural`")
    partition: Literal["auto", "iid", "dirichlet", "shards", "zipf", "natural"] = Field(
        "auto",
        description="how private text is cut: iid, dirichlet, shards (of labels), zipf (sizes) or natural (owners); "
        "auto: dirichlet, but natural for `toy` when `data.clients` is 0",
    )
    partition_by: str = Field("", description="column whose values are the clients of `natural`")
    alpha: float = Field(
        1.0,
        gt=0.0,
        le=1e6,
        description="Dirichlet concentration, small: skewed labels and sizes; of `zipf`: sizes fall as 1 / rank^alpha",
    )
    shards_per_client: int = Field(2, ge=1, description="label shards each client gets with `shards`")
    min_examples: int = Field(8, ge=2, description="a client with fewer private examples is left out, and said so")
    public_fraction: Fraction = Field(0.2, description="share of train that the teacher may see")
    holdout_fraction: Fraction = Field(0.2, description="share of each private shard never trained on, only scored")
    text_columns: str = Field("", description="for `text`: one or two columns, comma between; empty: `text`")
    label_column: str = Field("label", description="for `text`: the column of class names or numbers")
    multi_label: bool = Field(
        False, description="for `text`: an example has any number of classes, e.g. a|b; an empty cell is unlabelled"
    )
    label_separator: str = Field(
        "|", min_length=1, description="between the classes of a cell with `multi-label`; alone in it: no class"
    )
    max_length: int = Field(128, ge=8, le=512, description="word pieces kept of an example, or of each of its windows")
    windows: int = Field(
        1,
        ge=1,
        le=1024,
        description="a longer text is cut into at most so many windows, whose mean logits are the example's; 1: it is "
        "cut short. Single texts only",
    )
    stride: int = Field(0, ge=0, description="word pieces that neighbouring windows share")
    public_text: str = Field(
        "",
        description="more public text, without labels: a file with a text on each line, or `glue`, the public parts of "
        "all GLUE tasks in data.source; for `student.general-epochs`, and a trimmed vocabulary is chosen from it too",
    )
    limit: int = Field(0, ge=0, description="use this many train examples, drawn by the seed; 0: all")


class TeacherKeys(_Section):
    model: str = Field("minilm", description="folder, hub id, or `minilm` (the packaged all-MiniLM-L6-v2)")
    epochs: int = Field(3, ge=1, le=100, description="fine-tuning of a bare encoder on the public split")
    lr: Rate = Field(1e-4, description="peak learning rate of that fine-tuning")
    token_budget: int = Field(1024, ge=64, description="padded word pieces per fine-tuning batch")


class StudentKeys(_Section):
    model: str = Field(
        "", description="what the student is cut from: a folder or hub id as `teacher.model`; empty: the teacher"
    )
    layers: int = Field(3, ge=1, description="transformer layers kept")
    layer_selection: str = Field(
        "spaced",
        description="`spaced`, `distilbert`, `bottom`, `top`, `random` (with random weights, as a control), or the "
        "teacher's layer numbers: 0,2,5",
    )
    heads: int = Field(0, ge=0, description="attention heads kept in each layer; 0: all")
    neurons: int = Field(0, ge=0, description="neurons kept in each layer's feed-forward network; 0: all")
    width_selection: Literal["importance", "random"] = Field(
        "importance",
        description="which heads and neurons: those that matter most for the distillation, as the clients "
        "measure it before round 1, or random ones, as a control",
    )
    vocabulary: int = Field(0, ge=0, description="word pieces kept: the most frequent in public text; 0: all")
    embedding_rank: int = Field(0, ge=0, description="rank of the word embedding as a product of two matrices; 0: one")
    target_ratio: Fraction = Field(
        0.0, description="trim the vocabulary until the student has this share of the teacher's parameters; 0: not"
    )
    warm_epochs: int = Field(0, ge=0, le=1000, description="passes over the public split before round 1")
    warm_lr: Rate = Field(3e-4, description="AdamW learning rate of these; it falls to a tenth")
    general_epochs: int = Field(
        0,
        ge=0,
        le=1000,
        description="passes over all public text before these, on hidden states and soft targets: what a cut takes "
        "from a model is mended best on much text, of whatever kind",
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout while distilling")
    train_embeddings: bool = Field(False, description="also train, and send, the embeddings")
    tiers: str = Field(
        "",
        description="students inside the whole one, smallest first, and the share of clients that hold each: "
        "LAYERS/HEADS/NEURONS@SHARE, comma between, e.g. 1/4/256@0.5,2/6/512@0.3 (0 heads or neurons: as many as the "
        "whole); the other clients hold the whole; empty: all do",
    )
    tier_mode: Literal["nested", "sliced", "exclusive"] = Field(
        "nested",
        description="nested: each depth has an exit of its own, and a client teaches the students inside its own; "
        "sliced: plain beginnings of the whole one; exclusive: as sliced, but only clients that hold the whole train",
    )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The students of `tiers`."""
        try:
            return read_sizes(self.tiers, (self.layers, self.heads, self.neurons))
        except ValueError as error:
            raise ValueError(f"student.tiers = {self.tiers!r}: {error}") from None

    @property
    def narrows(self) -> bool:
        """Whether heads and neurons are chosen before round 1: for the whole student, or for one inside it."""
        return any((self.heads, self.neurons, *(size.heads or size.neurons for size in self.sizes)))


class DistillKeys(_Section):
    temperature: float = Field(
        2.0, gt=0.0, le=100.0, description="softens both distributions; the loss is scaled by T^2"
    )
    soft_weight: Weight = Field(0.7, description="weight of KL(teacher, student) on softened probabilities")
    hard_weight: Weight = Field(
        0.3, description="weight of the true label; 0, with constant `weighting`: no label is ever read"
    )
    weighting: Literal["constant", "annealed", "adaptive"] = Field(
        "constant",
        description="annealed: over the rounds the soft weight goes to the hard; adaptive: in each example, as far as "
        "the teacher is wrong",
    )
    prior_correction: bool = Field(
        False,
        description="take a client's own shares of the classes, against those in public text, out of the label's loss",
    )
    hidden_weight: Weight = Field(
        0.0, description="weight of the loss on hidden states; above 0 the teacher runs along"
    )
    hidden_loss: Literal["cosine", "mse"] = Field("cosine", description="distance between hidden states")
    hidden_layers: str = Field("even", description="`even`, `last`, or student:teacher layer pairs: 0:1,2:5")
    cls_weight: Weight = Field(
        0.0, description="weight of the loss on normalised [CLS] states of `hidden-layers`; the teacher runs along"
    )
    relation_weight: Weight = Field(
        0.0, description="weight of the loss on relations of queries, keys and values; the teacher runs along"
    )
    relation_layers: str = Field(
        "last",
        description="layers whose relations are compared, as `hidden-layers`; a tier without these has no such loss",
    )
    relation_heads: int = Field(0, ge=0, le=1024, description="relation heads; 0: as many as both models' heads allow")
    self_weight: Weight = Field(
        1.0,
        description="with `student.tiers` and nested: weight of KL(a client's student, each smaller one inside it)",
    )
    inner_weight: Weight = Field(
        1.0, description="and of the loss on outputs, soft and hard, of each smaller one itself"
    )
    general_rounds: int = Field(
        0,
        ge=0,
        description="the first so many rounds are general: no task and no label, the student learns to guess masked "
        "pieces as the teacher did before it was fine-tuned (DistilBERT's triple loss)",
    )
    general_soft_weight: Weight = Field(5.0, description="there: weight of KL(teacher, student) over word pieces")
    general_mlm_weight: Weight = Field(2.0, description="there: weight of the piece that is masked")
    general_cosine_weight: Weight = Field(1.0, description="there: weight of 1 - cosine of the last hidden states")
    mask_probability: float = Field(0.15, gt=0.0, lt=1.0, description="there: of each word piece to be masked")


class ClientKeys(_Section):
    epochs: int = Field(1, ge=1, le=1000, description="passes over the shard per round")
    lr: Rate = Field(3e-4, description="AdamW learning rate in round 1")
    lr_decay: Literal["constant", "linear"] = Field("linear", description="over the rounds; linear: down to a tenth")
    weight_decay: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="AdamW weight decay; of trained word embeddings only the client's own words decay",
    )
    clip_norm: float = Field(1.0, ge=0.0, description="clip each step's gradient to this norm; 0: not")
    token_budget: int = Field(1024, ge=64, description="padded word pieces per batch, that is per step of AdamW")
    micro_budget: int = Field(
        0,
        ge=AUTO_BUDGET,
        description="padded word pieces in memory at once: a batch passes in such parts and their gradients are added "
        "up; 0: as `token-budget`; -1: found on each device by its memory and speed, and halved when memory runs out: "
        "such a run can be reproduced only on devices of the same kind that are as free; at the server `token-budget`",
    )
    grow_batch: bool = Field(
        False,
        description="grow the batch from round to round with the gradient noise scale, from `token-budget` up to "
        "`max-token-budget`, instead of decaying the learning rate",
    )
    max_token_budget: int = Field(8192, ge=64, description="the most padded word pieces per batch that it grows to")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 autocast where the processor has it"
    )
    mentor_layers: int = Field(
        0, ge=0, description="of `fedkd`: layers of each client's own mentor, spread over the teacher's; 0: all of them"
    )
    proximal: Weight = Field(0.01, description="mu of `fedprox`: how strongly a client is held to the round's weights")


class ServerKeys(_Section):
    strategy: Strategy = Field("fedavg", description="how updates become the next student: " + ", ".join(STRATEGIES))
    cohort: int = Field(0, ge=0, description="clients per round; 0: all")
    lr: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="step along the mean update; 0: 1, but 0.01 for `fedadam`, `fedyogi` and `fedadagrad`",
    )
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="of `fedavgm`; beta 1 of `fedadam` and `fedyogi`")
    second_momentum: float = Field(0.99, ge=0.0, lt=1.0, description="beta 2 of `fedadam` and `fedyogi`")
    tau: float = Field(
        1e-3, gt=0.0, le=1.0, description="how adaptive `fedadam`, `fedyogi`, `fedadagrad` are; small: more"
    )
    byzantine: int = Field(
        1, ge=0, description="hostile clients a round that `trimmed-mean`, `krum` and `multi-krum` bear"
    )
    public_sample: int = Field(
        0, ge=0, description="public examples drawn for each round of `feddf`, `fedmd` and `ds-fl`; 0: all there are"
    )
    public_epochs: int = Field(1, ge=1, le=1000, description="passes over these")
    public_lr: Rate = Field(1e-4, description="AdamW learning rate of these passes; it falls to a tenth within a round")
    average_rounds: int = Field(1, ge=1, description="the final student is the mean of so many last rounds' students")
    norm_bound: float = Field(0.0, ge=0.0, description="scale each client's update down to this norm; 0: not")
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="a worker adds its clients' updates up before they travel; auto: where rule and wire allow it",
    )
    wire: Literal["auto", "fp32", "fp16", "int8", "topk", "svd"] = Field(
        "auto",
        description="how an update travels; all but fp32 lose something and make up for it in later rounds; auto: "
        "fp32, but svd for `fedkd`",
    )
    topk: float = Field(0.06, gt=0.0, le=1.0, description="share of an update's entries that `topk` keeps")
    svd_energy_start: float = Field(
        0.8, gt=0.0, le=1.0, description="share of an update's squares that `svd` keeps in round 1"
    )
    svd_energy_end: float = Field(0.95, gt=0.0, le=1.0, description="and in the last round; it rises in between")
    over_select: float = Field(
        1.0,
        ge=1.0,
        le=10.0,
        description="ask this many times the cohort, keep the first; above 1 the bits depend on time",
    )
    scores: Literal["final", "cohort", "all"] = Field(
        "final", description="who scores: the cohort each round (and everyone at the end: final), or all each round"
    )
    round_timeout: float = Field(3600.0, gt=0.0, description="seconds to wait for the replies of one phase")
    max_lost_fraction: Fraction = Field(0.5, description="the run fails when more of a cohort is lost")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")


def _resolve_server(given: dict[str, Any]) -> dict[str, Any]:
    """The server's keys with ``auto`` values put in."""
    keys = dict(given)
    if keys.get("lr", 0.0) == 0.0 and type(keys.get("lr", 0.0)) in (int, float):
        keys["lr"] = 0.01 if keys.get("strategy") in ADAPTIVE else 1.0
    if keys.get("wire", "auto") == "auto":
        keys["wire"] = "svd" if keys.get("strategy") == "fedkd" else "fp32"
    if keys.get("packing", "auto") == "auto":
        keys["packing"] = "off" if _needs_own_updates(keys) else "on"
    return keys


def _needs_own_updates(keys: dict[str, Any]) -> list[str]:
    """Which of the server's keys need each client's own update."""
    found = [f"strategy = {keys['strategy']!r}"] if keys.get("strategy") in (*ROBUST, *FUSED) else []
    found += [f"norm-bound = {keys['norm-bound']}"] if keys.get("norm-bound") else []
    found += [f"wire = {keys['wire']!r}"] if keys.get("wire", "fp32") != "fp32" else []
    return [f"server.{key}" for key in found]


def _refuse(told: str, against: dict[str, bool]) -> None:
    """Raise ValueError for the first of some keys that is found beside the one that is told of."""
    for other, found in against.items():
        if found:
            raise ValueError(f"{told}: {other} does not fit that; give one of them")


class RuntimeKeys(_Section):
    workers: int = Field(0, ge=0, le=256, description="worker processes; 0: cores divided by threads")
    threads: int = Field(1, ge=1, le=256, description="threads per worker; part of the bits of the result")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models run")
    cache: str = Field("", description="folder for caches; empty: FEDISTILL_CACHE or ~/.cache/fedistill")
    out: str = Field("", description="run folder for `flwr run .`; `simulate` has --out")


class Config(_Section):
    """A run. `Config()` is the embedded demo; see `load_config` for how keys are given."""

    task: Literal["sst2", "cola", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "toy", "text"] = Field(
        "toy", description="a GLUE task, `toy` (made by the program) or `text` (your own file)"
    )
    rounds: int = Field(5, ge=1, le=100_000, description="federated rounds")
    seed: int = Field(0, ge=0, lt=2**63, description="of every random choice")
    data: DataKeys = DataKeys()
    teacher: TeacherKeys = TeacherKeys()
    student: StudentKeys = StudentKeys()
    distill: DistillKeys = DistillKeys()
    client: ClientKeys = ClientKeys()
    server: ServerKeys = ServerKeys()
    runtime: RuntimeKeys = RuntimeKeys()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, values: Any) -> Any:
        """Resolve ``auto``, so that the run folder's config.toml says what was really done."""
        if not isinstance(values, dict) or not isinstance(values.get("data", {}), dict):
            return values
        data = dict(values.get("data", {}))
        toy = values.get("task", "toy") == "toy"
        if data.get("partition", "auto") == "auto":
            data["partition"] = "natural" if toy and not data.get("clients") else "dirichlet"
        if data["partition"] == "natural" and toy and not data.get("partition-by"):
            data["partition-by"] = "domain"
        if data["partition"] != "natural" and not data.get("clients"):
            data["clients"] = 10
        server = values.get("server", {})
        if isinstance(server, dict):
            server = _resolve_server(server)
        return {**values, "data": data, "server": server}

    @model_validator(mode="after")
    def _keys_that_need_each_other(self) -> "Config":
        keys = self.distill
        if keys.soft_weight + keys.hard_weight + keys.hidden_weight + keys.cls_weight + keys.relation_weight == 0:
            raise ValueError(
                "distill.soft-weight, hard-weight, hidden-weight, cls-weight and relation-weight are all 0: nothing to "
                "learn from"
            )
        if self.student.target_ratio and self.student.vocabulary:
            raise ValueError(
                f"student.target-ratio = {self.student.target_ratio}: it chooses the vocabulary; "
                f"student.vocabulary = {self.student.vocabulary} does too; give one of them"
            )
        narrower = self.student.narrows
        if narrower and self.student.width_selection == "importance" and keys.soft_weight + keys.hard_weight == 0:
            raise ValueError(
                "student.width-selection = 'importance': it is measured on the loss on outputs, but "
                "distill.soft-weight and hard-weight are 0; give one of them a weight, or "
                "student.width-selection = 'random'"
            )
        self._check_batches()
        if self.distill.prior_correction and (self.task == "stsb" or self.data.multi_label):
            what = "data.multi-label = true" if self.data.multi_label else f"task = {self.task}"
            raise ValueError(f"distill.prior-correction = true: {what} has no one class per example; give false")
        if self.data.multi_label and self.task != "text":
            raise ValueError(f"data.multi-label = true: examples of task = {self.task} have one label each; give false")
        if self.data.stride and self.data.windows == 1:
            raise ValueError(
                f"data.stride = {self.data.stride}: with data.windows = 1 there is nothing to share; give more windows"
            )
        if self.data.holdout_fraction == 1.0:
            raise ValueError("data.holdout-fraction = 1.0: nothing would be left to train on; give less than 1")
        if self.data.clients and self.server.cohort > self.data.clients:
            raise ValueError(
                f"server.cohort = {self.server.cohort}: there are data.clients = {self.data.clients}; give at most that"
            )
        self._check_server()
        self._votes_are_no_updates()
        self._mentors_need_labels()
        if self.server.strategy in PUBLIC and not self.data.public_fraction:
            raise ValueError(
                f"data.public-fraction = 0.0: server.strategy = {self.server.strategy!r} learns on public text; "
                "give more than 0"
            )
        if self.data.partition == "natural" and not self.data.partition_by:
            raise ValueError("data.partition-by is empty: data.partition = natural needs the column's name")
        self._what_tiers_allow()
        self._general_rounds_come_first()
        self._student_of_its_own()
        if self.task == "text" and not self.data.source:
            raise ValueError("data.source is empty: task = text needs a CSV, JSONL or Parquet file")
        return self

    def _check_server(self) -> None:
        keys = self.server
        if keys.over_select > 1.0 and not keys.cohort:
            raise ValueError(f"server.over-select = {keys.over_select}: server.cohort = 0 asks everyone; give a cohort")
        if keys.packing == "on" and (reasons := _needs_own_updates(keys.model_dump(by_alias=True))):
            raise ValueError(f"server.packing = 'on': {reasons[0]} needs each client's own update; give auto or off")
        if keys.average_rounds > self.rounds:
            raise ValueError(
                f"server.average-rounds = {keys.average_rounds}: there are rounds = {self.rounds}; give at most that"
            )

    def _what_tiers_allow(self) -> None:
        if not self.student.sizes:
            if self.student.tier_mode != "nested":
                raise ValueError(
                    f"student.tier-mode = {self.student.tier_mode!r}: student.tiers is empty; give them, or `nested`"
                )
            return
        against = _needs_own_updates(self.server.model_dump(by_alias=True))
        against += ["server.packing = 'off'"] if self.server.packing == "off" else []
        lone = self.server.strategy in (*FUSED, "fedkd")
        against += [f"server.strategy = {self.server.strategy!r}"] if lone else []
        against += ["client.grow-batch = true"] if self.client.grow_batch else []
        against += ["student.train-embeddings = true"] if self.student.train_embeddings else []
        if against:
            raise ValueError(
                f"student.tiers = {self.student.tiers!r}: clients of each tier are added up by themselves, "
                f"{against[0]} does not fit that; give one of them"
            )

    def _general_rounds_come_first(self) -> None:
        keys, student = self.distill, self.student
        if not keys.general_rounds:
            return
        told = f"distill.general-rounds = {keys.general_rounds}"
        if keys.general_rounds >= self.rounds:
            raise ValueError(f"{told}: the task's rounds come after these, and rounds = {self.rounds}; give fewer")
        if keys.general_soft_weight + keys.general_mlm_weight + keys.general_cosine_weight == 0:
            raise ValueError(
                "distill.general-soft-weight, general-mlm-weight and general-cosine-weight are all 0: nothing to learn "
                f"from in {told}"
            )
        against = {
            f"server.strategy = {self.server.strategy!r}": self.server.strategy in (*FUSED, *KEEPING),
            f"student.tiers = {student.tiers!r}": bool(student.tiers),
            f"student.warm-epochs = {student.warm_epochs}": student.warm_epochs > 0,
            f"student.general-epochs = {student.general_epochs}": student.general_epochs > 0,
            "student.train-embeddings = true": student.train_embeddings,
            f"client.micro-budget = {AUTO_BUDGET}": self.client.micro_budget == AUTO_BUDGET,
        }
        _refuse(told, against)

    def _student_of_its_own(self) -> None:
        keys = self.student
        if keys.model:
            against = {
                f"server.strategy = {self.server.strategy!r}": self.server.strategy in (*FUSED, *KEEPING),
                f"student.tiers = {keys.tiers!r}": bool(keys.tiers),
                f"distill.general-rounds = {self.distill.general_rounds}": self.distill.general_rounds > 0,
                f"student.general-epochs = {keys.general_epochs}": keys.general_epochs > 0,
            }
            _refuse(f"student.model = {keys.model!r}", against)

    def _check_batches(self) -> None:
        keys = self.client
        if keys.micro_budget == AUTO_BUDGET and self.server.strategy in KEEPING:
            raise ValueError(
                f"client.micro-budget = {AUTO_BUDGET}: with server.strategy = {self.server.strategy!r} a client trains "
                "more than one model, and the probe measures one; give a number, or 0"
            )
        if not keys.grow_batch:
            return
        if keys.lr_decay != "constant":
            raise ValueError(
                f"client.grow-batch = true: the batch grows instead of the learning rate decaying, but "
                f"client.lr-decay = {keys.lr_decay!r}; give constant"
            )
        if keys.max_token_budget < keys.token_budget:
            raise ValueError(
                f"client.max-token-budget = {keys.max_token_budget}: client.grow-batch = true starts from "
                f"client.token-budget = {keys.token_budget}; give at least that"
            )
        if self.server.cohort == 1:
            raise ValueError("client.grow-batch = true: one client has no noise scale; give server.cohort = 2 or more")
        if self.server.strategy in (*ROBUST, *KEEPING):
            raise ValueError(
                f"client.grow-batch = true: no noise scale is measured with server.strategy = "
                f"{self.server.strategy!r}; give false"
            )

    def _votes_are_no_updates(self) -> None:
        keys = self.server
        if keys.strategy not in VOTING:
            return
        wrong = {
            f"server.wire = {keys.wire!r}": (keys.wire != "fp32", "fp32"),
            f"server.norm-bound = {keys.norm_bound}": (keys.norm_bound > 0, "0"),
            f"server.packing = {keys.packing!r}": (keys.packing != "on", "auto"),
            f"server.lr = {keys.lr}": (keys.lr != 1.0, "0"),
        }
        for told, (found, right) in wrong.items():
            if found:
                raise ValueError(f"{told}: with server.strategy = {keys.strategy!r} no update travels; give {right}")
        if keys.strategy == "ds-fl" and self.task == "stsb":
            raise ValueError("server.strategy = 'ds-fl': it averages probabilities, and stsb has none; give 'fedmd'")

    def _mentors_need_labels(self) -> None:
        keys = self.distill
        if self.server.strategy != "fedkd":
            return
        wrong = {
            f"distill.hard-weight = {keys.hard_weight}": (keys.hard_weight == 0, "more than 0: it learns from labels"),
            f"distill.weighting = {keys.weighting!r}": (keys.weighting != "constant", "constant: it weighs by itself"),
            f"distill.cls-weight = {keys.cls_weight}": (keys.cls_weight > 0, "0, or distill.hidden-weight"),
            f"distill.relation-weight = {keys.relation_weight}": (
                keys.relation_weight > 0, "0, or distill.hidden-weight",
            ),
        }  # fmt: skip
        for told, (found, right) in wrong.items():
            if found:
                raise ValueError(f"{told}: server.strategy = 'fedkd' does not use it so; give {right}")

    def flat(self) -> dict[str, Scalar]:
        """All keys, dotted: ``{"task": "toy", "data.clients": 0, ...}``."""
        found: dict[str, Scalar] = {}
        for name, value in self.model_dump(by_alias=True).items():
            if isinstance(value, dict):
                found.update({f"{name}.{key}": inner for key, inner in value.items()})
            else:
                found[name] = value
        return found

    def toml(self) -> str:
        """All keys as a TOML document that `load_config` reads back to an equal model."""
        return tomli_w.dumps(self.model_dump(by_alias=True))


def default_keys() -> dict[str, Scalar]:
    """Every key with its default as written, before ``auto`` is resolved for a task."""
    found: dict[str, Scalar] = {}
    for name, entry in Config.model_fields.items():
        if isinstance(entry.default, _Section):
            found.update({f"{name}.{key}": value for key, value in entry.default.model_dump(by_alias=True).items()})
        else:
            found[name] = entry.default
    return found


def load_config(path: Path | None = None, settings: Iterable[str] = (), base: Config | None = None) -> Config:
    """Read a TOML file, lay ``key=value`` settings over it, check everything; what neither gives is the base's.

    Raises:
        InputError: naming the file or key, what was found and what would be right.
    """
    flat: dict[str, Any] = dict(base.flat()) if base is not None else {}
    if path is not None:
        flat |= read_toml(path)
    return from_flat(flat | read_settings(settings))


def read_settings(settings: Iterable[str]) -> dict[str, Scalar]:
    """Dotted keys from ``key=value`` texts; the keys are not checked.

    Raises:
        InputError: one is no ``key=value``.
    """
    flat: dict[str, Scalar] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise InputError(f"-s {setting}: give key=value, e.g. -s rounds=3")
        flat[key.strip()] = _parse(text.strip())
    return flat


def from_flat(flat: Mapping[str, Any]) -> Config:
    """Build a `Config` from dotted keys, as Flower's run config gives them."""
    known = default_keys()
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; `fedistill keys` lists all"
            raise InputError(f"{key}: no such key{hint}")
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    try:
        return Config.model_validate(_numbers_to_text(nested))
    except ValidationError as error:
        raise InputError(_first_problem(error)) from None


def read_document(path: Path, wanted: str) -> dict[str, Any]:
    """A TOML file as it is.

    Args:
        wanted: what to give where there is no such file.

    Raises:
        InputError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give {wanted}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Dotted keys of a TOML file; neither keys nor values are checked.

    Raises:
        InputError: it cannot be read, or is not TOML.
    """
    document = read_document(path, "a TOML file, or none for the demo")
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and (value or key in Config.model_fields):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _parse(text: str) -> Scalar:
    """A value typed on the command line, read as TOML where it is TOML and as plain text where not."""
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str | int | float | bool) else text


def _numbers_to_text(nested: dict[str, Any]) -> dict[str, Any]:
    """``student.layer-selection=1`` and ``data.source=2024`` are text that happens to look like a number."""
    texts = {key for key, value in default_keys().items() if isinstance(value, str)}
    result: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            result[name] = {
                key: str(inner) if f"{name}.{key}" in texts and type(inner) in (int, float) else inner
                for key, inner in value.items()
            }
        else:
            result[name] = value
    return result


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}"
