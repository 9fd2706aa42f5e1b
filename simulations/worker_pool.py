"""The worker processes of a simulation: which of them is free, at work or being started again.

It stands in for the pool of Flower's Ray backend. There a worker whose process has died goes back to the pool, is
the next to be taken, and fails every message it is handed until Ray has started it again: one dead worker uses up
the messages of all. Here a message waits for a worker that is ready.
"""

import threading
import time
from contextlib import suppress
from typing import Any

READY_SECONDS = 1.0  # a worker that takes longer to say that it is ready is asked again later
POLL_SECONDS = 0.1


class WorkerPool:
    """Workers on one machine or on a cluster; the names are those that Flower's backend calls.

    Args:
        workers: how many processes there shall be; those that a cluster has no room for are never ready.
    """

    def __init__(self, workers: int) -> None:
        self.num_actors = self.actors_capacity = workers
        self.idle: list[Any] = []
        self.busy: dict[Any, Any] = {}  # what a worker was asked for -> the worker
        self.over = threading.Event()
        self.gone = 0  # workers that could not even be made
        self._create: Any = None

    def build(self, actor_type: Any, client_resources: dict[str, float], actor_kwargs: dict[str, Any]) -> "WorkerPool":
        """What workers are and what each needs; Ray starts one that dies again, however often."""
        actor_kwargs = {**actor_kwargs, "on_actor_init_fn": _load_app}
        self._create = lambda: actor_type.options(**client_resources, max_restarts=-1).remote(**actor_kwargs)
        return self

    def add_actors_to_pool(self, num_actors: int) -> None:
        self.idle.extend(self._create() for _ in range(num_actors))

    def is_actor_available(self) -> bool:
        return bool(self.idle)

    def submit(self, actor_fn: Any, job: tuple[Any, ...]) -> Any:
        """Hand a message to a worker that is ready, and wait for one until the run is over."""
        while not self.over.is_set():
            if self.gone == self.num_actors:
                raise RuntimeError("no worker could be started")
            actor = self._take_ready()
            if actor is not None:
                future = actor_fn(actor, *job)
                self.busy[future] = actor
                return future
            time.sleep(POLL_SECONDS)
        raise RuntimeError("the run is over")

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> tuple[Any, Any]:
        """A worker's reply, and its context afterwards."""
        import ray

        _, reply, context = ray.get(future)
        self.add_actor_back_to_pool(future)
        return reply, context

    def add_actor_back_to_pool(self, future: Any) -> None:
        self.idle.append(self.busy.pop(future))

    def kill_busy(self) -> None:
        """End the workers that are at work, on whatever machine; their messages fail and Ray starts them again."""
        import ray

        for actor in list(self.busy.values()):
            with suppress(Exception):  # it is gone already
                ray.kill(actor, no_restart=False)

    def terminate_all_actors(self) -> None:
        """Let go of the workers; they end with the connection to Ray."""
        self.over.set()

    def _take_ready(self) -> Any:
        """The worker that has been idle longest if it answers, else None."""
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

        try:
            actor = self.idle.pop(0)
        except IndexError:
            return None
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=READY_SECONDS)
        except (ActorUnavailableError, GetTimeoutError):
            self.idle.append(actor)  # being started
            return None
        except ActorDiedError:  # for good: it could not even be made
            self.gone += 1
            return None
        except BaseException:
            self.idle.append(actor)
            raise
        return actor


def _load_app() -> None:
    """Import what takes seconds before a worker is ready, not while a message waits and looks as if it hung."""
    import clients.app  # noqa: F401
