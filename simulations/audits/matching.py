"""Gradient matching: find a text whose gradient is the client's.

Word vectors x of a text are moved by Adam until the gradient g(x) that they make is like the observed one g*:

    TAG  (Deng et al. 2021, https://arxiv.org/abs/2103.06819)      sum over arrays of |g - g*|_2^2 + a |g - g*|_1
    LAMP (Balunovic et al. 2022, https://arxiv.org/abs/2202.08827) mean over arrays of 1 - cos(g, g*), and that the mean
         norm of x is that of the embedding's rows; and in turns with these steps, of some rearrangements of the text
         that x stands for (two pieces swapped, a piece or a run of them moved, the beginning put to the end) the one
         with the least loss + l * surprise under a language prior is taken over

and each vector becomes the piece that it points to. With that text a last search begins, which neither paper has:
place by place its piece is exchanged for another, or changes places with one, as long as the loss falls. The slope of
the loss says which places come first and, of all pieces, which are tried (HotFlip, Ebrahimi et al. 2018,
https://arxiv.org/abs/1712.06751). Near the text each right piece shows in the loss: what Adam has half found is found.

As in both papers the length is known, and so are the special pieces at both ends. The gradient by the logits, which all
losses on outputs end in, need not be guessed with the labels: of one text it is the gradient of the head's bias; of
several it is searched along with x.

Here each array counts the same in TAG's sum, as a share of g*: their sizes differ more in a classifier than in a
language model. The prior of LAMP is bigrams of the public text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.families import is_embedding
from simulations.audits.label_counts import head_bias
from simulations.audits.language import Bigrams
from simulations.audits.victim import Seen

ABSOLUTE = 0.01  # a of TAG
NORM = 1.0  # weight of LAMP's pull on norms
SURPRISE = 0.02  # l of LAMP
LR = 0.02
# of the largest mean square's root: what is less is rounding, as of the keys' bias, which changes nothing
NOTHING = 1e-4
STARTS = 16  # random texts, of which the best is begun with
EVERY = 50  # steps between two looks at rearrangements
LOOKS = 40  # of them at a time
TRIED = 32  # pieces at a place of the last search
Places = NDArray[np.int64]  # in a search's pieces


@dataclass(frozen=True)
class Match:
    """A search for texts of one length.

    Attributes:
        seen: what the server sees.
        names: of the arrays whose gradients are compared.
        target: their gradients.
        pieces: (k,) those that may be in the text.
        vectors: (k, width) of these.
        first, last: special pieces around the text.
    """

    seen: Seen
    names: tuple[str, ...]
    target: list[Tensor]
    pieces: NDArray[np.int64]
    vectors: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, seen: Seen, pieces: NDArray[np.int64], first: Sequence[int], last: Sequence[int]) -> "Match":
        table = seen.model.get_input_embeddings()

        def look(numbers: Sequence[int] | NDArray[np.int64]) -> Tensor:
            with torch.no_grad():
                vectors: Tensor = table(torch.as_tensor(np.asarray(numbers, dtype=np.int64)))
            return vectors

        names = tuple(name for name in seen.update if not is_embedding(seen.model, name))
        gradients = {name: seen.gradient(name).float() for name in names}
        sizes = {name: float(gradient.square().mean().sqrt()) for name, gradient in gradients.items()}
        names = tuple(name for name in names if sizes[name] > NOTHING * max(sizes.values()))
        target = [gradients[name] for name in names]
        return cls(seen, names, target, pieces, look(pieces), look(first), look(last))

    def gradients(self, text: Tensor, signal: Tensor, graph: bool) -> tuple[Tensor, ...]:
        """Mean gradient of (texts, length, width) vectors whose logits have the gradient ``signal``."""
        count = len(text)
        ends = [part.expand(count, *part.shape) for part in (self.first, self.last)]
        whole = torch.cat([ends[0], text, ends[1]], dim=1)
        model = self.seen.model
        logits = model(inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2], dtype=torch.int64)).logits
        loss = (logits * signal).sum() / count
        found = torch.autograd.grad(
            loss, [model.get_parameter(name) for name in self.names], create_graph=graph, allow_unused=True
        )
        return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, self.target, strict=True))

    def squares(self, found: Sequence[Tensor]) -> Tensor:
        """TAG's loss."""
        parts = [
            (g - t).square().sum() / t.square().sum().clamp_min(1e-30)
            + ABSOLUTE * (g - t).abs().sum() / t.abs().sum().clamp_min(1e-30)
            for g, t in zip(found, self.target, strict=True)
        ]
        return torch.stack(parts).mean()

    def cosine(self, found: Sequence[Tensor]) -> Tensor:
        """LAMP's loss."""
        parts = [
            1.0 - (g * t).sum() / (g.norm() * t.norm()).clamp_min(1e-30)
            for g, t in zip(found, self.target, strict=True)
        ]
        return torch.stack(parts).mean()

    def read(self, text: Tensor) -> NDArray[np.int64]:
        """(texts, length) the pieces that the vectors point to, as places in ``pieces``."""
        unit = torch.nn.functional.normalize
        with torch.no_grad():
            return (unit(text, dim=-1) @ unit(self.vectors, dim=-1).T).argmax(dim=-1).numpy()


