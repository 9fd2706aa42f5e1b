"""Students: the shape of one, cutting it out of its teacher, and its two forms on disk.

A student keeps some of its teacher's layers; of each of them some attention heads and some neurons of the feed-forward
network; some rows of the word embedding, perhaps as a product of two thin matrices. Heads and neurons stand in order of
importance, so that a smaller student is a beginning of a larger one.

The *slim* form is what is trained, sent and exported. The *plain* form is what transformers opens without our code,
with the same logits: factors multiplied out, missing heads filled up with zeros.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.families import (
    check_family,
    family_of,
    head_count,
    layers_of,
    neuron_count,
    renumbered,
    side_by_side,
)
from common.models import DROPOUTS

Numbers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Shape:
    """What a student keeps of its teacher.

    Attributes:
        layers: the teacher's layers, ascending.
        heads: of each of them the attention heads, the most important first.
        neurons: of each of them the neurons of the feed-forward network, the most important first.
        pieces: rows of the word embedding.
        rank: width of the word embedding's factors; 0: it is one matrix.
        head_size: width of an attention head; 0: as its teacher's, of which it was cut.
    """

    layers: tuple[int, ...]
    heads: Numbers
    neurons: Numbers
    pieces: int
    rank: int = 0
    head_size: int = 0

    @classmethod
    def whole(cls, config: Any, layers: tuple[int, ...]) -> "Shape":
        """All of these layers of a model with this configuration."""
        heads, neurons = tuple(range(head_count(config))), tuple(range(neuron_count(config)))
        return cls(layers, (heads,) * len(layers), (neurons,) * len(layers), int(config.vocab_size))

    def beginning(self, layers: int, heads: int, neurons: int) -> "Shape":
        """The first layers, and the first heads and neurons of each; 0 heads or neurons: all."""
        return replace(
            self,
            layers=self.layers[:layers],
            heads=tuple(kept[: heads or None] for kept in self.heads[:layers]),
            neurons=tuple(kept[: neurons or None] for kept in self.neurons[:layers]),
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Shape":
        lists = {name: tuple(tuple(map(int, row)) for row in raw[name]) for name in ("heads", "neurons")}
        pieces, rank = int(raw["pieces"]), int(raw["rank"])
        head_size = int(raw.get("head_size", 0))  # students of earlier versions are cut from their teachers
        return cls(tuple(map(int, raw["layers"])), **lists, pieces=pieces, rank=rank, head_size=head_size)


class FactoredEmbedding(nn.Embedding):
    """A word embedding of (pieces, hidden) as (pieces, rank) times (rank, hidden)."""

    def __init__(self, pieces: int, rank: int, hidden: int, padding: int | None) -> None:
        super().__init__(pieces, rank, padding)
        self.project = nn.Linear(rank, hidden, bias=False)

    def forward(self, pieces: Tensor) -> Tensor:
        found: Tensor = self.project(super().forward(pieces))
        return found


def cut_student(
    teacher: Any, shape: Shape, *, pieces: Sequence[int] = (), dropout: float = 0.0, random: bool = False
) -> Any:
    """The student of this shape, with its teacher's weights; all of the teacher computes what the teacher does.

    Args:
        pieces: the teacher's numbers of the student's word pieces; none: all.
        random: the layers get the random weights of torch's global generator instead, as a control.
    """
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(shape.layers)
    for name in DROPOUTS:
        if getattr(config, name, None) is not None:
            setattr(config, name, dropout)
    student = _plain(config)
    family = family_of(student)
    state = renumbered(teacher.state_dict(), family, shape.layers)
    if random:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{family.layers}.")}
    found = student.load_state_dict(state, strict=not random)
    assert not found.unexpected_keys
    if pieces:
        _keep_pieces(student, pieces)
    narrow(student, shape.heads, shape.neurons)
    if shape.rank:
        _factor(student, shape.rank)
    return student.eval()


def narrow(model: Any, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> None:
    """Keep these heads and neurons of each layer, in this order; equals masking the others exactly."""
    family, size = family_of(model), model.config.hidden_size // head_count(model.config)
    for layer, kept, width in zip(layers_of(model), heads, neurons, strict=True):
        rows = (torch.tensor(kept)[:, None] * size + torch.arange(size)).reshape(-1)
        fused = 3 // len(family.heads)
        for path in family.heads:
            product = layer.get_submodule(path)
            each = _outputs(product) // fused
            _keep_outputs(product, torch.cat([rows + part * each for part in range(fused)]))
        _keep_inputs(layer.get_submodule(family.mix), rows)
        attention = layer.get_submodule(family.heads[0].rpartition(".")[0])
        for name, value in (("num_attention_heads", len(kept)), ("n_heads", len(kept)), ("num_heads", len(kept)),
                            ("all_head_size", len(rows)), ("split_size", len(rows))):  # fmt: skip
            if hasattr(attention, name):
                setattr(attention, name, value)
        _keep_outputs(layer.get_submodule(family.up), torch.tensor(width))
        _keep_inputs(layer.get_submodule(family.down), torch.tensor(width))


def widen(student: Any, shape: Shape) -> Any:
    """The same student as transformers knows it; its logits are the same."""
    family, config = family_of(student), copy.deepcopy(student.config)
    width = len(shape.neurons[0])  # the same in every layer, so that the configuration can say it
    setattr(config, family.width, width)
    plain = _plain(config)
    words = student.get_input_embeddings()
    state = {name: tensor for name, tensor in student.state_dict().items() if not name.endswith(".project.weight")}
    if isinstance(words, FactoredEmbedding):
        (name,) = (name for name, tensor in student.named_parameters() if tensor is words.weight)
        state[name] = words.weight.detach() @ words.project.weight.detach().T
    for name, target in plain.state_dict().items():
        target.copy_(_padded(state[name], target.shape, side_by_side(student, name)))
    return plain.eval()


def save_slim(student: Any, shape: Shape, folder: Path) -> None:
    """Write config.json, shape.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    student.config.save_pretrained(folder)
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    save_file(
        {name: tensor.contiguous() for name, tensor in student.state_dict().items()}, folder / "model.safetensors"
    )


