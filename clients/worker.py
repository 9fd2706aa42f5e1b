"""One process that works for many clients, one after the other, with one resident teacher and student.

In a simulation a worker gets a list of clients; on the edge the list is the device itself. What a message
leaves behind in the process (models, mapped data, cached outputs) saves time and never changes a result.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.budget import limit_of
from clients.clipped import clipped
from clients.distillation import ClientUpdate, distil
from clients.error_feedback import ErrorFeedback, compress_with_feedback
from clients.evaluation import held_out_statistics
from clients.example_privacy import begin_round
from clients.ledger import Declined, Ledger, data_hash
from clients.round_files import MissingState
from clients.teacher_cache import TeacherCache
from common.clipping import BELOW_SHAPE
from common.compression import Wire, compress, wire_for
from common.config import Config
from common.dataset import FederatedDataset, open_dataset, tokenizer_hash
from common.device import choose_compute
from common.distillation import Room
from common.errors import told_of
from common.fixed_point import ExactSum, NotFinite, Rows, add_into
from common.hashing import hash_json, hash_tensors, runtime_fingerprint
from common.importance import MOST, importance
from common.inference import predict
from common.keys import AUTO_BUDGET
from common.metrics import statistics_length
from common.models import dropouts_of, load_teacher
from common.nested import Tiers
from common.noise import SQUARES_SHAPE, squares_of
from common.objective import Examples
from common.priors import prior_shift
from common.probe import SHARE, find_room
from common.pupil import open_pupil
from common.recipe import Recipe, make_recipe
from common.seeding import generator
from common.store import cache_folder
from common.tiers import group_name
from common.wire import NOT_FINITE, ClientLine, Instruction, Shapes, own_update

Groups = Mapping[str, Mapping[str, NDArray[Any] | Rows]]
AT_ONCE = 256  # examples that share a frozen model's blocks: small shards alone would leave most rows empty


Finished = Callable[[int], None]  # told how many more clients are done
Scored = tuple[ClientLine, NDArray[np.int64], NDArray[np.int64]]  # and the student's and the teacher's statistics


class ClientRefused(Exception):
    """A client has no part in the sum, for a reason that is safe to tell."""


class Worker:
    """What stays in a process between messages.

    Args:
        config: the run's keys.
        teacher, teacher_hash: folder of the shared teacher; its weights are compared with the hash.
        dataset: key of the prepared dataset in this machine's cache.
        student, student_hash: key of the prepared student, likewise.
        ledger: where its one client's privacy ledger lies; empty: by the clients' data, in the cache.

    Raises:
        ValueError: the teacher in the folder, or the student, is another one; or the student drops out other shares of
            its states than the run says.
    """

    def __init__(
        self,
        config: Config,
        *,
        teacher: str,
        teacher_hash: str,
        dataset: str,
        student: str,
        student_hash: str,
        ledger: str = "",
    ) -> None:
        torch.set_num_threads(config.runtime.threads)
        self.config = config
        self.compute = choose_compute(config.runtime.device, config.client.precision)
        cache = cache_folder(config.runtime.cache)
        self.data: FederatedDataset = open_dataset(cache, dataset)
        self.spec = self.data.task.score_spec
        self.teacher = load_teacher(Path(teacher))
        if hash_tensors(self.teacher.state_dict()) != teacher_hash:
            raise ValueError("the teacher's weights are not those of this run")
        self.teacher.to(self.compute.device)
        self.pupil = open_pupil(cache / "students" / student, self.data, cache)
        if self.pupil.hash != student_hash:
            raise ValueError("the student's weights are not those of this run")
        if dropouts_of(self.pupil.model) - {config.student.dropout}:  # a norm that others have a part in is no bound
            raise ValueError("the student's dropout is not that of this run")
        whole, width = self.pupil.model.to(self.compute.device), int(self.teacher.config.hidden_size)
        self.tiers = Tiers(config, whole, self.pupil.shape, width)
        self.students = [self.tiers.student(tier) for tier in range(len(self.tiers))]
        self.tier_of = config.tier_of(self.data.clients)
        self._rooms: dict[int, Room] = {}  # by tier, found with the first client
        space = {
            "teacher": teacher_hash,
            "tokenizer": tokenizer_hash(Path(teacher)),
            "windows": [config.data.max_length, config.data.windows, config.data.stride],
            "compute": self.compute.name,
            **runtime_fingerprint(Path(teacher), config.runtime.threads),
        }
        self.cache, self.ledger, self.ledgers = cache, ledger, cache / "ledgers"
        self.outputs = TeacherCache(cache / "teacher-outputs", hash_json(space)[:32], self.data.task.num_labels)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays that are trained."""
        return self.tiers.shapes

    def expects(self, kind: str, instruction: Instruction) -> Shapes:
        """The arrays that a message of this kind brings: no more than the largest of its clients' students."""
        return self.tiers[max(int(self.tier_of[client]) for client in instruction.clients)].sent

    def totals(self, tier: int, round_number: int) -> Shapes:
        """The arrays of a round's sum."""
        return self.tiers[tier].held

    def teach(self, clients: Sequence[int], finished: Finished) -> list[ClientLine]:
        """Make sure that the teacher's outputs for all rows of these clients are on disk."""
        lines = []
        for chunk in self._together(clients, lambda client: len(self.data.shard(client))):
            began = time.perf_counter()
            shards = [self.data.shard(client) for client in chunk]
            self.teacher_logits(np.concatenate([part for shard in shards for part in (shard.train, shard.heldout)]))
            each = (time.perf_counter() - began) / len(chunk)
            lines += [ClientLine(client, len(shard), each) for client, shard in zip(chunk, shards, strict=True)]
            finished(len(chunk))
        return lines

    def weigh(self, clients: Sequence[int], finished: Finished) -> tuple[Groups, list[ClientLine]]:
        """The sum over some clients of how much each head and neuron of the student matters on their examples.

        Raises:
            ClientRefused: the run chooses none so; the sums would tell of examples that it promises to hide.
        """
        if not self.config.student.is_weighed or self.config.privacy.unit != "none":
            raise ClientRefused("the keys of this run have no heads and neurons chosen on its clients' examples")
        shape, recipe = self.pupil.shape, self._recipe(1)
        total = ExactSum({"heads": _matrix(shape.heads), "neurons": _matrix(shape.neurons)})
        lines = []
        for client in clients:
            began = time.perf_counter()
            try:
                heads, neurons = importance(
                    self.pupil.model,
                    self._examples(client),
                    recipe=recipe,
                    compute=self.compute,
                    seed=self.config.seed,
                    client=client,
                )
                count = min(len(self.data.shard(client).train), MOST)
                total.add({"heads": heads, "neurons": neurons}, count)
            except Exception as error:  # whatever one client's data does, the others go on
                lines.append(ClientLine(client, 0, time.perf_counter() - began, problem=reason_of(error)))
            else:
                lines.append(ClientLine(client, count, time.perf_counter() - began))
            finished(1)
        return {"update": total.compact}, lines

    def train(
        self, arrays: dict[str, NDArray[np.float32]], instruction: Instruction, finished: Finished
    ) -> tuple[Groups, list[ClientLine]]:
        """Distil on each client from the same weights.

        A client that fails has no part in the result and says why in its line; the others go on.

        Returns:
            Groups of arrays to send: the sum of the updates of each tier that has clients here, or each client's own
            where that is asked for.
        """
        tensors = {name: _tensor(array).to(self.compute.device) for name, array in arrays.items()}
        tiers = sorted({int(self.tier_of[client]) for client in instruction.clients})
        received = {tier: self._starting(tier, tensors) for tier in tiers}
        growing, privacy = self.config.client.grow_batch, self.config.privacy
        extra = {**(SQUARES_SHAPE if growing else {}), **(BELOW_SHAPE if privacy.adaptive_clip else {})}
        totals = {self._sum(tier): ExactSum({**self.totals(tier, instruction.round), **extra}) for tier in tiers}
        wire = wire_for(self.config.server, instruction.round, self.config.rounds)
        packed = self.config.server.packing == "on"
        groups: dict[str, dict[str, NDArray[Any]]] = {}
        lines = []
        for client, base in zip(instruction.clients, instruction.feedback, strict=True):
            began, tier = time.perf_counter(), int(self.tier_of[client])
            try:
                update = self._train_one(received[tier], instruction, client, base)
                if privacy.unit == "client":
                    update = clipped(update, instruction.clip_norm, adaptive=packed and privacy.adaptive_clip > 0)
                if packed:
                    squares = squares_of(update.arrays) if growing else {}
                    totals[self._sum(tier)].add(update.arrays | squares, update.weight)
                else:
                    groups[own_update(client)] = self._compress(update, instruction, client, base, wire)
            except Exception as error:  # whatever one client's data does, the others go on
                lines.append(ClientLine(client, 0, time.perf_counter() - began, problem=reason_of(error)))
            else:
                told = {**update.losses, **update.spent}
                lines.append(ClientLine(client, update.examples, time.perf_counter() - began, **told))
            finished(1)
        sums = {name: total.compact for name, total in totals.items()}
        return (sums if packed else groups), lines

    def evaluate(
        self, arrays: dict[str, NDArray[np.float32]], instruction: Instruction, finished: Finished
    ) -> tuple[Groups, list[ClientLine]]:
        """Statistics of each tier's student, and of the teacher, on the held-out rows of the tier's clients."""
        tensors = {name: _tensor(array) for name, array in arrays.items()}
        groups: dict[str, dict[str, NDArray[np.int64]]] = {}
        lines = []
        for tier in sorted({int(self.tier_of[client]) for client in instruction.clients}):
            if tensors:
                self.tiers.load(tier, tensors)
            chosen = [client for client in instruction.clients if self.tier_of[client] == tier]
            length = statistics_length(self.spec)
            student, teacher = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
            for chunk in self._together(chosen, lambda client: len(self._held_out(client))):
                try:
                    parts = self._score(chunk, tier)
                except Exception:  # one of them fails: the others shall not
                    parts = [part for client in chunk for part in self._score_or_tell(client, tier)]
                for line, own, taught in parts:
                    lines.append(line)
                    if not line.problem:
                        add_into(student, own)
                        add_into(teacher, taught)
                finished(len(chunk))
            groups[self._group("student", tier)] = {"statistics": student}
            groups[self._group("teacher", tier)] = {"statistics": teacher}
        return groups, lines

    def _sum(self, tier: int) -> str:
        """The sum that a tier's clients are added up in."""
        return self._group("update", tier)

    def _group(self, name: str, tier: int) -> str:
        return group_name(name, tier, len(self.tiers))

    def _together(self, clients: Sequence[int], size: Callable[[int], int]) -> Iterator[list[int]]:
        """The clients in their order, in lists of about `AT_ONCE` examples."""
        chunk: list[int] = []
        rows = 0
        for client in clients:
            chunk.append(client)
            rows += size(client)
            if rows >= AT_ONCE:
                yield chunk
                chunk, rows = [], 0
        if chunk:
            yield chunk

    def _score(self, clients: Sequence[int], tier: int) -> list[Scored]:
        """The clients' lines and statistics; a row's output does not depend on the company it is computed in."""
        began = time.perf_counter()
        shards = [self._held_out(client) for client in clients]
        rows = np.concatenate(shards)
        logits = predict(self.tiers[tier].model, self.pupil.data.train.tokens, rows, self.compute)
        soft = self.teacher_logits(rows)
        found, start = [], 0
        each = (time.perf_counter() - began) / len(clients)
        for client, own in zip(clients, shards, strict=True):
            mine = slice(start, start + len(own))
            student, score = held_out_statistics(self.spec, self.data.train, own, logits[mine])
            teacher, _ = held_out_statistics(self.spec, self.data.train, own, soft[mine])
            found.append((ClientLine(client, len(own), each, score=score), student, teacher))
            start += len(own)
        return found

    def _held_out(self, client: int) -> NDArray[np.int64]:
        """Rows that a client scores: the first of them where its part of the counts has a bound."""
        keys, rows = self.config.privacy, self.data.shard(client).heldout
        if keys.unit == "example" and self.ledger and Ledger(Path(self.ledger), self._keys(rows)).knows_any():
            raise ClientRefused("it has trained on some of what this run holds out; give the seed and holdout of then")
        return rows[: keys.scores_examples] if keys.scores_share else rows

    def _keys(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(len(rows), 16) the examples' content keys."""
        return np.asarray(self.data.train.keys[rows])

    def _score_or_tell(self, client: int, tier: int) -> list[Scored]:
        try:
            return self._score([client], tier)
        except Exception as error:
            nothing = np.zeros(0, dtype=np.int64)
            return [(ClientLine(client, 0, 0.0, problem=reason_of(error)), nothing, nothing)]

    def _compress(
        self, update: ClientUpdate, instruction: Instruction, client: int, base: int, wire: Wire
    ) -> dict[str, NDArray[Any]]:
        """A client's own update as it travels; what it loses is kept for the client's next round."""
        number = instruction.round
        rng = generator(self.config.seed, "wire", number, client)
        arrays = {
            name: array.dense(self.shapes[name]) if isinstance(array, Rows) else array
            for name, array in update.arrays.items()
        }
        if wire.kind == "fp32":  # as they are: copies, because the next client trains in the same place
            return {name: part.copy() for name, part in compress(arrays, wire, rng).items()}
        memory = ErrorFeedback(self.cache / "error-feedback" / instruction.run, self.config.server.keep_checkpoints)
        parts, residual = compress_with_feedback(arrays, memory.load(client, base, self.shapes), wire, rng)
        memory.save(client, number, base, residual)
        return parts

    def _starting(self, tier: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """What a tier's clients start from, of a message's tensors."""
        return self.tiers.part(tier, tensors)

    def _train_one(self, received: dict[str, Any], instruction: Instruction, client: int, base: int) -> ClientUpdate:
        """What a client makes of its tier's tensors; ``base``: the round of its last answer that was taken."""
        tier = int(self.tier_of[client])
        recipe, examples, teacher = self._lesson(instruction, client)
        compute, private = self.compute, None
        spent: dict[str, float | None] = {}
        if self.config.privacy.unit == "example":
            # a norm that is rounded as bf16 rounds would be no bound; and what is noised is not clipped once more
            compute, recipe = replace(compute, bf16=False), replace(recipe, clip_norm=0.0)
            keys = self._keys(examples.rows)
            ledger = Path(self.ledger) if self.ledger else self.ledgers / data_hash(keys)
            private, spent = begin_round(self.config, instruction, keys, cache=self.cache, ledger=ledger)
        update = distil(
            self.students[tier],
            received,
            examples,
            recipe=recipe,
            compute=compute,
            seed=self.config.seed,
            who=(instruction.round, client),
            teacher=teacher,
            room=self._room(tier, received, examples, recipe),
            private=private,
            spent=limit_of(self.config.client, self.config.runtime.threads),
        )
        return replace(update, spent=spent)

    def _lesson(self, instruction: Instruction, client: int) -> tuple[Recipe, Examples, Any]:
        """How a client learns in a round, from what, and the model that runs along where the recipe needs one."""
        examples, places = self._examples(client), self.drawn(instruction.round, client)
        if len(places) < len(examples.rows):
            examples = replace(examples, rows=examples.rows[places], soft=examples.soft[places])
        return self._round_recipe(instruction, int(self.tier_of[client])), examples, self.teacher

    def drawn(self, round_number: int, client: int) -> NDArray[np.int64]:
        """(n,) places, ascending, among a client's rows: those that a round's passes over its task are over."""
        count = len(self._rows_of(client))
        part = self.config.client.part_of(count)
        if part == count:
            return np.arange(count)
        rng = generator(self.config.seed, "examples", round_number, client)
        return np.sort(rng.choice(count, part, replace=False))

    def _round_recipe(self, instruction: Instruction, tier: int) -> Recipe:
        recipe = self._recipe(instruction.round)
        if instruction.token_budget:  # passes in parts of the first rounds' size: it takes no more memory
            recipe = replace(recipe, token_budget=instruction.token_budget)
        return self.tiers.recipe(tier, recipe, self.config.distill.relation_heads, self.teacher.config)

    def _recipe(self, round_number: int) -> Recipe:
        return make_recipe(self.config, round_number, self.pupil.shape, self.teacher.config, self.data.task.regression)

    def _room(self, tier: int, weights: dict[str, Any], examples: Examples, recipe: Recipe) -> Room | None:
        """What this device has room for, where the keys leave it open; found once."""
        keys, limit = self.config.runtime, self.config.client.memory_limit * 10**6
        if (self.config.client.micro_budget == AUTO_BUDGET or limit) and tier not in self._rooms:
            workers = keys.workers or max((os.cpu_count() or 1) // keys.threads, 1)  # they share the device
            self._rooms[tier] = find_room(
                self.students[tier], weights, examples, recipe=recipe, compute=self.compute, teacher=self.teacher,
                share=SHARE / workers, limit=limit,
            )  # fmt: skip
        return self._rooms.get(tier)

    def _examples(self, client: int) -> Examples:
        rows = self._rows_of(client)
        return Examples(
            self.pupil.data.train, rows, self.teacher_logits(rows), self.pupil.taught, shift=self._shift(rows)
        )

    def _rows_of(self, client: int) -> NDArray[np.int64]:
        """Those that a client trains on."""
        rows = self.data.shard(client).train
        if not len(rows):
            raise ClientRefused("no training examples")
        return rows

    def _shift(self, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """What a client's own shares of the classes do, where that is taken out."""
        if not self.config.distill.prior_correction:
            return None
        return prior_shift(self.data.train.labels[rows], self._public_labels, self.data.task.num_labels)

    @cached_property
    def _public_labels(self) -> NDArray[np.int64]:
        return np.asarray(self.data.train.labels[np.asarray(self.data.public)])

    def teacher_logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), num_labels) the teacher's outputs, from disk where they are there."""

        def compute(places: NDArray[np.int64]) -> NDArray[np.float32]:
            return predict(self.teacher, self.data.train.tokens, rows[places], self.compute)

        return self.outputs.outputs(np.asarray(self.data.train.keys[rows]), compute)


def _matrix(rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    return len(rows), len(rows[0])


def _tensor(array: NDArray[np.float32]) -> Any:
    """The array as a tensor, for reading, in the same memory; torch would warn that it must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def reason_of(error: Exception) -> str:
    """What may be told of an error: our own words, else its kind alone; messages can quote private text."""
    if isinstance(error, NotFinite):
        return NOT_FINITE
    return str(error) if isinstance(error, ClientRefused | MissingState | Declined) else told_of(error)