def search(
    match: Match,
    length: int,
    prior: Bigrams | None,
    *,
    steps: int,
    sweeps: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """The texts, in pieces, special ones left out.

    Args:
        length: of each text without special pieces.
        prior: with it LAMP, without TAG.
        sweeps: of the last search over all places, at most.
    """
    seen = match.seen
    seen.model.eval()
    seen.model.set_attn_implementation("eager")  # the fused one has no second derivative
    distance = match.squares if prior is None else match.cosine
    bias = head_bias(seen.model, seen.update)
    known = seen.gradient(bias).float() if bias else torch.randn(seen.model.config.num_labels)
    signal = known.repeat(seen.texts, 1)
    if seen.texts > 1 or not bias:
        signal = (signal + 0.1 * signal.norm() * torch.from_numpy(rng.standard_normal(signal.shape))).float()
    signal.requires_grad_(seen.texts > 1 or not bias)

    def loss_of(vectors: Tensor, graph: bool = False) -> Tensor:
        return distance(match.gradients(vectors, signal, graph))

    drawn = [rng.integers(0, len(match.pieces), (seen.texts, length)) for _ in range(STARTS)]
    begun = min(drawn, key=lambda one: float(loss_of(match.vectors[torch.from_numpy(one)]).detach()))
    text = match.vectors[torch.from_numpy(begun)].clone().requires_grad_()
    usual = match.vectors.norm(dim=-1).mean()
    moving = [text, signal] if signal.requires_grad else [text]
    optimizer = torch.optim.Adam(moving, lr=LR * float(usual))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=LR * float(usual) / 20)
    for step in range(steps):
        loss = loss_of(text, graph=True)
        if prior is not None:
            loss = loss + NORM * (text.norm(dim=-1).mean() - usual).square()
        for tensor, gradient in zip(moving, torch.autograd.grad(loss, moving), strict=True):
            tensor.grad = gradient
        optimizer.step()
        schedule.step()
        if prior is not None and step % EVERY == EVERY - 1:
            _rearrange(match, text, loss_of, prior, rng)
    found = exchange(match, match.read(text), loss_of, sweeps=sweeps)
    return [[int(match.pieces[place]) for place in one] for one in found]


def exchange(match: Match, said: Places, loss_of: Callable[..., Tensor], *, sweeps: int) -> Places:
    """Texts of less loss: place by place the best of some other pieces, or of changing places with another.

    Args:
        said: (texts, length) places in ``match.pieces``.
        loss_of: of (texts, length, width) vectors; with ``graph`` it has a slope.
    """

    def cost(one: Places) -> float:
        return float(loss_of(match.vectors[torch.from_numpy(one)]).detach())

    least = cost(said)
    for _ in range(sweeps):
        before = least
        promised = _gains(match, said, loss_of).max(dim=0).values.reshape(said.shape).numpy()
        for at in zip(*np.unravel_index(np.argsort(-promised, axis=None), said.shape), strict=True):
            best = said
            for other in _neighbours(match, said, at, loss_of):
                if (loss := cost(other)) < least:
                    least, best = loss, other
            said = best
        if least >= before:
            break
    return said


def _gains(match: Match, said: Places, loss_of: Callable[..., Tensor]) -> Tensor:
    """(pieces, places of all texts) how much the loss falls, by its slope, with a piece at a place."""
    vectors = match.vectors[torch.from_numpy(said)].clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(vectors, graph=True), [vectors])
    slope, now = slope.flatten(0, 1), vectors.detach().flatten(0, 1)
    return (now * slope).sum(dim=1) - match.vectors @ slope.T


def _neighbours(match: Match, said: Places, at: tuple[Any, ...], loss_of: Callable[..., Tensor]) -> Iterator[Places]:
    """The texts with another piece at a place, and with the piece there and one behind it exchanged."""
    text, place = at
    tried = np.arange(len(match.pieces))
    if len(tried) > TRIED:
        gains = _gains(match, said, loss_of)[:, text * said.shape[1] + place]
        tried = gains.topk(TRIED).indices.numpy()
    for piece in tried[tried != said[at]]:
        other = said.copy()
        other[at] = piece
        yield other
    for behind in range(place + 1, said.shape[1]):
        other = said.copy()
        other[text, [place, behind]] = said[text, [behind, place]]
        yield other


def _rearrange(
    match: Match, text: Tensor, loss_of: Callable[[Tensor], Tensor], prior: Bigrams, rng: np.random.Generator
) -> None:
    """Put the vectors into the best of some orders, in place."""

    def cost(order: NDArray[np.int64], one: int) -> float:
        said = read.copy()
        said[one] = read[one][order]
        loss = float(loss_of(match.vectors[torch.from_numpy(said)]).detach())
        return loss + SURPRISE * prior.surprise(match.pieces[said[one]].tolist())

    length = text.shape[1]
    if length < 2:
        return
    for one in range(len(text)):
        read = match.read(text)
        orders = [np.arange(length), *(_other(length, rng) for _ in range(LOOKS))]
        best = min(orders, key=lambda order: cost(order, one))
        with torch.no_grad():
            text[one] = text[one][torch.from_numpy(best)]


def _other(length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One of LAMP's rearrangements of so many places."""
    order = np.arange(length)
    kind = rng.integers(4)
    if kind == 0:
        a, b = rng.choice(length, 2, replace=False)
        order[[a, b]] = order[[b, a]]
        return order
    if kind == 1:
        return np.roll(order, int(rng.integers(1, length)))
    size = 1 if kind == 2 else int(rng.integers(1, length))
    start = int(rng.integers(0, length - size + 1))
    run, rest = order[start : start + size], np.delete(order, np.s_[start : start + size])
    return np.insert(rest, int(rng.integers(0, len(rest) + 1)), run)


def ends_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special pieces before and after a single text."""
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]
