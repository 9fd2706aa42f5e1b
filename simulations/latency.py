"""How long models take for one sentence on the CPU: batch 1, one thread, taking turns in one process."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import load_config
from common.dataset import load_tokenizer, prepare_dataset
from common.models import load_teacher
from common.progress import Progress
from common.slim import load_slim
from common.store import cache_folder
from common.tokens import Tokens, tokenize
from server.teacher import find_teacher, prepare_teacher

SENTENCES = 100
LAPS = 3
WARM = 5  # sentences before the clock runs


def run_latency(run: Path, progress: Progress) -> dict[str, float]:
    """Milliseconds for a validation sentence, and megabytes on disk, of a completed run's teacher and student.

    ``student`` is the plain form, that transformers opens, ``slim`` the smaller one. Time is that of the model alone,
    in fp32: text is cut into pieces before.

    Raises:
        InputError: the run's teacher or data are not there any more.
    """
    config = load_config(run / "config.toml")
    cache = cache_folder(config.runtime.cache)
    source = find_teacher(config.teacher.model)
    data = prepare_dataset(config, source.folder, cache, progress)
    teacher = prepare_teacher(config, source, data, cache, progress)
    split = next(iter(data.validation.values()))
    rows = np.unique(np.linspace(0, len(split) - 1, SENTENCES).astype(np.int64))
    texts = tuple(column.take(rows) for column in split.texts)
    folders = {"teacher": teacher.folder, "student": run / "student", "slim": run / "slim"}
    pieces = {name: pieces_of(folder, texts, data.max_length) for name, folder in folders.items()}
    models = {"teacher": load_teacher(teacher.folder), "student": load_teacher(run / "student")}
    models["slim"] = load_slim(run / "slim")[0]
    with progress.step("latency", LAPS * len(rows)) as step:
        calls = {name: caller(models[name], pieces[name]) for name in models}
        found = medians(calls, len(rows), LAPS, step.advance)
    sizes = {name: sum(path.stat().st_size for path in folders[name].glob("*.safetensors")) for name in folders}
    return {
        **{f"ms.{name}": 1e3 * seconds for name, seconds in found.items()},
        **{f"mb.{name}": size / 1e6 for name, size in sizes.items()},
    }


def medians(
    calls: Mapping[str, Callable[[int], Any]], count: int, laps: int, advance: Callable[[], Any]
) -> dict[str, float]:
    """Median seconds of each call over ``laps`` times the sentences 0 to ``count`` - 1.

    All models read a sentence before the next one, and the first to read it changes: what slows the machine down slows
    all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for place in range(min(WARM, count)):
            for call in calls.values():
                call(place)
        order = list(calls)
        for _ in range(laps):
            for place in range(count):
                for name in order:
                    began = time.perf_counter()
                    calls[name](place)
                    seconds[name].append(time.perf_counter() - began)
                order.append(order.pop(0))
                advance()
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(each) for name, each in seconds.items()}


def pieces_of(folder: Path, texts: tuple[Sequence[str], ...], max_length: int) -> Tokens:
    columns = tuple(list(column) for column in texts)
    return tokenize(columns, load_tokenizer(folder), max_length, lambda amount: None)


def caller(model: Any, tokens: Tokens) -> Callable[[int], Any]:
    inputs = [tokens.batch(np.asarray([row])) for row in range(len(tokens))]
    model.eval()
    model.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def call(place: int) -> Any:
        return model(**inputs[place]).logits

    return call
