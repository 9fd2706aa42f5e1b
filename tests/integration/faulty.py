"""ClientApps that misbehave, for tests: each behaves like ours but for one client or one kind of reply."""

import os
import signal
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

import clients.app as ours
import clients.worker as worker_module


def app_with(spoil: Callable[[Message], Message]) -> ClientApp:
    """Our app, with its training reply passed through ``spoil``."""
    app = ClientApp()
    app.query("teach")(ours.teach)
    app.evaluate()(ours.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return spoil(ours.train(message, context))

    return app


def first_node_only(change: Callable[[ArrayRecord], None]) -> Callable[[Message], Message]:
    """Spoil only the reply that holds client 0, so that another node stays honest."""

    def spoil(reply: Message) -> Message:
        if '"client": 0,' in str(reply.content["clients"]["json"]):
            change(reply.content["update"])
        return reply

    return spoil


def with_nan(record: ArrayRecord) -> None:
    name = next(iter(record))
    record[name] = Array(np.full(record[name].shape, np.nan, dtype=np.float64))


def with_wrong_shape(record: ArrayRecord) -> None:
    name = next(iter(record))
    record[name] = Array(np.zeros((3, 3), dtype=np.int64))


def with_wrong_key(record: ArrayRecord) -> None:
    record["another"] = record.pop(next(iter(record)))


def with_huge_header(record: ArrayRecord) -> None:
    name = next(iter(record))
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (5000000000000,), }"
    data = b"\x93NUMPY\x01\x00" + (len(header)).to_bytes(2, "little") + header
    record[name] = Array(dtype="int64", shape=(5_000_000_000_000,), stype="numpy.ndarray", data=data)


def negative_count(reply: Message) -> Message:
    text = str(reply.content["clients"]["json"])
    if '"client": 0,' in text:
        reply.content["clients"]["json"] = text.replace('"examples": ', '"examples": -', 1)
    return reply


def kill_first_node(reply: Message) -> Message:
    if '"client": 0,' in str(reply.content["clients"]["json"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return reply


def client_that_diverges() -> ClientApp:
    """Client 0's training ends in NaN, inside a node that also works for others."""
    honest = worker_module.distil

    def distil(student, weights, shard, **kwargs):
        if kwargs["who"][1] == 0:
            weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
        return honest(student, weights, shard, **kwargs)

    return _with_distil(distil)


def client_that_raises() -> ClientApp:
    """Client 0's data makes training raise, with private text in the message."""
    honest = worker_module.distil

    def distil(student, weights, shard, **kwargs):
        if kwargs["who"][1] == 0:
            raise RuntimeError("patient Smith has a cough")
        return honest(student, weights, shard, **kwargs)

    return _with_distil(distil)


def node_that_raises() -> ClientApp:
    def spoil(reply: Message) -> Message:
        if '"client": 0,' in str(reply.content["clients"]["json"]):
            raise RuntimeError("patient Smith has a cough")
        return reply

    app = ClientApp()
    app.query("teach")(ours.teach)
    app.evaluate()(ours.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return ours._safely(lambda: spoil(ours.train(message, context)))

    return app


def _with_distil(distil: Callable[..., object]) -> ClientApp:
    app = ClientApp()
    app.query("teach")(ours.teach)
    app.evaluate()(ours.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        worker_module.distil = distil
        return ours.train(message, context)

    return app