def load_slim(folder: Path) -> tuple[Any, Shape]:
    """Open what `save_slim` wrote. Raises OSError, ValueError, KeyError or RuntimeError for anything else."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    check_family(config, str(folder))
    shape = Shape.from_json(json.loads((folder / "shape.json").read_text()))
    student = build(config, shape)
    student.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return student.eval(), shape


def build(config: Any, shape: Shape) -> Any:
    """An empty student of a shape: its weights are there to be overwritten."""
    student = _plain(config)
    narrow(student, [range(len(kept)) for kept in shape.heads], [range(len(kept)) for kept in shape.neurons])
    if shape.rank:
        student.set_input_embeddings(_factors(student.get_input_embeddings(), shape.rank))
    return student


def _plain(config: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def _keep_pieces(student: Any, pieces: Sequence[int]) -> None:
    words, config = student.get_input_embeddings(), student.config
    number = {piece: place for place, piece in enumerate(pieces)}
    padding = None if words.padding_idx is None else number[words.padding_idx]
    rows = words.weight.detach()[torch.tensor(pieces)]
    student.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=padding))
    config.vocab_size = len(pieces)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, number.get(getattr(config, name)))


def _factor(student: Any, rank: int) -> None:
    """Replace the word embedding by its best approximation of this rank (Eckart and Young 1936)."""
    words = student.get_input_embeddings()
    left, sizes, right = torch.linalg.svd(words.weight.detach().double(), full_matrices=False)
    factors = _factors(words, rank)
    with torch.no_grad():
        factors.weight.copy_(left[:, :rank] * sizes[:rank])
        factors.project.weight.copy_(right[:rank].T)
    student.set_input_embeddings(factors)


def _factors(words: nn.Embedding, rank: int) -> FactoredEmbedding:
    """In the place of this word embedding, with weights to be overwritten."""
    with torch.random.fork_rng(devices=[]):
        return FactoredEmbedding(words.num_embeddings, rank, words.embedding_dim, words.padding_idx)


# --- products: torch's Linear keeps (outputs, inputs), GPT-2's Conv1D (inputs, outputs) -----------


def _is_linear(product: Any) -> bool:
    return isinstance(product, nn.Linear)


def _outputs(product: Any) -> int:
    return int(product.weight.shape[0 if _is_linear(product) else 1])


def _keep_outputs(product: Any, index: Tensor) -> None:
    product.weight = nn.Parameter(product.weight.detach().index_select(0 if _is_linear(product) else 1, index))
    product.bias = nn.Parameter(product.bias.detach()[index])
    setattr(product, "out_features" if _is_linear(product) else "nf", len(index))


def _keep_inputs(product: Any, index: Tensor) -> None:
    product.weight = nn.Parameter(product.weight.detach().index_select(1 if _is_linear(product) else 0, index))
    setattr(product, "in_features" if _is_linear(product) else "nx", len(index))


def _padded(source: Tensor, shape: Sequence[int], fused: int) -> Tensor:
    """The tensor with zeros behind it in every dimension; of ``fused`` ones side by side, behind each."""
    target = torch.zeros(*shape)
    begun = beginning(target, source.shape, fused)
    begun.copy_(source.reshape(begun.shape))
    return target


def beginning(whole: Any, shape: Sequence[int], fused: int = 1) -> Any:
    """A view of what a smaller student holds of an array, as (..., fused, last / fused); NumPy's or torch's.

    Args:
        shape: that of the smaller student's array.
        fused: how many products stand side by side in the last dimension; the beginning of each is held.
    """
    split = whole.reshape(*whole.shape[:-1], fused, whole.shape[-1] // fused)
    return split[tuple(slice(size) for size in (*shape[:-1], fused, shape[-1] // fused))]
