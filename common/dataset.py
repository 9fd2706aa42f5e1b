"""The data of a federation, prepared once and mapped into memory by every process.

On disk, under a name that is the hash of everything it depends on: the texts, tokens, labels and content keys
of the train table, the public rows, each client's private rows (train then held-out, one range per client),
and the public validation tables. A client is a range of row numbers, so ten thousand cost nothing to open.
A student with a vocabulary of its own sees the same examples in its own pieces (`in_pieces_of`).
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import Config
from common.corpus import Corpus, Table, joined, load_corpus
from common.errors import InputError
from common.hashing import hash_files, hash_json
from common.partition import (
    Index,
    Shard,
    Shards,
    cut_clients,
    cut_groups,
    cut_holdout,
    cut_private,
    shards_of_sizes,
    text_groups,
)
from common.progress import Progress, Silent
from common.seeding import generator
from common.store import build_folder
from common.tasks import Task
from common.texts import Texts
from common.tokens import Tokens, check_stride, tokenize

FORMAT = 3
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spm.model",
)  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Tokenised examples with their texts, labels and content keys; arrays are mapped, not loaded.

    Attributes:
        tokens: n examples.
        labels: see `common.corpus.Table`.
        keys: (n, 16) uint8 content hash of each example's text.
        texts: one column, or two for pairs.
    """

    tokens: Tokens
    labels: NDArray[Any]
    keys: NDArray[np.uint8]
    texts: tuple[Texts, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FederatedDataset:
    """One task cut for one federation.

    Attributes:
        key: hash of everything the data depends on.
        max_length: word pieces kept of each window of an example.
        windows: the most that an example has.
        stride: word pieces that neighbouring windows share.
        train: the whole train table; only its public rows may be shown to the teacher's fine-tuning.
        public: rows of ``train``.
        validation: public validation splits by name.
        shards: every client's rows of ``train``.
    """

    key: str
    task: Task
    max_length: int
    windows: int
    stride: int
    train: Split
    public: Index
    validation: dict[str, Split]
    shards: Shards

    @property
    def clients(self) -> int:
        return len(self.shards)

    @property
    def train_sizes(self) -> Index:
        """(clients,) examples each client trains on; 0 marks a client that is left out."""
        return self.shards.train_sizes

    @property
    def heldout_sizes(self) -> Index:
        """(clients,) examples each client only scores."""
        return self.shards.heldout_sizes

    @property
    def eligible(self) -> Index:
        """Ids of the clients that take part."""
        return np.flatnonzero(self.train_sizes > 0)

    def shard(self, client: int) -> Shard:
        return self.shards[client]

    def told_of_ends(self) -> str:
        """How many examples of the train table are longer than what is read of them; empty: none that is known of.

        Of a table that an older version has prepared nothing is known.
        """
        cut = self.train.tokens.cut
        if cut is None or not cut.any():
            return ""
        several = f"data.windows = {self.windows} of " if self.windows > 1 else ""
        return (
            f"{cut.sum():,} of {len(cut):,} examples are longer than {several}data.max-length = {self.max_length} "
            "pieces: their ends are not read"
        )


def prepare_dataset(
    config: Config, tokenizer_folder: Path, cache: Path, progress: Progress, corpus: Corpus | None = None
) -> FederatedDataset:
    """Check, cut and tokenise the data of a run, or open it where that was done before.

    Args:
        corpus: the data; None: read them as the keys say.

    Raises:
        InputError: something about the data or its keys is wrong.
    """
    if corpus is None:
        with progress.step("read the data", None):
            corpus = load_corpus(config)
    if config.data.windows > 1 and len(corpus.task.text_columns) > 1:
        raise InputError(
            f"data.windows = {config.data.windows}: examples of task = {corpus.task.name} are pairs of texts, which "
            "are not cut into windows; give 1"
        )
    key = _key(config, corpus, tokenizer_folder)
    with build_folder(cache / "datasets" / key) as draft:
        if draft is not None:
            _build(config, corpus, tokenizer_folder, draft, progress)
    return open_dataset(cache, key)


def open_dataset(cache: Path, key: str) -> FederatedDataset:
    """Map a prepared dataset into memory.

    Raises:
        FileNotFoundError: it is not in this machine's cache.
    """
    folder = cache / "datasets" / key
    meta = json.loads((folder / "dataset.json").read_text())
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in meta["task"].items()}
    task = Task(**fields)
    splits = {name: _open_split(folder, name, meta) for name in ("train", *meta["validation"])}
    public, *ranges = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("public", "order", "starts", "cuts"))
    return FederatedDataset(
        key=key,
        task=task,
        max_length=meta["max_length"],
        windows=meta["windows"],
        stride=meta["stride"],
        train=splits["train"],
        public=public,
        validation={name: splits[name] for name in meta["validation"]},
        shards=Shards(*ranges),
    )


