"""Where and how precisely a process computes."""

from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from common.errors import InputError


@dataclass(frozen=True)
class Compute:
    """A device and whether matrix products run in bfloat16."""

    device: torch.device
    bf16: bool

    @property
    def name(self) -> str:
        """Part of cache keys: results of different devices or precisions differ in their last bits."""
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return f"{where}-{'bf16' if self.bf16 else 'fp32'}"

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def choose_compute(device: str, precision: str) -> Compute:
    """Resolve ``runtime.device`` and ``client.precision``.

    ``auto`` takes a GPU where there is one, and bf16 where the hardware multiplies it natively.

    Raises:
        InputError: cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device = 'cuda': no CUDA device is visible here; give cpu or auto")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if precision == "auto":
        bf16 = torch.cuda.is_bf16_supported() if cuda else bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    else:
        bf16 = precision == "bf16"
    return Compute(torch.device("cuda" if cuda else "cpu"), bf16)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on a device; in a container, on the CPU, within its limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(free, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch has no class of its own for that on the CPU, nor for what CUDA's libraries ask."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("not enough memory", "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
