"""Before round 1 of a real federation: who is there, how many examples each holds, which models it has already."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from common.array_bytes import WireError
from common.config import Config
from common.errors import Interrupted, RunFailed
from common.keys import AT_CLIENTS
from common.progress import Progress
from common.tasks import Task
from common.version import FEDISTILL
from common.wire import Instruction, Joined, pack, unpack_joined
from server.reply import reason_of

POLL_SECONDS = 0.1
AGAIN_SECONDS = 30.0  # a question may be lost on its way
NOBODY = "0" * 16  # there is no run yet
OURS = (
    "data.source", "data.validation", "data.public-text", "teacher.model", "runtime.cache", "runtime.out",
    "tracking.mlflow", "tracking.wandb",
)  # fmt: skip


def keys_for_clients(config: Config) -> str:
    """The keys as they travel to devices of others: without folders and files of the server."""
    flat: dict[str, Any] = config.flat()
    return json.dumps({**flat, **dict.fromkeys(OURS, ""), "data.private": AT_CLIENTS}, sort_keys=True)


def task_text(task: Task) -> str:
    return json.dumps(asdict(task), sort_keys=True)


def join(
    grid: Any,
    homes: Mapping[int, int],
    config: Config,
    task: Task,
    *,
    least: int,
    seconds: float,
    progress: Progress,
    stopped: Callable[[], bool],
) -> dict[int, Joined]:
    """Ask every client that is there to join, and wait for all of them, or for some of them when time is up.

    Args:
        homes: the node of each client that may take part.
        least: so many must have joined when time is up.
        seconds: how long is waited.

    Raises:
        RunFailed: too few have joined.
        Interrupted: asked to stop.
    """
    asked: dict[int, float] = {}  # when
    waiting: dict[str, int] = {}  # by the id of the question
    found: dict[int, Joined] = {}
    refused: dict[int, str] = {}
    end = time.monotonic() + seconds
    keys, told = keys_for_clients(config), task_text(task)
    with progress.step("wait for the clients", len(homes)) as step:
        while len(found) + len(refused) < len(homes) and time.monotonic() < end:
            if stopped():
                raise Interrupted
            here = set(grid.get_node_ids())
            now, settled = time.monotonic(), {*found, *refused}
            for client in [
                one
                for one, node in homes.items()
                if node in here and one not in settled and now - asked.get(one, -AGAIN_SECONDS) >= AGAIN_SECONDS
            ]:
                message = Message(
                    pack(_question(client, keys, told), None), dst_node_id=homes[client], message_type="query.join"
                )
                waiting[grid.push_messages([message])[0]] = client
                asked[client] = now
            for reply in grid.pull_messages(set(waiting)) if waiting else []:
                client = waiting.pop(reply.metadata.reply_to_message_id, -1)
                if client < 0 or client in found:
                    continue
                if is_away(reply):
                    asked.pop(client, None)  # it was there a moment ago
                    continue
                known = client in refused
                try:
                    found[client] = _accept(reply, client, homes[client])
                    refused.pop(client, None)  # an earlier question of two that are out was lost
                except WireError as error:
                    refused[client] = str(error)
                    progress.line(f"client {client} cannot join: {error}")
                step.advance(not known)
            time.sleep(POLL_SECONDS)
    if len(found) < max(least, 1):
        first = next((f"; the first: client {client}: {why}" for client, why in sorted(refused.items())), "")
        raise RunFailed(
            f"{len(found)} of {len(homes)} clients have joined in {seconds:.0f} s; {least} are needed{first}"
        )
    return found


def is_away(reply: Message) -> bool:
    """Whether the SuperLink says that a node is not there. A client that says so of itself has failed."""
    told = reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE
    return told and reply.metadata.src_node_id == SUPERLINK_NODE_ID


def _question(client: int, keys: str, task: str) -> Instruction:
    return Instruction(
        run=NOBODY, round=0, config=keys, clients=(client,), feedback=(0,), teacher="", teacher_hash="", dataset="",
        student="", student_hash="", task=task,
    )  # fmt: skip


def _accept(reply: Message, client: int, node: int) -> Joined:
    if reply.has_error():
        raise WireError(reason_of(reply))
    if reply.metadata.src_node_id != node:
        raise WireError("the answer is from another node")
    joined = unpack_joined(reply.content, client)
    if joined.version != FEDISTILL:
        raise WireError(f"it has fedistill {joined.version}, this server {FEDISTILL}; install the same")
    return joined
