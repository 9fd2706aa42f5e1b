"""An edge client whose owner means ill, or whose clock is wrong: it runs in the place of ``fedistill edge``.

``python -m tests.integration.hostile FAULT client CLIENT_DIR ...``; a fault is a name in `faulty.IN_ARRAYS`, or

an earlier answer    to every question to train it gives the answer that it gave to the first
an hour ahead        its clock
"""

import datetime
import os
import sys
from typing import Any

AHEAD = datetime.timedelta(hours=1)


class Ahead(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return super().now(tz) + AHEAD


def client(fault: str, arguments: list[str]) -> None:
    """The command; its worker is `worker` in a process of its own."""
    if fault == "an hour ahead":
        datetime.datetime = Ahead  # type: ignore[misc] # before anybody imports it
    import clients.edge_client as module
    from common.processes import Child
    from simulations.cli import main

    honest = Child

    def child(given: list[str], *rest: Any) -> Child:
        if given[0] == "clients.resident":
            given = ["tests.integration.hostile", fault, "worker", *given[1:]]
        return honest(given, *rest)

    vars(module)["Child"] = child
    main(["edge", *arguments])


def worker(fault: str, arguments: list[str]) -> None:
    import clients.resident as module
    from tests.integration.faulty import IN_ARRAYS

    honest, first = module.answer, []

    def answer(message: Any, context: Any) -> Any:
        reply = honest(message, context)
        if message.metadata.message_type != "train" or not reply.has_content():
            return reply
        if fault in IN_ARRAYS:
            update = reply.content["update"]
            for name in list(update):
                update[name] = IN_ARRAYS[fault](update[name])
        else:
            first.append(reply.content)
            reply.content = first[0]
        return reply

    vars(module)["answer"] = answer
    module.main(*arguments)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.argv[2] == "worker":
        worker(sys.argv[1], sys.argv[3:])
    else:
        client(sys.argv[1], sys.argv[2:])