def in_pieces_of(
    tokenizer_folder: Path, data: FederatedDataset, cache: Path, progress: Progress | None = None
) -> FederatedDataset:
    """The same examples as another tokenizer cuts them, row for row; prepared once, then mapped."""
    key = hash_json({"format": FORMAT, "data": data.key, "tokenizer": tokenizer_hash(tokenizer_folder)})[:32]
    folder = cache / "tokens" / key
    splits = {"train": data.train, **data.validation}
    with build_folder(folder) as draft:
        if draft is not None:
            tokenizer = load_tokenizer(tokenizer_folder)
            total = sum(len(split) for split in splits.values())
            with (progress or Silent()).step("tokenise for the student", total) as step:
                for name, split in splits.items():
                    columns = tuple(column.all() for column in split.texts)
                    tokens = tokenize(
                        columns, tokenizer, data.max_length, step.advance, windows=data.windows, stride=data.stride
                    )
                    tokens.save(draft, name)
            (draft / "tokens.json").write_text(json.dumps(_tokenizer_note(tokenizer)))
    note = json.loads((folder / "tokens.json").read_text())
    own = {
        name: replace(split, tokens=Tokens.open(folder, name, note["pad"], note["typed"]))
        for name, split in splits.items()
    }
    return replace(data, train=own["train"], validation={name: own[name] for name in data.validation})


def _tokenizer_note(tokenizer: Any) -> dict[str, Any]:
    return {"pad": tokenizer.pad_token_id, "typed": "token_type_ids" in tokenizer.model_input_names}


