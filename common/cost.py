"""What a student costs a device: memory, time, bytes and energy of a round, from its size (`common.size`).

    training memory    4 (P_teacher + P_held) + c P_trained + max(activations, the teacher's forward pass) + 50 MB,
        c = 4 the round's weights + 4 gradients + 8 AdamW's moments + 4 the update + 8 its exact sum; the activations
        with one layer's tensors in flight, and in bf16 copies of the weights, 2 P_trained. Where the teacher runs
        beside the student, the sum of both passes instead of the larger; where the optimizer is SGD, no moments
    latency            forward operations / rate + layers x fixed time, of one sentence; the windows of a longer text
        are rows that pass together
    computing          (operations / rate + layers x fixed time) over all that passes in a round: a forward pass over
        held-out examples too, as often as the student is scored, whose fixed times are left out
    transfer           8 bits x (bytes up + bytes down) / bandwidth; the weights come down to be trained and, as often
        as they are scored, once more
    energy             power x (computing + transfer)

In a mixed federation (`common.nested`) a device holds the models of all students, around one embedding. The smaller
ones inside its own are trained along: each adds its training operations, its activations, its copies in bf16, and the
weights of its exit; 80 MB come on top. Room that is set aside for the others' updates and never written is left out.

The interpreter and its libraries come on top, and what happens once, before round 1: fetching teacher and student, and
the teacher's outputs. Rates and fixed times are the device's (`common.devices`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from common.compression import entry_bytes, wire_for
from common.config import Config
from common.devices import DeviceProfile
from common.inference import ROWS
from common.size import (
    Size,
    activation_bytes,
    flight_bytes,
    forward_flops,
    operations_per_piece,
    training_flops,
    weight_bytes,
)

# padded pieces for each piece of text, in token-budget batches of 1,024: 14 % of them are padding (SST-2, measured)
PADDING = 1 / (1 - 0.14)
# added because peak memory was 22 to 55 MB above the rest of the formula, for four small encoders on one machine; what
# takes it was not looked into, and the constant was not tried on others
BUFFERS = 50_000_000
# and this where smaller students are trained along: students of 3 and 6 layers, 1 to 3 inside (six trials in fp32),
# peaked 58 to 128 MB above the rest. glibc keeps it: made to give back each tensor, they stayed 106 to 113 MB below
BUFFERS_INSIDE = 80_000_000
SUM = 8.0  # of the exact sum, int64
MEGA = 1e6


@dataclass(frozen=True)
class Work:
    """What a federation asks of every device, as far as costs go.

    Attributes:
        micro_budget: padded pieces that pass at once; 0: the whole batch.
        longest: the most pieces a text has, or each of its windows.
        windows, stride: the most that a text has, and the pieces that neighbours share.
        special: pieces of each window that the tokeniser puts around the text's.
        share: of the examples that a pass is over.
        scored: of the rounds: after which the student is scored.
        heldout: examples that are scored, to each that there is to train on.
        teaches: whether the smaller students inside a larger one are trained along with it.
        deep: whether the teacher runs beside the student.
        packed: whether the update travels as an exact sum.
        entry_bytes: bytes up for each trained weight, at most, without scales.
        adaptive: whether the optimizer keeps moments.
    """

    epochs: int
    token_budget: int
    longest: int
    bf16: bool
    deep: bool
    packed: bool
    entry_bytes: float
    micro_budget: int = 0
    windows: int = 1
    stride: int = 0
    special: int = 2
    share: float = 1.0
    scored: float = 1.0
    heldout: float = 0.0
    teaches: bool = True
    adaptive: bool = True

    def down_bytes(self, trained: int) -> float:
        """To a device of its own in a round, of so many trained weights: to train them, and again to score them."""
        return (1 + self.scored) * 4 * trained

    @property
    def passing(self) -> int:
        """Padded pieces that pass at once."""
        return min(self.micro_budget or self.token_budget, self.token_budget)

    def cut(self, pieces: int) -> tuple[int, int]:
        """The windows of a text of so many pieces, special ones included, and the pieces of the longest of them."""
        if pieces <= self.longest:
            return 1, pieces
        room = self.longest - self.special
        return min(math.ceil((pieces - self.special - self.stride) / (room - self.stride)), self.windows), self.longest

    @classmethod
    def of(cls, config: Config, special: int = 2) -> Self:
        """``special``: pieces that the tokeniser puts around a text, BERT's and RoBERTa's unless said otherwise."""
        keys, distill, server = config.client, config.distill, config.server
        packed = server.packing == "on"
        return cls(
            epochs=keys.epochs,
            token_budget=keys.token_budget,
            longest=config.data.max_length,
            bf16=keys.precision == "bf16",  # auto: the device decides; fp32 takes more memory
            deep=distill.hidden_weight + distill.cls_weight + distill.relation_weight > 0,
            packed=packed,
            entry_bytes=SUM if packed else entry_bytes(wire_for(server, 1, config.rounds).kind, server.topk),
            micro_budget=max(keys.micro_budget, 0),  # where a device looks for its own: no more than a batch
            windows=config.data.windows,
            stride=config.data.stride,
            special=special,
            share=keys.share,
            scored=config.scored_share,
            heldout=config.data.holdout_fraction / (1 - config.data.holdout_fraction),
            teaches=config.teaches_inside,
            adaptive=keys.optimizer == "adamw",
        )


@dataclass(frozen=True)
class Part:
    """A device's part in a federation of students inside one another; of one student alone it is all of it.

    Attributes:
        size: of its own student.
        inner: of the smaller ones that it trains along.
        trained: weights that it trains and sends, the exits of those inside among them.
        received: weights that come down: exits of smaller students also where nobody trains them along.
        held: weights of all models in its memory.
    """

    size: Size
    inner: tuple[Size, ...]
    trained: int
    received: int
    held: int

    @classmethod
    def of(cls, size: Size, tiers: Sequence[Size], work: Work) -> Self:
        """``tiers``: all students of the federation, this one among them; none: it is alone."""
        smaller = tuple(one for one in tiers if one.parameters < size.parameters)
        whole = max((size, *tiers), key=lambda one: one.parameters)
        exits = size.exit * len({one.layers for one in smaller} - {size.layers})  # one depth has one exit
        inner, own = (smaller, exits) if work.teaches else ((), 0)
        models = whole.parameters + sum(one.trained for one in tiers if one != whole)  # the others share its embeddings
        return cls(size, inner, size.trained + own, size.trained + exits, models + own)


@dataclass(frozen=True)
class Cost:
    """What a student costs a device; megabytes are 10^6 bytes, times and energy of one round."""

    training_mb: float
    inference_mb: float
    latency_ms: float
    compute_s: float
    transfer_s: float
    up_mb: float
    down_mb: float
    energy_j: float

    @property
    def round_s(self) -> float:
        return self.compute_s + self.transfer_s


@dataclass(frozen=True)
class Speed:
    """Seconds of work: operations / rate, and a fixed time for each layer passed.

    Attributes:
        training, reading: operations per second in training batches, and of one sentence.
        training_layer_s, reading_layer_s: seconds.
    """

    training: float
    training_layer_s: float
    reading: float
    reading_layer_s: float

    @classmethod
    def of(cls, profile: DeviceProfile) -> Self:
        training, reading = operations_per_piece()
        return cls(
            training=profile.tokens_per_s * training,
            training_layer_s=profile.training_layer_ms / 1e3,
            reading=profile.single_tokens_per_s * reading,
            reading_layer_s=profile.layer_ms / 1e3,
        )

    def latency(self, size: Size, rows: int, length: int) -> float:
        """Seconds for one sentence, of so many windows."""
        return forward_flops(size, rows, length) / self.reading + size.layers * self.reading_layer_s

    def step(self, size: Size, rows: float, length: int) -> float:
        """Seconds of one training step."""
        return rows * training_flops(size, 1, length) / self.training + size.layers * self.training_layer_s


def predict_cost(size: Size, teacher: Size, profile: DeviceProfile, work: Work, tiers: Sequence[Size] = ()) -> Cost:
    """What a student costs a device in one round.

    Args:
        tiers: all students of a mixed federation, each inside the next larger one, this one among them.
    """
    part = Part.of(size, tiers, work)
    speed, (windows, length) = Speed.of(profile), work.cut(profile.length)
    # batches of the padded pieces of all examples, each of one at least
    shard = windows * profile.examples * PADDING
    rows = work.epochs * work.share * shard
    steps = math.ceil(rows * length / max(work.passing, windows * length))
    compute = steps * sum(speed.step(one, rows / steps, length) for one in (size, *part.inner))
    if work.deep:
        compute += rows * forward_flops(teacher, 1, length) / speed.training
    compute += work.scored * work.heldout * shard * forward_flops(size, 1, length) / speed.training
    up, down = work.entry_bytes * part.trained, work.down_bytes(part.received)
    transfer = 8 * (up + down) / (profile.bandwidth_mbit * MEGA)
    return Cost(
        training_mb=training_bytes(part, teacher, work) / MEGA,
        inference_mb=(weight_bytes(size) + flight_bytes(size, windows * length, length)) / MEGA,
        latency_ms=1e3 * speed.latency(size, windows, length),
        compute_s=compute,
        transfer_s=transfer,
        up_mb=up / MEGA,
        down_mb=down / MEGA,
        energy_j=profile.watts * (compute + transfer),
    )


def training_bytes(part: Part, teacher: Size, work: Work) -> int:
    """The most memory a round takes, when a batch is filled with the longest examples."""
    pieces = max(work.passing, work.longest * work.windows)  # the windows of a text pass together
    read = ROWS * work.longest  # a block of the teacher's
    per_trained = 4 + 4 + (8 if work.adaptive else 0) + 4 + (8 if work.packed else 0)
    together = (part.size, *part.inner)
    copies = 2 * sum(one.trained for one in together) if work.bf16 else 0
    kept = sum(activation_bytes(one, pieces, work.longest, work.bf16) for one in together)
    student = kept + flight_bytes(part.size, pieces, work.longest)
    beside = flight_bytes(teacher, pieces if work.deep else read, work.longest)
    busy = student + beside if work.deep else max(student, beside)
    buffers = BUFFERS + (BUFFERS_INSIDE if part.inner else 0)
    return buffers + weight_bytes(teacher) + 4 * part.held + per_trained * part.trained + copies + busy
