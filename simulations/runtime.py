"""Starting Flower's simulation runtime on Ray: the one place that knows how, and how to end it."""

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from common.config import Config
from common.errors import InputError, RunFailed
from common.store import cache_folder
from simulations.worker_pool import WorkerPool

GRACE_SECONDS = 30.0  # a busy machine needs some to write its report and end Ray
CONNECT_SECONDS = 5.0
OFFLINE = {  # Flower and Ray ask the network for versions and report use unless told not to
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
FOR_WORKERS = ("FEDISTILL_", "FLWR_", "HF_", "TOKENIZERS_", "OMP_", "MKL_", "ATEN_", "ONEDNN_")  # variables' beginnings
_pools: list[WorkerPool] = []  # of the run that goes on in this process


def worker_count(config: Config) -> int:
    """``runtime.workers``, or as many as the cores allow with ``runtime.threads`` each."""
    return config.runtime.workers or max((os.cpu_count() or 1) // config.runtime.threads, 1)


def gpu_share(config: Config) -> float:
    """The part of a GPU that each worker asks Ray for; 0 on the CPU. A GPU is never split between two machines."""
    import torch

    cards = torch.cuda.device_count() if config.runtime.device != "cpu" else 0
    # rounded down: Ray counts in steps of 1e-4, and the workers' shares must fit the cards
    return min(math.floor(1e4 * cards / worker_count(config)) / 1e4, 1.0) if cards else 0.0


def run_on_ray(serve: Callable[[Any], None], config: Config, client_app: Any = None) -> None:
    """Call ``serve(grid)`` against worker processes that run a ClientApp, ours by default; returns when done.

    Blocks the calling thread. What ``serve`` raises is raised here.

    Raises:
        InputError: there is no cluster at ``RAY_ADDRESS``, or none of its machines has room for a worker.
    """
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from clients.app import app as our_client_app

    server_app = ServerApp()
    workers, threads = worker_count(config), config.runtime.threads
    pool = WorkerPool(workers)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            serve(grid)
        finally:
            pool.over.set()
            pool.kill_busy()  # nobody waits for them; Flower would

    start_ray(workers * threads)
    _check_room(threads)
    with _in_use(pool):
        run_simulation(
            server_app=server_app,
            client_app=client_app or our_client_app,
            num_supernodes=workers,
            backend_config={"client_resources": {"num_cpus": threads, "num_gpus": gpu_share(config)}},
        )


def start_ray(cores: int) -> None:
    """Start Ray, or connect to a running cluster, before Flower would.

    Ray takes over SIGTERM: a handler set before it must come back.

    Raises:
        InputError: `RAY_ADDRESS` is no address, or nobody answers there.
        RunFailed: Ray does not start.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    _check_address(address)
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        ray.init(
            address=address or "local",  # else Ray would join whatever cluster this machine has started
            num_cpus=None if address else cores,  # a running cluster has its own
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _environment()},
        )
    except Exception as error:  # Ray gives itself 30 s, and raises a bare Exception after that
        raise RunFailed(f"Ray did not start ({type(error).__name__}); is this machine very busy, or full?") from error
    for number, handler in handlers.items():
        signal.signal(number, handler)


def try_ray() -> float:
    """Start Ray as a run would, or ask the cluster at ``RAY_ADDRESS``; how many cores it has.

    Raises:
        InputError: as `run_on_ray`.
    """
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    import ray

    start_ray(1)
    try:
        return float(ray.cluster_resources().get("CPU", 0.0))
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself would go on trying for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host:  # "auto", "local": Ray knows where
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError):
        raise InputError(f"RAY_ADDRESS = {address}: no Ray cluster answers there; start one, or unset it") from None


def _environment() -> dict[str, str]:
    """What a worker must find as it is here; on a running cluster it would have the environment of its machine."""
    found = {name: value for name, value in os.environ.items() if name.startswith(FOR_WORKERS)}
    if found.get("FEDISTILL_CACHE"):
        found["FEDISTILL_CACHE"] = str(cache_folder())
    return {**found, "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)}


def _check_room(threads: int) -> None:
    """Workers that no machine has room for would be waited for in vain."""
    import ray

    most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if most < threads:
        ray.shutdown()
        raise InputError(f"runtime.threads = {threads}: the Ray cluster's largest machine has {most:.0f} cores")


@contextmanager
def _in_use(pool: WorkerPool) -> Iterator[None]:
    """Have Flower's backend take this pool, and a thread for each worker: without a word it has 32 at most."""
    from flwr.server.superlink.fleet.vce import vce_api
    from flwr.server.superlink.fleet.vce.backend import raybackend

    backend: Any = raybackend
    engine: Any = vce_api
    usual = backend.BasicActorPool, engine.ThreadPoolExecutor
    backend.BasicActorPool = pool.build
    engine.ThreadPoolExecutor = partial(ThreadPoolExecutor, max_workers=pool.num_actors)
    _pools.append(pool)
    try:
        yield
    finally:
        _pools.remove(pool)
        backend.BasicActorPool, engine.ThreadPoolExecutor = usual


def kill_workers() -> None:
    """End the worker processes that are at work at once, so that nobody waits for them; new ones are started."""
    for pool in _pools:
        pool.kill_busy()


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
