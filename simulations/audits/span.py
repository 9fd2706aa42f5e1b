"""Span check: which pieces the first attention layer has read, from the span of its products' gradients.

The queries of a layer are Q = X W, with a row of X (tokens, width) for each token of the batch. The gradient

    dL/dW = X^T dL/dQ

has its columns in the span of the rows of X, and while there are fewer tokens than the width, almost no other piece at
any place has an input in that span. So each (piece, place) is tried by itself (DAGER, Petrov et al. 2024,
https://arxiv.org/abs/2405.15586; its algorithm for encoders). Keys and values read the same X: their gradients are
stacked here with the queries', which helps where the layer is the last one, whose queries get a gradient at the first
place alone.

Of one text the piece at each place is found, and so the text. Of a batch the pieces are, but not their places: an input
is the norm of word + place, so with (a, 1), (a, 2) and (b, 1) there is (b, 2) in the span too. (DAGER goes on to the
second layer and tries all sentences that can be made; that search is not here.)

Exact for one SGD step. What limits it: the rank, tokens < width (of a last layer, about 2 heads + 1 a text); a step of
AdamW, whose signs have full rank; noise, which hides all directions of less than its own norm.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.device import Compute
from common.families import family_of, layers_of
from simulations.audits.victim import Seen

CHUNK = 64  # pieces tried at once
ROUNDING = 2.0**-24  # of a weight, the deviation that rounding it a few times makes
ROUGH = 2.0**-8  # of a gradient, likewise, where products are in bfloat16
SLACK = 1.2  # over the largest singular value that noise alone would have


class _Read(Exception):
    """A layer's input is known: the rest of the model need not run."""


@dataclass(frozen=True)
class Span:
    """Directions that a layer's inputs lie in.

    Attributes:
        basis: (width, rank) orthonormal.
        full: every direction is in it, so it tells nothing.
    """

    basis: Tensor
    full: bool

    def distance(self, inputs: Tensor) -> Tensor:
        """(...,) how much of each (..., width) is outside, as a share of its norm: 0 inside, 1 at right angles."""
        inside = (inputs @ self.basis).square().sum(dim=-1)
        whole = inputs.square().sum(dim=-1).clamp_min(1e-30)
        return (1.0 - inside / whole).clamp_min(0.0).sqrt()


def span_of(seen: Seen, layer: int) -> Span | None:
    """The span of a layer's products of queries, keys and values; None: they were not sent.

    Singular values count above the largest of pure noise of that shape, s (sqrt(m) + sqrt(n)) (Marchenko and Pastur
    1967). An update is rounded as the weights are, and in bfloat16 as the products that make it, which is such noise.
    """
    parts, squares = [], []
    for path in family_of(seen.model).heads:
        product: Any = layers_of(seen.model)[layer].get_submodule(path)
        name = next(name for name, parameter in seen.model.named_parameters() if parameter is product.weight)
        if name not in seen.update:
            return None
        part = seen.descent(name)
        parts.append(part if isinstance(product, nn.Linear) else part.T)
        squares.append((ROUNDING * product.weight.detach().double()).square().mean())
    stack = torch.cat(parts)
    _, sizes, right = torch.linalg.svd(stack, full_matrices=False)
    variance = seen.deviation**2 + float(torch.stack(squares).mean())
    if seen.compute.bf16:
        variance += float((ROUGH * stack).square().mean())
    edge = SLACK * variance**0.5 * (stack.shape[0] ** 0.5 + stack.shape[1] ** 0.5)
    rank = int((sizes > edge).sum())
    return Span(right[:rank].T.float().contiguous(), rank >= stack.shape[1])


@contextmanager
def _stopping(model: Any, layer: int, found: list[Tensor]) -> Iterator[None]:
    """Runs the model up to the products of a layer and takes their input."""

    def read(module: Any, given: tuple[Tensor, ...]) -> None:
        found.append(given[0].float())
        raise _Read

    handle = layers_of(model)[layer].get_submodule(family_of(model).heads[0]).register_forward_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def read_by(model: Any, layer: int, pieces: Tensor, compute: Compute, kind: int = 0) -> Tensor:
    """(texts, length, width) what the products of a layer read of texts of these pieces, (texts, length).

    Args:
        kind: the pieces' token type; 0: also of models that have none.
    """
    types = {"token_type_ids": torch.full_like(pieces, kind)} if kind else {}
    found: list[Tensor] = []
    model.eval()
    with _stopping(model, layer, found), compute.autocast(), suppress(_Read):
        model(input_ids=pieces, attention_mask=torch.ones_like(pieces), **types)
    return found[0].to(torch.bfloat16).float() if compute.bf16 else found[0]


def distances(
    model: Any, span: Span, pieces: NDArray[np.int64], length: int, compute: Compute, *, types: int = 1
) -> NDArray[np.float32]:
    """(len(pieces), length) how far outside the first layer's span each piece would be at each place.

    Args:
        types: token types that a piece may have; the nearest of them counts.
    """
    found = []
    for start in range(0, len(pieces), CHUNK):
        part = torch.from_numpy(pieces[start : start + CHUNK])[:, None].expand(-1, length)
        each = [span.distance(read_by(model, 0, part, compute, kind)) for kind in range(types)]
        found.append(torch.stack(each).amin(dim=0).numpy())
    return np.concatenate(found)


def text_in(distance: NDArray[np.float32], pieces: NDArray[np.int64], tolerance: float) -> list[int]:
    """The one text whose pieces are inside the span: at each place the nearest, up to a place where none is inside."""
    outside = np.flatnonzero(distance.min(axis=0) >= tolerance)
    length = int(outside[0]) if len(outside) else distance.shape[1]
    return [int(pieces[place]) for place in distance[:, :length].argmin(axis=0)]


def pieces_in(distance: NDArray[np.float32], pieces: NDArray[np.int64], tolerance: float) -> NDArray[np.int64]:
    """The pieces of a batch: those that are inside the span at some place."""
    return np.asarray(pieces[distance.min(axis=1) < tolerance])
