"""Every key of a run, in typed sections: its values, its default, what it does.

Values are scalars, because that is all Flower carries; lists are written with commas. What keys mean to each other is
in `common.combinations`.
"""

from typing import Literal, get_args

from pydantic import Field, field_validator

from common.privacy_keys import PrivacyKeys
from common.section import Fraction, Rate, Section, Weight
from common.tiers import Size, read_holders, read_sizes

Strategy = Literal[
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "median", "trimmed-mean", "krum", "multi-krum",
    "feddf", "fedmd", "ds-fl", "fedkd",
]  # fmt: skip
STRATEGIES = get_args(Strategy)
ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
AT_CLIENTS = "at-clients"  # data.private: none of it is here
AUTO_BUDGET = -1  # a `client.micro-budget` that is found on the device
ROBUST = ("median", "trimmed-mean", "krum", "multi-krum")  # need each client's own update
FUSED = ("feddf",)  # need it too
VOTING = ("fedmd", "ds-fl")  # outputs on public text travel, and no weights
PUBLIC = ("feddf", *VOTING)  # need public text
KEEPING = (*VOTING, "fedkd")  # clients keep a model of their own on their disks


class DataKeys(Section):
    source: str = Field("", description="empty: the hub's nyu-mll/glue; a folder laid out like it; a file for `text`")
    private: str = Field(
        "",
        description="a folder with a file of private examples for each client (CSV, JSONL or Parquet; in the order of "
        "their names); all of data.source is then public; `at-clients`: with the clients themselves, for `edge run`",
    )
    validation: str = Field("", description="for `text`: a file scored at the server; empty: part of the public split")
    clients: int = Field(0, ge=0, description="number of clients; 0: 10, or one per value for `natural`")
    partition: Literal["auto", "iid", "dirichlet", "shards", "zipf", "natural"] = Field(
        "auto",
        description="how private text is cut: iid, dirichlet, shards (of labels), zipf (sizes) or natural (owners); "
        "auto: dirichlet, but natural with `data.partition-by`, and for `toy` when `data.clients` is 0",
    )
    partition_by: str = Field("", description="column whose values are the clients of `natural`")
    alpha: float = Field(
        1.0,
        gt=0.0,
        le=1e6,
        description="Dirichlet concentration, small: skewed labels and sizes; of `zipf`: sizes fall as 1 / rank^alpha",
    )
    shards_per_client: int = Field(
        2,
        ge=1,
        description="label shards each client gets with `shards`; all are equally large, and what is over is left out",
    )
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
        "all GLUE tasks in data.source, without texts that clients hold or scores are of; for `student.general-epochs`"
        ", which reads the first `data.max-length` pieces of each, and a trimmed vocabulary is chosen from it too",
    )
    limit: int = Field(0, ge=0, description="use this many train examples, drawn by the seed; 0: all")


class TeacherKeys(Section):
    model: str = Field("minilm", description="folder, hub id, or `minilm` (the packaged all-MiniLM-L6-v2)")
    epochs: int = Field(3, ge=1, le=100, description="fine-tuning of a bare encoder on the public split")
    lr: Rate = Field(1e-4, description="peak learning rate of that fine-tuning")
    token_budget: int = Field(1024, ge=64, description="padded word pieces per fine-tuning batch")


