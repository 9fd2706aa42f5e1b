"""The size of a student, from its shape alone: weights, operations of its products, bytes of a pass forward and back.

A layer has width H, A = heads x head width, N neurons; a batch has B rows of length T. A product of (n, k) with (k, m)
takes 2nkm operations, so a layer's forward pass takes

    2 B T (4 H A + 2 H N)    queries, keys, values and their mixing; the two products of the feed-forward network
    + 4 B T^2 A              queries with keys, and attention with values

and its backward pass twice that: for the gradient of the inputs and of the weights (Kaplan et al. 2020,
https://arxiv.org/abs/2001.08361, who leave out the T^2). Where nothing below a product is trained, the gradient of its
inputs is not needed: with frozen embeddings, in the first layer. Besides the layers there are products at every
position (an embedding's projection) and at one (pooler and classifier).

    activations    B T ((4 A + 2 N + 4 H + heads T) w + 16) for each layer: what the backward pass will read of the
        products, the GELU, the softmax and the two norms (after Korthikanti et al. 2022,
        https://arxiv.org/abs/2205.05198), of w = 4 bytes; in bf16 w = 2, and the norms add 8 H

What a round with it costs a device: `common.cost`.
"""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from common.families import family_of, head_count, is_exit
from common.models import count_parameters, freeze_embeddings
from common.slim import Shape, build

BATCH, LENGTH = 32, 32  # of the reference


@dataclass(frozen=True)
class Size:
    """What a student's costs depend on.

    Attributes:
        hidden: width between the layers.
        head_size: width of a head.
        heads, neurons: of each layer.
        each, once: weights of the products outside the layers that meet every position, and one position of a row.
        each_trained: those of the former that are trained.
        parameters, trained: all weights, and those under training.
        exit: of the latter those between the last layer and the logits, that layer's last norm among them.
        first_inputs: whether something below the first layer's products is trained.
        spelt: whether the activation is written out in five steps (GPT-2) instead of one.
    """

    hidden: int
    head_size: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    each: int
    each_trained: int
    once: int
    parameters: int
    trained: int
    exit: int
    first_inputs: bool
    spelt: bool

    @property
    def layers(self) -> int:
        return len(self.heads)


def size_of(config: Any, shape: Shape, train_embeddings: bool = False) -> Size:
    """The size of a student, from its module without memory behind it (torch's meta device).

    Args:
        config: its teacher's configuration.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size = len(shape.layers), shape.pieces
    if config.pad_token_id is not None and config.pad_token_id >= shape.pieces:
        config.pad_token_id = None
    with torch.device("meta"):
        student = build(config, shape)
    trained, family = freeze_embeddings(student, train_embeddings), family_of(student)
    causal = config.model_type == "gpt2"  # its head meets every position; its layers begin with a norm
    each = each_trained = once = 0
    for name, module in student.named_modules():
        if not isinstance(module, nn.Linear) or name.startswith(f"{family.layers}."):
            continue
        weights = module.weight.numel()
        if name.startswith(family.embeddings) or causal:
            each += weights
            each_trained += weights * module.weight.requires_grad
        else:
            once += weights
    return Size(
        hidden=config.hidden_size,
        head_size=config.hidden_size // head_count(config),
        heads=tuple(map(len, shape.heads)),
        neurons=tuple(map(len, shape.neurons)),
        each=each,
        each_trained=each_trained,
        once=once,
        parameters=count_parameters(student),
        trained=sum(parameter.numel() for parameter in trained.values()),
        exit=sum(parameter.numel() for name, parameter in trained.items() if is_exit(student, name)),
        first_inputs=train_embeddings or causal,
        spelt=causal,
    )


# --- arithmetic ----------------------------------------------------------------------------------


def forward_flops(size: Size, rows: int, length: int) -> int:
    """Operations of the products of a forward pass over ``rows`` rows of ``length`` pieces."""
    layers = sum(
        2 * length * (4 * size.hidden * heads * size.head_size + 2 * size.hidden * neurons)
        + 4 * length**2 * heads * size.head_size
        for heads, neurons in zip(size.heads, size.neurons, strict=True)
    )
    return rows * (layers + 2 * length * size.each + 2 * size.once)


def training_flops(size: Size, rows: int, length: int) -> int:
    """The same of a forward and a backward pass."""
    frozen = rows * 2 * length * (size.each - size.each_trained)  # has no backward pass
    first = 0 if size.first_inputs else rows * 2 * length * 3 * size.hidden * size.heads[0] * size.head_size
    return 3 * forward_flops(size, rows, length) - 2 * frozen - first


@cache
def reference() -> Size:
    """The encoder that devices' speeds are told in: three of MiniLM's layers, embeddings frozen."""
    from transformers import BertConfig

    config = BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    return size_of(config, Shape.whole(config, (0, 1, 2)))


def operations_per_piece() -> tuple[float, float]:
    """Of the reference, at `BATCH` rows of `LENGTH`: of training, and of reading (a forward pass)."""
    pieces = BATCH * LENGTH
    return training_flops(reference(), BATCH, LENGTH) / pieces, forward_flops(reference(), BATCH, LENGTH) / pieces


# --- memory --------------------------------------------------------------------------------------


def weight_bytes(size: Size) -> int:
    """Of all weights in float32."""
    return 4 * size.parameters


def activation_bytes(size: Size, pieces: int, length: int, bf16: bool = False) -> int:
    """What the layers keep for the backward pass of a batch of ``pieces`` pieces in rows of ``length``."""
    width, norms = (2, 8 * size.hidden) if bf16 else (4, 0)
    steps = 5 if size.spelt else 2
    return pieces * sum(
        width * (4 * heads * size.head_size + steps * neurons + 4 * size.hidden + heads * length) + norms + 16
        for heads, neurons in zip(size.heads, size.neurons, strict=True)
    )


def flight_bytes(size: Size, pieces: int, length: int) -> int:
    """The tensors that one layer's forward pass holds at once in float32, at most."""
    widest = max(
        max(2 * size.hidden + 4 * heads * size.head_size + 2 * heads * length, size.hidden + 2 * neurons)
        for heads, neurons in zip(size.heads, size.neurons, strict=True)
    )
    return 4 * pieces * widest
