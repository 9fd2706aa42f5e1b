"""Where and how precisely a process computes."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

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
