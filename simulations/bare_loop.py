"""The floor of a round: plain PyTorch, no federation software.

The same clients, batches, trained weights, cached teacher outputs and precision as a federated round, written
as anybody would write it: in one process that uses every core, or in one process per core. `fedistill bench`
times both beside the real thing.
"""

import copy
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
import torch.nn.functional as F
from numpy.typing import NDArray

from common.batches import token_budget_batches
from common.config import Config
from common.dataset import open_dataset
from common.device import choose_compute
from common.errors import RunFailed
from common.losses import pooled
from common.models import set_training
from common.seeding import generator
from common.store import cache_folder
from server.assignment import assign

ROUND = 1
Update = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Lap:
    """One timed round of one arm.

    Attributes:
        seconds: from the first client's start until the mean update is there.
        training_seconds: what each worker spent training clients, the mean of the workers; the rest of
            ``seconds`` is messages, waiting and adding up.
        examples: trained on, all epochs.
        update: example-weighted mean of the clients' updates by parameter name.
    """

    seconds: float
    training_seconds: float
    examples: int
    update: Update

    @property
    def speed(self) -> float:
        """Examples per second."""
        return self.examples / self.seconds


@dataclass(frozen=True)
class Plan:
    """What a process needs to train a cohort; travels to other processes.

    Attributes:
        dataset: key of the prepared dataset.
        student: the model as the round starts; never trained itself.
        trained: names of its trained parameters.
        soft: the teacher's logits of each client's training rows.
    """

    config: Config
    dataset: str
    student: Any
    trained: tuple[str, ...]
    soft: dict[int, NDArray[np.float32]]

    @property
    def cohort(self) -> tuple[int, ...]:
        return tuple(self.soft)


class Loop:
    """A resident student that trains one client after the other."""

    def __init__(self, plan: Plan) -> None:
        self.config, self.soft = plan.config, plan.soft
        self.compute = choose_compute(plan.config.runtime.device, plan.config.client.precision)
        self.data = open_dataset(cache_folder(plan.config.runtime.cache), plan.dataset)
        self.model = copy.deepcopy(plan.student)
        set_training(self.model)  # with transformers' usual attention the floor would be lower
        parameters = dict(self.model.named_parameters())
        self.trained = {name: parameters[name] for name in plan.trained}
        self.start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def train(self, clients: Sequence[int], total: dict[str, torch.Tensor], batches: int | None = None) -> int:
        """Train each client from the start and add its update times its examples to ``total``.

        Args:
            batches: stop each epoch after so many; a warm-up needs no more than one.

        Returns:
            The clients' examples.
        """
        examples = 0
        for client in clients:
            rows = self.data.shard(client).train
            self._train_one(client, rows, batches)
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    total[name].add_(parameter - self.start[name], alpha=len(rows))
            examples += len(rows)
        return examples

    def _train_one(self, client: int, rows: NDArray[np.int64], batches: int | None) -> None:
        keys, tokens, labels = self.config.client, self.data.train.tokens, self.data.train.labels
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.start[name])
        lr = learning_rate(self.config, ROUND)
        optimizer = torch.optim.AdamW(self.trained.values(), lr=lr, weight_decay=keys.weight_decay, fused=True)
        lengths, soft = tokens.lengths(rows), torch.from_numpy(self.soft[client].copy())
        for epoch in range(keys.epochs):
            rng = generator(self.config.seed, "batches", ROUND, client, epoch)
            for places in token_budget_batches(lengths, keys.token_budget, rng)[:batches]:
                with self.compute.autocast():
                    logits = self.model(**tokens.batch(rows[places])).logits
                logits = pooled(logits, tokens.pooling(rows[places]))
                hard = torch.from_numpy(labels[rows[places]])
                loss = distillation_loss(logits, soft[places], hard, self.config)
                optimizer.zero_grad()
                loss.backward()
                if keys.clip_norm > 0:
                    torch.nn.utils.clip_grad_norm_(self.trained.values(), keys.clip_norm)
                optimizer.step()


