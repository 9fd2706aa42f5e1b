"""Starting Flower's simulation runtime on Ray: the one place that knows how, and how to end it."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from common.config import Config

WORKER_NAME = "ray::ClientAppActor"
GRACE_SECONDS = 8.0
OFFLINE = {  # Flower and Ray ask the network for versions and report use unless told not to
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def worker_count(config: Config) -> int:
    """``runtime.workers``, or as many as the cores allow with ``runtime.threads`` each."""
    return config.runtime.workers or max((os.cpu_count() or 1) // config.runtime.threads, 1)


def run_on_ray(serve: Callable[[Any], None], config: Config, client_app: Any = None) -> None:
    """Call ``serve(grid)`` against worker processes that run a ClientApp, ours by default; returns when done.

    Blocks the calling thread. What ``serve`` raises is raised here.
    """
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from clients.app import app as our_client_app

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid)

    workers, threads = worker_count(config), config.runtime.threads
    _start_ray(workers * threads)
    run_simulation(
        server_app=server_app,
        client_app=client_app or our_client_app,
        num_supernodes=workers,
        backend_config={"client_resources": {"num_cpus": threads, "num_gpus": 0.0}},
    )


def _start_ray(cores: int) -> None:
    """Start Ray before Flower would, because Ray takes over SIGTERM: a handler set before it must come back."""
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(
        num_cpus=None if os.environ.get("RAY_ADDRESS") else cores,  # a running cluster has its own
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def kill_workers() -> None:
    """End the worker processes on this machine at once, so that nobody waits for their replies."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any(part.startswith(WORKER_NAME) for part in process.cmdline()[:1]):
                process.kill()
        except psutil.Error:
            continue


def kill_children() -> None:
    """End everything this process has started."""
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.Error:
            continue


@contextmanager
def ends_within(stop: threading.Event, seconds: float, code: int) -> Iterator[None]:
    """When ``stop`` is set, free the runtime from waiting for busy workers; after ``seconds``, end by force."""
    left = threading.Event()

    def watch() -> None:
        while not left.is_set():
            if stop.wait(0.2):
                time.sleep(0.5)  # the server thread writes its summary first
                kill_workers()
                if not left.wait(seconds):
                    kill_children()
                    os._exit(code)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
