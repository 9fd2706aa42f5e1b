"""The model families that can be cut, and where each keeps its parts. To add one, add an entry to `FAMILIES`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from common.errors import InputError


@dataclass(frozen=True)
class Family:
    """Paths inside a sequence classifier.

    Attributes:
        layers: the list of transformer layers; the paths below start at one of them.
        heads: the products that make queries, keys and values; one path: all three side by side.
        mix: the product that mixes the heads' outputs.
        up, down: the two products of the feed-forward network; its neurons lie in between.
        embeddings: where everything lies that turns pieces into vectors.
        classifier: where the task's head lies.
        masked: in a masked LM, what makes logits of the last hidden states, in its order; empty: there is none.
        norm: in a layer, the norm that its output leaves it through; empty where layers end in a sum.
        width: name of the feed-forward width in the configuration.
        reads_last: the head reads the last piece that is not padding, so the configuration must know which that is.
    """

    layers: str
    heads: tuple[str, ...]
    mix: str
    up: str
    down: str
    embeddings: tuple[str, ...]
    classifier: str = "classifier"
    masked: tuple[str, ...] = ()
    norm: str = ""
    width: str = "intermediate_size"
    reads_last: bool = False


def _encoder(name: str, masked: tuple[str, ...], embeddings: tuple[str, ...] = ("embeddings",)) -> Family:
    return Family(
        layers=f"{name}.encoder.layer",
        heads=("attention.self.query", "attention.self.key", "attention.self.value"),
        mix="attention.output.dense",
        up="intermediate.dense",
        down="output.dense",
        embeddings=tuple(f"{name}.{part}" for part in embeddings),
        masked=masked,
        norm="output.LayerNorm",
    )


FAMILIES = {
    "bert": _encoder("bert", ("cls",)),
    "roberta": _encoder("roberta", ("lm_head",)),
    "electra": _encoder(
        "electra", ("generator_predictions", "generator_lm_head"), ("embeddings", "embeddings_project")
    ),
    "distilbert": Family(
        layers="distilbert.transformer.layer",
        heads=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        mix="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
        embeddings=("distilbert.embeddings",),
        masked=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        norm="output_layer_norm",
        width="hidden_dim",
    ),
    "gpt2": Family(
        layers="transformer.h",
        heads=("attn.c_attn",),
        mix="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        embeddings=("transformer.wte", "transformer.wpe"),
        classifier="score",
        width="n_inner",
        reads_last=True,
    ),
}


def family_of(model: Any) -> Family:
    return FAMILIES[model.config.model_type]


def check_family(config: Any, where: str) -> None:
    """Raise `InputError` unless the model's family can be cut."""
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{where}: models of the family {config.model_type!r} cannot be cut; give one of {', '.join(FAMILIES)}"
        )


def pad_with_end(config: Any) -> None:
    """Let a model that reads a text's last piece, and knows no padding, be padded with the piece that ends a text.

    GPT-2 is published so. Such a text's last piece is the last other one, padded or not, and sees nothing behind it.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None and family.reads_last and config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id


def layers_of(model: Any) -> nn.ModuleList:
    found = model.get_submodule(family_of(model).layers)
    assert isinstance(found, nn.ModuleList)
    return found


def is_embedding(model: Any, name: str) -> bool:
    """Whether a weight of this name turns pieces into vectors."""
    return name.startswith(tuple(f"{part}." for part in family_of(model).embeddings))


def is_exit(model: Any, name: str) -> bool:
    """Whether a weight of this name stands between the last layer and the logits, that layer's own norm included."""
    family = family_of(model)
    last = f"{family.layers}.{model.config.num_hidden_layers - 1}.{family.norm}."
    inside = name.startswith(f"{family.layers}.") and not (family.norm and name.startswith(last))
    return not inside and not is_embedding(model, name)


def side_by_side(model: Any, name: str) -> int:
    """How many products stand side by side in the last dimension of a weight: queries, keys and values, or one."""
    family = family_of(model)
    return 3 if len(family.heads) == 1 and f".{family.heads[0]}." in name else 1


def head_count(config: Any) -> int:
    """Attention heads of a layer."""
    return int(config.num_attention_heads)


def neuron_count(config: Any) -> int:
    """Width of the feed-forward network."""
    width = getattr(config, FAMILIES[config.model_type].width)
    return int(width if width is not None else 4 * config.hidden_size)


def embedding_width(config: Any) -> int:
    """Width of the word embedding; ELECTRA's may be narrower than its layers."""
    return int(getattr(config, "embedding_size", config.hidden_size))


def renumbered(state: Mapping[str, Any], family: Family, layers: tuple[int, ...]) -> dict[str, Any]:
    """The weights that a model with only these layers has, under the numbers that they get there."""
    kept = {}
    for name, tensor in state.items():
        head, found, rest = name.partition(f"{family.layers}.")
        if not found or head:
            kept[name] = tensor
            continue
        number, _, part = rest.partition(".")
        if int(number) in layers:
            kept[f"{family.layers}.{layers.index(int(number))}.{part}"] = tensor
    return kept