def tokenizer_hash(folder: Path) -> str:
    return hash_files(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def _key(config: Config, corpus: Corpus, tokenizer_folder: Path) -> str:
    elsewhere = {"source", "validation", "text_columns", "label_column", "limit", "public_text", "private"}
    keys = config.data.model_dump(exclude=elsewhere)
    own = {
        "private": {client: table.fingerprint() for client, table in corpus.private.items()},
        "sizes": {client: list(sizes) for client, sizes in corpus.sizes.items()},
    }
    return hash_json(
        {
            **(own if config.data.private else {}),
            "format": FORMAT,
            "task": asdict(corpus.task),
            "seed": config.seed,
            "data": keys,
            "train": corpus.train.fingerprint(),
            "validation": {name: table.fingerprint() for name, table in corpus.validation.items()},
            "tokenizer": tokenizer_hash(tokenizer_folder),
        }
    )[:32]


def _build(config: Config, corpus: Corpus, tokenizer_folder: Path, folder: Path, progress: Progress) -> None:
    keys, tokenizer = config.data, load_tokenizer(tokenizer_folder)
    check_stride(tokenizer, keys.max_length, keys.windows, keys.stride)
    with progress.step("cut the data into clients", None):
        cut = _cut_private if keys.private else _cut
        public, validation, shards = cut(config, corpus)
    share = config.data.holdout_fraction
    if share > 0 and shards.train_sizes.any() and not shards.heldout_sizes.any():
        raise InputError(
            f"data.holdout-fraction = {share}: no example can be held out, because examples that share "
            "a text stay together and too many do; give other data.text-columns, or 0"
        )
    for name, rows in (("public", public), ("order", shards.order), ("starts", shards.starts), ("cuts", shards.cuts)):
        np.save(folder / f"{name}.npy", rows)
    tables = {"train": joined([corpus.train, *corpus.private.values()]), **validation}
    with progress.step("tokenise", sum(len(each) for each in tables.values())) as step:
        for name, each in tables.items():
            tokens = tokenize(
                each.texts, tokenizer, keys.max_length, step.advance, windows=keys.windows, stride=keys.stride
            )
            tokens.save(folder, name)
            for column, texts in enumerate(each.texts):
                Texts.of(texts).save(folder, f"{name}.{column}")
            np.save(folder / f"{name}.labels.npy", each.labels)
            np.save(folder / f"{name}.keys.npy", each.keys())
    meta = {
        "task": asdict(corpus.task),
        "validation": list(validation),
        "max_length": keys.max_length,
        "windows": keys.windows,
        "stride": keys.stride,
        **_tokenizer_note(tokenizer),
    }
    (folder / "dataset.json").write_text(json.dumps(meta, indent=1))


def _cut_private(config: Config, corpus: Corpus) -> tuple[Index, dict[str, Table], Shards]:
    """The same where the clients have tables of their own, behind the public one."""
    data, table = config.data, corpus.train
    public, validation = _validation(config, corpus, np.arange(len(table)))
    clients = data.clients or len(corpus.private)
    groups = {client: text_groups(own) for client, own in corpus.private.items()}
    cut = cut_private(groups, clients, data.holdout_fraction, data.min_examples, config.seed)
    shards = replace(cut, order=cut.order + len(table))
    here = bool(corpus.private or corpus.sizes)  # else the public text alone is wanted, of a run of real clients
    if corpus.sizes:
        shards = shards_of_sizes(np.asarray([corpus.sizes.get(client, (0, 0)) for client in range(clients)]))
    if here and not shards.train_sizes.any():
        raise InputError(
            f"data.min-examples = {data.min_examples}: no client has that many private examples; give more of them, or "
            "a smaller minimum"
        )
    return public, validation, shards


def _cut(config: Config, corpus: Corpus) -> tuple[Index, dict[str, Table], Shards]:
    """Public rows, public validation tables and every client's shard."""
    data, table = config.data, corpus.train
    groups = text_groups(table)
    public, private = cut_groups(groups, data.public_fraction, generator(config.seed, "public"))
    public, validation = _validation(config, corpus, public)
    shards = cut_holdout(
        cut_clients(table, private, data, config.seed), groups, data.holdout_fraction, data.min_examples, config.seed
    )
    if not shards.train_sizes.any():
        raise InputError(
            f"data.min-examples = {data.min_examples}: no client has that many of the {len(private)} private "
            "examples; give fewer clients or a smaller minimum"
        )
    return public, validation, shards


def _validation(config: Config, corpus: Corpus, public: Index) -> tuple[Index, dict[str, Table]]:
    """Public rows to learn from, and the tables to score on: of the public rows where there are no others."""
    if not corpus.validation and len(public):
        groups = text_groups(corpus.train)[public]
        scored, kept = cut_groups(groups, 0.2, generator(config.seed, "validation"))
        if len(scored):
            return public[kept], {"validation": corpus.train.take(public[scored])}
    return public, dict(corpus.validation)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a model folder; one without a padding piece pads with the piece that ends a text.

    Raises:
        InputError: the folder has none that loads, or it has neither piece.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "spm.model")):
        raise InputError(f"{folder}: no tokenizer in it (tokenizer.json or a vocabulary); save it beside the model")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # missing files surface as many different kinds
        raise InputError(f"{folder}: no tokenizer loads from it ({type(error).__name__})") from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # see `common.families.pad_with_end`
    if tokenizer.pad_token_id is None:
        raise InputError(f"{folder}: its tokenizer has neither pad_token nor eos_token; set pad_token and save it")
    return tokenizer


def _open_split(folder: Path, name: str, meta: dict[str, Any]) -> Split:
    labels = np.load(folder / f"{name}.labels.npy", mmap_mode="r")
    keys = np.load(folder / f"{name}.keys.npy", mmap_mode="r")
    columns = len(meta["task"]["text_columns"])
    texts = tuple(Texts.open(folder, f"{name}.{column}") for column in range(columns))
    return Split(Tokens.open(folder, name, meta["pad"], meta["typed"]), labels, keys, texts)
