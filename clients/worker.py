"""One process that works for many clients, one after the other, with one resident teacher and student.

In a simulation a worker gets a list of clients; on the edge the list is the device itself. What a message
leaves behind in the process (models, mapped data, cached outputs) saves time and never changes a result.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.distillation import ClientUpdate, Student, TrainingShard, distil, make_recipe
from clients.evaluation import held_out_statistics
from clients.teacher_cache import TeacherCache
from common.config import Config
from common.dataset import FederatedDataset, open_dataset, tokenizer_hash
from common.device import choose_compute
from common.fixed_point import NotFinite, add_into
from common.hashing import hash_json, hash_tensors, runtime_fingerprint
from common.inference import predict
from common.metrics import statistics_length
from common.models import choose_layers, cut_student, freeze_embeddings, load_teacher, pair_hidden_layers
from common.store import cache_folder
from common.wire import NOT_FINITE, ClientLine

Sums = dict[str, NDArray[np.int64]]
TEACH_AT_ONCE = 8  # clients whose examples share the teacher's blocks: small shards would leave most rows empty


class ClientRefused(Exception):
    """A client has no part in the sum, for a reason that is safe to tell."""


class Worker:
    """What stays in a process between messages.

    Args:
        config: the run's keys.
        teacher_folder, teacher_hash: the shared teacher; its weights are compared with the hash.
        dataset_key: the prepared dataset in this machine's cache.

    Raises:
        ValueError: the teacher in the folder is another one.
    """

    def __init__(self, config: Config, teacher_folder: str, teacher_hash: str, dataset_key: str) -> None:
        torch.set_num_threads(config.runtime.threads)
        self.config = config
        self.compute = choose_compute(config.runtime.device, config.client.precision)
        cache = cache_folder(config.runtime.cache)
        self.data: FederatedDataset = open_dataset(cache, dataset_key)
        self.spec = self.data.task.score_spec
        self.teacher = load_teacher(Path(teacher_folder))
        if hash_tensors(self.teacher.state_dict()) != teacher_hash:
            raise ValueError("the teacher's weights are not those of this run")
        have = self.teacher.config.num_hidden_layers
        layers = choose_layers(config.student.layer_selection, config.student.layers, have)
        self.pairs = pair_hidden_layers(config.distill.hidden_layers, len(layers), have)
        self.teacher.to(self.compute.device)
        model = cut_student(self.teacher, layers, config.student.dropout).to(self.compute.device)
        self.student = Student(model, freeze_embeddings(model, config.student.train_embeddings))
        space = {
            "teacher": teacher_hash,
            "tokenizer": tokenizer_hash(Path(teacher_folder)),
            "max-length": config.data.max_length,
            "compute": self.compute.name,
            **runtime_fingerprint(Path(teacher_folder), config.runtime.threads),
        }
        self.outputs = TeacherCache(cache / "teacher-outputs", hash_json(space)[:32], self.data.task.num_labels)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays a message must bring."""
        return {name: tuple(parameter.shape) for name, parameter in self.student.trained.items()}

    def teach(self, clients: Sequence[int], finished: Callable[[], None]) -> list[ClientLine]:
        """Make sure that the teacher's outputs for all rows of these clients are on disk."""
        lines = []
        for chunk in (clients[start : start + TEACH_AT_ONCE] for start in range(0, len(clients), TEACH_AT_ONCE)):
            began = time.perf_counter()
            shards = [self.data.shard(client) for client in chunk]
            self.teacher_logits(np.concatenate([part for shard in shards for part in (shard.train, shard.heldout)]))
            each = (time.perf_counter() - began) / len(chunk)
            for client, shard in zip(chunk, shards, strict=True):
                lines.append(ClientLine(client, len(shard), each))
                finished()
        return lines

    def train(
        self, arrays: dict[str, NDArray[np.float32]], round_number: int, clients: Sequence[int],
        finished: Callable[[], None],
    ) -> tuple[Sums, list[ClientLine]]:  # fmt: skip
        """Distil on each client from the same weights and add the updates up.

        A client that fails is left out of the sum and says why in its line; the others go on.
        """
        weights = {name: torch.from_numpy(array.copy()).to(self.compute.device) for name, array in arrays.items()}
        total: Sums = {name: np.zeros(shape, dtype=np.int64) for name, shape in self.shapes.items()}
        lines = []
        for client in clients:
            began = time.perf_counter()
            try:
                update = self._train_one(weights, round_number, client)
            except Exception as error:  # whatever one client's data does, the others go on
                lines.append(ClientLine(client, 0, time.perf_counter() - began, problem=_kind(error)))
            else:
                for name, part in update.arrays.items():
                    add_into(total[name], part)
                line = ClientLine(client, update.examples, time.perf_counter() - began)
                loss, soft, hard, hidden = update.losses
                lines.append(replace(line, loss=loss, soft_loss=soft, hard_loss=hard, hidden_loss=hidden))
            finished()
        return total, lines

    def evaluate(
        self, arrays: dict[str, NDArray[np.float32]], clients: Sequence[int], finished: Callable[[], None]
    ) -> tuple[Sums, Sums, list[ClientLine]]:
        """Statistics of the student, and of the teacher, on the held-out rows of some clients."""
        with torch.no_grad():
            for name, parameter in self.student.trained.items():
                parameter.copy_(torch.from_numpy(arrays[name].copy()))
        length = statistics_length(self.spec)
        total: dict[str, Sums] = {
            who: {"statistics": np.zeros(length, dtype=np.int64)} for who in ("student", "teacher")
        }
        lines = []
        for client in clients:
            began = time.perf_counter()
            rows = self.data.shard(client).heldout
            try:
                logits = predict(self.student.model, self.data.train.tokens, rows, self.compute)
                student, score = held_out_statistics(self.spec, self.data.train, rows, logits)
                teacher, _ = held_out_statistics(self.spec, self.data.train, rows, self.teacher_logits(rows))
            except Exception as error:
                lines.append(ClientLine(client, 0, time.perf_counter() - began, problem=_kind(error)))
            else:
                add_into(total["student"]["statistics"], student)
                add_into(total["teacher"]["statistics"], teacher)
                lines.append(ClientLine(client, len(rows), time.perf_counter() - began, score=score))
            finished()
        return total["student"], total["teacher"], lines

    def _train_one(self, weights: dict[str, Any], round_number: int, client: int) -> ClientUpdate:
        rows = self.data.shard(client).train
        if not len(rows):
            raise ClientRefused("no training examples")
        return distil(
            self.student,
            weights,
            TrainingShard(self.data.train, rows, self.teacher_logits(rows)),
            recipe=make_recipe(self.config, round_number, self.pairs, self.data.task.regression),
            compute=self.compute,
            seed=self.config.seed,
            who=(round_number, client),
            teacher=self.teacher,
        )

    def teacher_logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), num_labels) the teacher's outputs, from disk where they are there."""

        def compute(places: NDArray[np.int64]) -> NDArray[np.float32]:
            return predict(self.teacher, self.data.train.tokens, rows[places], self.compute)

        return self.outputs.outputs(np.asarray(self.data.train.keys[rows]), compute)


def _kind(error: Exception) -> str:
    """What may be told of an error: our own words, else its kind alone; messages can quote private text."""
    if isinstance(error, NotFinite):
        return NOT_FINITE
    return str(error) if isinstance(error, ClientRefused) else type(error).__name__
