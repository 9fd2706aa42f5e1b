"""The probe: what the machine it runs on can do, measured in seconds of work that a student would give it.

Small encoders of known arithmetic, of several depths and widths, train and read; a rate and a fixed time per layer are
fitted to what they took (least squares of relative errors, neither below zero). Other programs can only make a step
slower, so of several timings the shortest counts; the probe says how far its own fit is off.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from scipy.optimize import nnls

from clients.budget import joules, used
from common.config import Config
from common.cost import MEGA
from common.device import Compute, choose_compute, free_memory
from common.distillation import Student, begin, set_gradients, step
from common.models import freeze_embeddings
from common.objective import Batch
from common.progress import Progress
from common.recipe import make_recipe
from common.size import BATCH, LENGTH, Size, forward_flops, operations_per_piece, size_of, training_flops
from common.slim import Shape, build

SHAPES = ((1, 12, 1536), (3, 12, 1536), (3, 6, 768), (6, 3, 384))  # layers, heads, neurons; MiniLM's width
PIECES = 1000


@dataclass(frozen=True)
class Line:
    """Seconds = operations / rate + layers x fixed.

    Attributes:
        rate: operations per second.
        layer_s: fixed seconds for each layer.
        errors: of each shape, predicted / measured - 1.
    """

    rate: float
    layer_s: float
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """What the probe found.

    Attributes:
        cores: physical, or logical ones where these are unknown.
        threads: that computed.
        memory_mb: free for this process, on the device that computes.
        watts_from: ``rapl``, or the model.
    """

    compute: str
    cores: int
    threads: int
    memory_mb: float
    training: Line
    reading: Line
    watts: float
    watts_from: str

    def figures(self) -> dict[str, float]:
        """As keys of a device's table."""
        training, reading = operations_per_piece()
        return {
            "memory-mb": self.memory_mb,
            "tokens-per-s": self.training.rate / training,
            "single-tokens-per-s": self.reading.rate / reading,
            "layer-ms": 1e3 * self.reading.layer_s,
            "training-layer-ms": 1e3 * self.training.layer_s,
            "watts": self.watts,
        }

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "figures": self.figures()}


def probe(config: Config, progress: Progress) -> Measured:
    """Measure this machine, as one client of a run with these keys would use it.

    Training is timed at `BATCH` rows of `LENGTH` pieces, reading at one row.
    """
    torch.set_num_threads(config.runtime.threads)
    compute = choose_compute(config.runtime.device, config.client.precision)
    memory = free_memory(compute.device) / MEGA  # with the libraries loaded
    training, reading, sizes = [], [], []
    before, began = joules(), time.perf_counter()
    with progress.step("measure this machine", len(SHAPES)) as bar:
        for layers, heads, neurons in SHAPES:
            model, size = _encoder(layers, heads, neurons, compute)
            sizes.append(size)
            training.append(_least_seconds(_trainer(model, config, compute), 7, compute))
            reading.append(_least_seconds(_reader(model, compute), 30, compute))
            bar.advance()
    seconds = time.perf_counter() - began
    energy, source = used(before, joules(), seconds, config.runtime.threads)
    depths = [size.layers for size in sizes]
    return Measured(
        compute=compute.name,
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        threads=config.runtime.threads,
        memory_mb=memory,
        training=fit([training_flops(size, BATCH, LENGTH) for size in sizes], depths, training),
        reading=fit([forward_flops(size, 1, LENGTH) for size in sizes], depths, reading),
        watts=energy / seconds,
        watts_from=source,
    )


def fit(operations: Sequence[float], layers: Sequence[int], seconds: Sequence[float]) -> Line:
    """The rate and the fixed time per layer that come closest to the measured seconds, by relative error."""
    given, taken = np.array([operations, layers], dtype=np.float64).T, np.asarray(seconds, dtype=np.float64)
    scale = given.max(axis=0)  # so that both unknowns are seconds
    (slope, fixed), _ = nnls(given / scale / taken[:, None], np.ones(len(taken)))
    if slope == 0.0:  # so noisy that work seems to take no time: put all of the time down to it
        ratio = given[:, 0] / scale[0] / taken
        slope, fixed = float(ratio.sum() / (ratio**2).sum()), 0.0
    found = given / scale @ np.array([slope, fixed])
    return Line(float(scale[0] / slope), float(fixed / scale[1]), tuple((found / taken - 1.0).tolist()))


def _encoder(layers: int, heads: int, neurons: int, compute: Compute) -> tuple[Any, Size]:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=PIECES, hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=layers,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    whole = Shape.whole(config, tuple(range(layers)))
    shape = replace(
        whole,
        heads=tuple(kept[:heads] for kept in whole.heads),
        neurons=tuple(kept[:neurons] for kept in whole.neurons),
    )
    return build(config, shape).to(compute.device), size_of(config, shape)


def _trainer(model: Any, config: Config, compute: Compute) -> Callable[[], None]:
    """A real optimiser step of the distillation, outputs alone."""
    shape = Shape.whole(model.config, tuple(range(model.config.num_hidden_layers)))
    recipe = make_recipe(Config(client=config.client), 1, shape, model.config, regression=False)
    trained = freeze_embeddings(model, train_embeddings=False)
    weights = {name: parameter.detach().clone() for name, parameter in trained.items()}
    state = begin(Student.of(model, trained), weights, recipe)
    batch = Batch(
        _inputs(BATCH, compute), torch.zeros(BATCH, 2).to(compute.device), _labels(compute), {}, BATCH * LENGTH
    )
    return lambda: step(state, set_gradients(state, [batch], recipe=recipe, compute=compute), BATCH, recipe)


def _reader(model: Any, compute: Compute) -> Callable[[], None]:
    inputs = _inputs(1, compute)

    @torch.inference_mode()
    def read() -> None:
        model.eval()
        model.set_attn_implementation("sdpa")
        with compute.autocast():
            model(**inputs)

    return read


def _inputs(rows: int, compute: Compute) -> dict[str, torch.Tensor]:
    pieces = torch.arange(rows * LENGTH, device=compute.device).reshape(rows, LENGTH) % PIECES
    return {"input_ids": pieces, "attention_mask": torch.ones_like(pieces)}


def _labels(compute: Compute) -> torch.Tensor:
    return torch.arange(BATCH, device=compute.device) % 2


def _least_seconds(work: Callable[[], None], repeats: int, compute: Compute) -> float:
    taken = []
    for number in range(repeats + 2):
        began = time.perf_counter()
        work()
        if compute.device.type == "cuda":
            torch.cuda.synchronize(compute.device)
        if number >= 2:  # the first ones allocate
            taken.append(time.perf_counter() - began)
    return min(taken)