class StudentKeys(Section):
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
        0.0,
        description="the student gets this share of the teacher's parameters: its vocabulary is trimmed. Where it "
        "would keep less than this share of the pieces, `heads` and `neurons` become fewer, if left at 0; 0: not",
    )
    warm_epochs: int = Field(0, ge=0, le=1000, description="passes over the public split before round 1")
    warm_lr: Rate = Field(3e-4, description="AdamW learning rate of these; it falls to a tenth")
    warm_token_budget: int = Field(0, ge=0, description="padded word pieces per batch there; 0: as at the clients")
    general_epochs: int = Field(
        0,
        ge=0,
        le=1000,
        description="passes over all public text before these, on hidden states and soft targets: what a cut takes "
        "from a model is mended best on much text, of whatever kind; for a task on pairs the text is put in pairs",
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout while distilling")
    train_embeddings: bool = Field(False, description="also train, and send, the embeddings")
    tiers: str = Field(
        "",
        description="students inside the whole one, smallest first, and the share of clients that hold each: "
        "LAYERS/HEADS/NEURONS@SHARE, comma between, e.g. 1/4/256@0.5,2/6/512@0.3 (0 heads or neurons: as many as the "
        "whole); the other clients hold the whole; empty: all do",
    )
    tier_of: str = Field(
        "",
        description="with `tiers`, there without @SHARE: which each client holds, in the order of their numbers, 1 the "
        "smallest and the last the whole, e.g. 1,1,3,2; empty: they are drawn by the shares",
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
            return read_sizes(self.tiers, (self.layers, self.heads, self.neurons), drawn=not self.tier_of.strip())
        except ValueError as error:
            raise ValueError(f"student.tiers = {self.tiers!r}: {error}") from None

    @property
    def holders(self) -> tuple[int, ...]:
        """The tier of each client by `tier_of`, 0 the smallest; none where they are drawn."""
        try:
            return read_holders(self.tier_of, len(self.sizes) + 1)
        except ValueError as error:
            raise ValueError(f"student.tier-of = {self.tier_of!r}: {error}") from None

    @property
    def is_weighed(self) -> bool:
        """Whether the clients' examples say which heads and neurons it keeps."""
        return self.narrows and self.width_selection == "importance"

    @property
    def narrows(self) -> bool:
        """Whether heads and neurons are chosen before round 1: for the whole student, or for one inside it."""
        return any((self.heads, self.neurons, *(size.heads or size.neurons for size in self.sizes)))


class DistillKeys(Section):
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


class ClientKeys(Section):
    epochs: int = Field(1, ge=1, le=1000, description="passes per round over the shard, or over `share` of it")
    share: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="share of a client's examples that a round trains on, drawn anew each round, at least one; 1: all. "
        "For `fedadam` and its kin, which take one step a round and want many short rounds",
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw",
        description="sgd is for skewed labels with `fedadam` and its kin at the server: an optimiser that adapts at a "
        "client makes full-size steps of what little a client with almost one class has to learn",
    )
    lr: Rate = Field(3e-4, description="learning rate in round 1")
    lr_decay: Literal["constant", "linear"] = Field("linear", description="over the rounds; linear: down to a tenth")
    weight_decay: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="decoupled weight decay; of trained word embeddings only the client's own words decay, and those "
        "up to the number of the padding piece (GPT-2: all)",
    )
    clip_norm: float = Field(1.0, ge=0.0, description="clip each step's gradient to this norm; 0: not")
    token_budget: int = Field(1024, ge=64, description="padded word pieces per batch, that is per step")
    micro_budget: int = Field(
        0,
        ge=AUTO_BUDGET,
        description="padded word pieces in memory at once: a batch passes in such parts and their gradients are added "
        "up; 0: as `token-budget`; -1: found on each device by its memory and speed, and halved when memory runs out: "
        "such a run can be reproduced only on devices of the same kind that are as free; at the server `token-budget`",
    )
    max_seconds: float = Field(
        0.0,
        ge=0.0,
        description="a client stops training when a round has taken it so long, and what it has learnt by then counts "
        "for the examples that it has seen; 0: not; such a run cannot be reproduced",
    )
    energy_budget: float = Field(
        0.0,
        ge=0.0,
        description="the same for joules: RAPL's, or 5 W for each busy core; 0: not",
    )
    memory_limit: int = Field(
        0,
        ge=0,
        description="megabytes that the process of a client may hold: batches pass in parts that fit, as with "
        "`micro-budget = -1`; 0: what the device has free",
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

    def part_of(self, size: int) -> int:
        """How many of so many examples a round's passes are over."""
        return min(size, max(round(self.share * size), 1))


class ServerKeys(Section):
    strategy: Strategy = Field("fedavg", description="how updates become the next student: " + ", ".join(STRATEGIES))
    cohort: int = Field(0, ge=0, description="clients per round; 0: all")
    lr: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="step along the mean update; 0: 1, but 0.01 for `fedadam`, `fedyogi` and `fedadagrad`",
    )
    warmup_rounds: int = Field(
        0,
        ge=0,
        description="it rises evenly over so many first rounds, while the second moment of `fedadam` is young",
    )
    lr_decay: Literal["constant", "linear"] = Field("constant", description="over the rounds after; linear: to a tenth")
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
        "final",
        description="who scores in a round that is scored: the cohort (and everyone after the last: final), or all",
    )
    scores_every: int = Field(
        1,
        ge=1,
        description="after every so many rounds, and after the last, clients and public validation score the student",
    )
    round_timeout: float = Field(3600.0, gt=0.0, description="seconds to wait for the replies of one phase")
    max_lost_fraction: Fraction = Field(
        0.5,
        description="the run fails when more of a cohort is lost; not with `privacy.unit = client`, where who is lost "
        "counts as zero",
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")


class RuntimeKeys(Section):
    workers: int = Field(0, ge=0, le=256, description="worker processes; 0: cores divided by threads")
    threads: int = Field(1, ge=1, le=256, description="threads per worker; part of the bits of the result")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models run")
    cache: str = Field("", description="folder for caches; empty: FEDISTILL_CACHE or ~/.cache/fedistill")
    out: str = Field("", description="run folder for `flwr run .`; `simulate` has --out")


class TrackingKeys(Section):
    tensorboard: bool = Field(False, description="also write event files into RUN/tensorboard; needs its extra")
    mlflow: str = Field(
        "",
        description="also log to an MLflow server (its URI, without a password) or a local folder; needs its extra",
    )
    wandb: str = Field("", description="also log to this project of Weights & Biases; needs its extra")

    @field_validator("mlflow")
    @classmethod
    def _without_a_password(cls, uri: str) -> str:
        """The keys stand in config.toml, and a password would too."""
        if "@" in uri.partition("://")[2].partition("/")[0]:
            raise ValueError("give it without a name and password; MLFLOW_TRACKING_USERNAME and _PASSWORD hold them")
        return uri


class Keys(Section):
    """All keys of a run, each checked by itself."""

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
    privacy: PrivacyKeys = PrivacyKeys()
    tracking: TrackingKeys = TrackingKeys()
    runtime: RuntimeKeys = RuntimeKeys()