class OneProcess:
    """The arm "1 x N": this process trains the whole cohort, with all threads."""

    def __init__(self, plan: Plan, threads: int) -> None:
        self.plan, self.threads = plan, threads
        self.loop = Loop(plan)
        torch.set_num_threads(threads)
        self.loop.train(plan.cohort[:1], _zeros(self.loop.start), batches=1)

    def lap(self) -> Lap:
        torch.set_num_threads(self.threads)
        began = time.perf_counter()
        total = _zeros(self.loop.start)
        examples = self.loop.train(self.plan.cohort, total)
        update = {name: (tensor / examples).numpy() for name, tensor in total.items()}
        seconds = time.perf_counter() - began
        return Lap(seconds, seconds, examples * self.plan.config.client.epochs, update)


class ProcessPerCore:
    """The arm "N x 1": processes of one thread, each with its share of the cohort, balanced by examples.

    They are started and warmed up once; a lap is a word to each, their training, and adding up their sums,
    which they leave in shared memory.
    """

    def __init__(self, plan: Plan, sizes: dict[int, int], count: int) -> None:
        spawn = torch.multiprocessing.get_context("spawn")
        self.plan = plan
        self.workers: list[tuple[Any, Any, torch.Tensor]] = []
        parameters = dict(plan.student.named_parameters())
        self.shapes = {name: parameters[name].shape for name in plan.trained}
        for share in assign(plan.cohort, sizes, range(count)).values():
            here, there = spawn.Pipe()
            total: Any = torch.zeros(sum(shape.numel() for shape in self.shapes.values()))
            total.share_memory_()
            process = spawn.Process(target=_serve, args=(plan, share, total, there), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here, total))
        for _, pipe, _ in self.workers:
            _hear(pipe)

    def lap(self) -> Lap:
        began = time.perf_counter()
        for _, pipe, _ in self.workers:
            pipe.send("go")
        examples, busy = zip(*(_hear(pipe) for _, pipe, _ in self.workers), strict=True)
        mean = torch.stack([total for _, _, total in self.workers]).sum(0) / sum(examples)
        update = {name: tensor.numpy() for name, tensor in _parts(mean, self.shapes).items()}
        seconds = time.perf_counter() - began
        return Lap(seconds, sum(busy) / len(busy), sum(examples) * self.plan.config.client.epochs, update)

    def close(self) -> None:
        """End the processes."""
        for process, pipe, _ in self.workers:
            pipe.close()  # they wait for a word, and end when nobody can give one
            process.join(5)
            process.kill()


def learning_rate(config: Config, round_number: int) -> float:
    """``client.lr`` in a round, as ``client.lr-decay`` lets it fall."""
    falling = config.client.lr_decay == "linear" and config.rounds > 1
    return config.client.lr * (1.0 - 0.9 * (round_number - 1) / (config.rounds - 1) if falling else 1.0)


def distillation_loss(logits: torch.Tensor, soft: torch.Tensor, labels: torch.Tensor, config: Config) -> Any:
    """Hinton's loss with the config's weights and temperature; squared errors where the task is a score."""
    keys = config.distill
    if logits.shape[1] == 1:
        scores = logits[:, 0]
        return keys.soft_weight * F.mse_loss(scores, soft[:, 0]) + keys.hard_weight * F.mse_loss(scores, labels.float())
    heat = keys.temperature
    kl = F.kl_div(F.log_softmax(logits / heat, -1), F.softmax(soft / heat, -1), reduction="batchmean")
    return keys.soft_weight * heat**2 * kl + keys.hard_weight * F.cross_entropy(logits, labels)


def _serve(plan: Plan, clients: tuple[int, ...], shared: torch.Tensor, pipe: Any) -> None:
    """A process of `ProcessPerCore`: says that it is warm, then trains its share at every word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    torch.set_num_threads(1)
    loop = Loop(plan)
    total = _parts(shared, {name: tensor.shape for name, tensor in loop.start.items()})
    loop.train(clients[:1], total, batches=1)
    pipe.send("warm")
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        began = time.perf_counter()
        shared.zero_()
        examples = loop.train(clients, total)
        pipe.send((examples, time.perf_counter() - began))


def _hear(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RunFailed("a process of the bare loop ended") from None


def _zeros(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def _parts(flat: torch.Tensor, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Views of one long tensor, by parameter name."""
    pieces = torch.split(flat, [shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape) for piece, (name, shape) in zip(pieces, shapes.items(), strict=True)}
