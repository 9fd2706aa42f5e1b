"""What several tests need: tiny random models and a tokenizer made on the spot, a cache folder per session."""

import csv
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from common.config import Config, from_flat
from common.dataset import FederatedDataset, load_tokenizer, prepare_dataset
from common.device import Compute
from common.hashing import hash_json, hash_tensors
from common.models import load_teacher
from common.progress import Silent
from common.pupil import open_pupil, save_pupil
from common.slim import Shape, cut_student
from common.store import build_folder, cache_folder
from common.tokens import Tokens, tokenize

# both are read when a library of the hub is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of processes that tests start: a busy machine's cores are shared
_TABLES = tempfile.TemporaryDirectory(prefix="fedistill-tests-")
os.environ["HF_DATASETS_CACHE"] = _TABLES.name

# a test states a fact, and on a busy machine it may be late
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

FP32 = Compute(torch.device("cpu"), bf16=False)
BF16 = Compute(torch.device("cpu"), bf16=True)

_SOME = "the a this that film meal phone room was is not never good bad great awful cold warm light heavy very really"
_OTHERS = "and but or it we they had have battery service story staff price noise quick slow kind rude fresh dull clean"
_LAST = "dirty happy sad best worst love hate no yes one two"
WORDS = [*_SOME.split(), *_OTHERS.split(), *_LAST.split()]


def make_tokenizer(folder: Path, family: str = "bert") -> None:
    """A small word-piece (BERT-like) or byte-level (RoBERTa, GPT-2) tokenizer, saved as transformers saves it."""
    letters = [chr(c) for c in range(97, 123)] + list("0123456789.,!?'-")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters), *WORDS]
    if family in ("roberta", "gpt2"):
        from tokenizers import ByteLevelBPETokenizer
        from transformers import GPT2TokenizerFast, RobertaTokenizerFast

        raw = ByteLevelBPETokenizer()
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if family == "roberta" else ["<|endoftext|>", "<pad>"]
        raw.train_from_iterator([" ".join(WORDS)] * 5, vocab_size=400, special_tokens=specials)
        raw.save(str(folder / "raw.json"))
        kind, given = (RobertaTokenizerFast, {}) if family == "roberta" else (GPT2TokenizerFast, {"pad_token": "<pad>"})
        kind(tokenizer_file=str(folder / "raw.json"), **given).save_pretrained(folder)
        (folder / "raw.json").unlink()
        return
    from transformers import BertTokenizerFast, DistilBertTokenizerFast, ElectraTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    kinds = {"bert": BertTokenizerFast, "distilbert": DistilBertTokenizerFast, "electra": ElectraTokenizerFast}
    kinds[family].from_pretrained(folder).save_pretrained(folder)


def make_teacher(
    folder: Path, family: str = "bert", labels: int = 2, layers: int = 4, seed: int = 0, *, width: int = 16
) -> Path:
    """A tiny random classifier with its tokenizer; labels 0 leaves the head out."""
    import transformers as hf

    config = _small_config(folder, family, labels, layers, width)
    torch.manual_seed(seed)
    if labels:
        model = hf.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():  # a random head says nothing: make logits differ between examples
            for name, parameter in model.named_parameters():
                if name.startswith(("classifier", "score")):
                    parameter.mul_(20.0)
    else:
        model = hf.AutoModel.from_config(config)
    model.save_pretrained(folder)
    return folder


def make_masked_teacher(folder: Path, family: str = "bert", layers: int = 4, seed: int = 0) -> Path:
    """The same as a masked LM: an encoder without the task's head, whose guesses differ between places."""
    import transformers as hf

    config = _small_config(folder, family, 0, layers)
    torch.manual_seed(seed)
    model = hf.AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10.0)
    model.save_pretrained(folder)
    return folder


def _small_config(folder: Path, family: str, labels: int, layers: int, width: int = 16) -> Any:
    """The configuration of a tiny model whose tokenizer is made in the folder."""
    import transformers as hf

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder, family)
    vocab = len(hf.AutoTokenizer.from_pretrained(folder))
    small: dict[str, Any] = {"vocab_size": vocab, "max_position_embeddings": 66, "num_labels": labels or 2}
    usual = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    usual |= {"intermediate_size": 2 * width}
    configs: dict[str, Any] = {
        "bert": lambda: hf.BertConfig(**small, **usual),
        "roberta": lambda: hf.RobertaConfig(**{**small, "max_position_embeddings": 68}, **usual, type_vocab_size=1),
        "electra": lambda: hf.ElectraConfig(**small, **usual, embedding_size=8),
        "distilbert": lambda: hf.DistilBertConfig(**small, dim=width, n_layers=layers, n_heads=2, hidden_dim=2 * width),
        "gpt2": lambda: hf.GPT2Config(**small, n_embd=width, n_layer=layers, n_head=2, pad_token_id=1, bos_token_id=0,
                                      eos_token_id=0),
    }  # fmt: skip
    return configs[family]()


def make_student(teacher: Any, layers: tuple[int, ...], **given: Any) -> Any:
    """A student that keeps all of these layers of its teacher."""
    return cut_student(teacher, Shape.whole(teacher.config, layers), **given)


def stir(model: Any, by: float = 0.3) -> None:
    """Add noise to every weight of a tiny random model, so that its texts differ by more than rounding."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=rng))


def make_needs(teacher: Path, data: FederatedDataset, layers: tuple[int, ...]) -> dict[str, str]:
    """What a worker is made of: the teacher, the data, and a student of these layers that lies in the cache."""
    model, digest = load_teacher(teacher), hash_tensors(load_teacher(teacher).state_dict())
    folder = cache_folder() / "students" / hash_json([digest, layers])
    with build_folder(folder) as draft:
        if draft is not None:
            load_tokenizer(teacher).save_pretrained(draft)
            save_pupil(make_student(model, layers), Shape.whole(model.config, layers), draft, own_pieces=False)
    return {
        "teacher": str(teacher),
        "teacher_hash": digest,
        "dataset": data.key,
        "student": folder.name,
        "student_hash": open_pupil(folder, data, cache_folder()).hash,
    }


def make_sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Different sentences of WORDS, of 2 to `longest` words."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS, int(rng.integers(2, longest + 1))))] = None
    return list(found)


def make_reviews(path: Path, count: int = 120, seed: int = 0) -> Path:
    """A CSV file of sentences with labels 0 and 1 that the words decide, and an owner a, b or c."""
    texts = make_sentences(count, seed)
    good = set(WORDS[::2])
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "owner"])
        for number, text in enumerate(texts):
            label = int(2 * sum(word in good for word in text.split()) > len(text.split()))
            writer.writerow([text, label, "abc"[number % 3]])
    return path


def make_tokens(teacher: Path, *texts: list[str], max_length: int = 64) -> Tokens:
    return tokenize(texts, load_tokenizer(teacher), max_length, lambda amount: None)


def make_dataset(source: Path, teacher: Path, cache: Path, **keys: Any) -> tuple[Config, FederatedDataset]:
    """A user's file, cut and tokenised; keys as `data__clients=3`."""
    flat = {"task": "text", "data.source": str(source), "data.clients": 3, "data.max-length": 64, "data.alpha": 10.0}
    flat |= {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    config = from_flat({"teacher.model": str(teacher), **flat})
    return config, prepare_dataset(config, teacher, cache, Silent())


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No test reads or fills the user's cache, and none asks the hub."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FEDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT classifier with two labels and four layers."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))
