"""Content hashes: what is cached, compared or named is known by what it holds, not by where it lies."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def hash_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, as model hubs state it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) over the names and bytes of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}|{hash_file(path)}|".encode())
    return digest.hexdigest()


def runtime_fingerprint(model: Path, threads: int) -> dict[str, str | int]:
    """What a model's outputs depend on besides its weights: configuration, threads, library versions, processor."""
    return {
        "config": hash_file(model / "config.json"),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
