"""What a round's training may cost a client's device: seconds, joules."""

import time
from collections.abc import Callable
from pathlib import Path

from common.keys import ClientKeys

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 5.0  # assumed where no counter can be read: about what a server's or laptop's core draws when busy


def limit_of(keys: ClientKeys, threads: int, *, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """Whether what a client may spend in this round, from now on, is spent; to be asked after every step.

    Energy is what the processors' counters say (RAPL), all that this machine draws; where they cannot be read, the time
    at `WATTS_PER_CORE` for each thread.
    """
    began, before = clock(), joules()

    def spent() -> bool:
        seconds = clock() - began
        if keys.max_seconds and seconds >= keys.max_seconds:
            return True
        return keys.energy_budget > 0 and used(before, joules(), seconds, threads)[0] >= keys.energy_budget

    return spent


def used(before: float | None, after: float | None, seconds: float, threads: int) -> tuple[float, str]:
    """Joules, and where they are from. A counter that ran over in between makes the second smaller and is not used."""
    if before is not None and after is not None and after > before:
        return after - before, "rapl"
    return WATTS_PER_CORE * threads * seconds, f"assumed: {WATTS_PER_CORE:g} W a busy core"


def joules(folder: Path = POWERCAP) -> float | None:
    """What the processor packages' counters stand at (RAPL), together; None where they cannot be read."""
    zones = [zone for zone in folder.glob("intel-rapl:*") if zone.name.count(":") == 1]  # the others are parts of these
    try:
        return sum(int((zone / "energy_uj").read_text()) for zone in zones) / 1e6 if zones else None
    except (OSError, ValueError):
        return None
