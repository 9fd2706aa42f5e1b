"""A rival for the benchmark: federated distillation as a Flower app is usually written, and tuned.

Flower's own FedAvg, one SuperNode per client, the stock simulation with one actor per core. Tuned: each actor
loads models and tokenised data once and keeps them, batches are padded to their own longest example, one
thread per actor, the fused optimiser. As usual: every client gets and returns all trained weights in a message
of its own, the teacher runs along with the student, in float32.
"""

import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from common.config import Config, from_flat
from common.dataset import FederatedDataset, open_dataset
from common.errors import Interrupted, RunFailed, place_of
from common.losses import pooled
from common.models import load_teacher
from common.seeding import generator
from common.store import cache_folder
from server.preparation import Federation
from simulations.bare_loop import ROUND, Lap, distillation_loss, learning_rate
from simulations.display import chatter_in
from simulations.runtime import OFFLINE, ends_within, start_ray
from simulations.simulate import INTERRUPTED, stop_signals

BATCH = 32  # 16 and 24 are no faster, 8 and 64 slower
WARM_UP, TIMED = 1, 2  # rounds

app = ClientApp()
_resident: dict[str, "_Resident"] = {}  # of this actor, by job


@dataclass(frozen=True)
class _Job:
    """What an actor is told; JSON in a message."""

    keys: dict[str, Any]
    dataset: str
    teacher: str
    student: str
    cohort: tuple[int, ...]


@dataclass(frozen=True)
class _Resident:
    config: Config
    data: FederatedDataset
    teacher: Any
    student: Any
    cohort: tuple[int, ...]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Distil the student on the node's own client and return its weights."""
    keys = message.content.config_records["config"]
    resident = _load(str(keys["job"]))
    began = time.perf_counter()
    weights = message.content.array_records["arrays"].to_torch_state_dict()
    client = resident.cohort[int(context.node_config["partition-id"])]
    batches = 1 if keys["server-round"] == WARM_UP else None
    examples = _train(resident, weights, client, batches)
    parameters = dict(resident.student.named_parameters())
    reply = RecordDict(
        {
            "arrays": ArrayRecord({name: parameters[name].detach() for name in weights}),
            "metrics": MetricRecord({"num-examples": examples, "seconds": time.perf_counter() - began}),
        }
    )
    return Message(reply, reply_to=message)


def _load(text: str) -> _Resident:
    if text not in _resident:
        torch.set_num_threads(1)
        job = _Job(**json.loads(text))
        config = from_flat(job.keys)
        data = open_dataset(cache_folder(config.runtime.cache), job.dataset)
        teacher, student = load_teacher(Path(job.teacher)), load_teacher(Path(job.student))
        _resident[text] = _Resident(config, data, teacher, student.train(), tuple(job.cohort))
    return _resident[text]


def _train(resident: _Resident, weights: dict[str, torch.Tensor], client: int, batches: int | None) -> int:
    config, student, data = resident.config, resident.student, resident.data.train
    student.load_state_dict(weights, strict=False)
    trained = [parameter.requires_grad_() for name, parameter in student.named_parameters() if name in weights]
    keys = config.client
    lr = learning_rate(config, ROUND)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=keys.weight_decay, fused=True)
    rows = resident.data.shard(client).train
    for epoch in range(keys.epochs):
        order = generator(config.seed, "usual", client, epoch).permutation(len(rows))
        starts = range(0, len(rows), BATCH)[:batches]
        for batch in (rows[order[start : start + BATCH]] for start in starts):
            inputs, pooling = data.tokens.batch(batch), data.tokens.pooling(batch)
            with torch.no_grad():
                soft = pooled(resident.teacher(**inputs).logits, pooling)
            logits = pooled(student(**inputs).logits, pooling)
            loss = distillation_loss(logits, soft, torch.from_numpy(data.labels[batch]), config)
            optimizer.zero_grad()
            loss.backward()
            if keys.clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(trained, keys.clip_norm)
            optimizer.step()
    return len(rows)


class TimedFedAvg(FedAvg):
    """Flower's FedAvg over all nodes, that sends the same weights in every round and clocks the last.

    Attributes:
        seconds: from the start of a round until its mean is there.
        busy: seconds that its clients took, all together.
        examples: of its clients.
    """

    def __init__(self, start: ArrayRecord, nodes: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
        self.arrays = start
        self.seconds, self.busy, self.examples = 0.0, 0.0, 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Start the clock."""
        self.began = time.perf_counter()
        return super().configure_train(server_round, self.arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stop the clock.

        Raises:
            RunFailed: a client is missing.
        """
        replies = list(replies)
        found = super().aggregate_train(server_round, replies)
        self.seconds = time.perf_counter() - self.began
        answers: list[Any] = [reply.content["metrics"] for reply in replies if not reply.has_error()]
        if len(answers) < self.min_train_nodes:
            raise RunFailed(f"usual Flower app: {self.min_train_nodes - len(answers)} clients gave no result")
        self.busy = sum(answer["seconds"] for answer in answers)
        self.examples = sum(answer["num-examples"] for answer in answers)
        return found


def usual_lap(federation: Federation, cohort: tuple[int, ...], actors: int, folder: Path) -> Lap:
    """One timed round of the app, after a warm-up round of one batch per client; Flower's log goes to ``folder``.

    Raises:
        RunFailed: the app did not finish.
        Interrupted: the user stopped it.
    """
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    job = _Job(
        federation.config.flat(),
        federation.data.key,
        str(federation.teacher.folder.resolve()),
        str(folder / "student"),
        cohort,
    )
    start = ArrayRecord({name: torch.from_numpy(array) for name, array in federation.weights().items()})
    server_app, outcome = ServerApp(), list[Any]()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        config = ConfigRecord({"job": json.dumps(asdict(job))})
        try:
            outcome.append(strategy.start(grid, start, num_rounds=TIMED, train_config=config))
        except BaseException as error:
            outcome.append(error)
            raise

    stop = threading.Event()
    # a stop ends the process: Flower's own strategy would wait for its clients first
    with chatter_in(folder / "log.txt"), stop_signals(stop) as prepared, ends_within(stop, 0.5, INTERRUPTED):
        strategy = TimedFedAvg(start, len(cohort))
        federation.student.save_pretrained(folder / "student")
        start_ray(actors)
        prepared()
        try:
            run_simulation(
                server_app=server_app,
                client_app=app,
                num_supernodes=len(cohort),
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
            )
        except Exception as error:
            outcome.append(error)
    if stop.is_set():
        raise Interrupted
    return _lap(strategy, outcome, federation, actors, folder)


def _lap(strategy: TimedFedAvg, outcome: list[Any], federation: Federation, actors: int, folder: Path) -> Lap:
    found = outcome[0] if outcome else RunFailed("usual Flower app: no result")
    if isinstance(found, RunFailed):
        raise found
    if isinstance(found, BaseException):
        where = f"{type(found).__name__}{place_of(found)}, see {folder / 'log.txt'}"
        raise RunFailed(f"usual Flower app: {where}") from None
    weights = found.arrays.to_torch_state_dict()
    update = {name: weights[name].float().numpy() - array for name, array in federation.weights().items()}
    examples = strategy.examples * federation.config.client.epochs
    return Lap(strategy.seconds, strategy.busy / min(actors, strategy.min_train_nodes), examples, update)
