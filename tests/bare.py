"""Distillation in plain PyTorch, without any of our code but the order of batches: what ours is held against."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from common.batches import token_budget_batches
from common.seeding import generator
from tests.conftest import make_student
from tests.scene import WHO


def bare_loop(scene, recipe):
    """The same training without any of our code but the order of batches: the final weights and the mean loss."""
    model = make_student(scene.teacher, (0, 3)).train()
    start = copy.deepcopy(model)
    trained = [p for name, p in model.named_parameters() if name in scene.weights]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    tokens, labels = scene.data.tokens, torch.from_numpy(scene.data.labels)
    lengths = tokens.lengths(scene.rows)
    losses = []
    for epoch in range(recipe.epochs):
        for places in token_budget_batches(lengths, recipe.token_budget, generator(0, "batches", *WHO, epoch)):
            rows = scene.rows[places]
            inputs = tokens.batch(rows)
            output = model(**inputs, output_hidden_states=True)
            teacher = torch.from_numpy(scene.examples.soft[places])
            loss = bare_outer(output.logits, teacher, labels[rows], recipe)
            with torch.no_grad():
                states = scene.teacher(**inputs, output_hidden_states=True).hidden_states
            loss = loss + bare_inner(output.hidden_states, states, inputs["attention_mask"].bool(), recipe)
            told = loss.item()
            if recipe.proximal:
                moved = [
                    (new - old).square().sum() for new, old in zip(model.parameters(), start.parameters(), strict=True)
                ]
                loss = loss + recipe.proximal / 2 * sum(moved)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            optimizer.step()
            losses.append((told, len(rows)))
    return dict(model.named_parameters()), np.average([one for one, _ in losses], weights=[n for _, n in losses])


def bare_outer(logits, teacher, labels, recipe):
    """The loss on outputs; adaptive: each example's soft weight times the teacher's trust, the rest to the label."""
    soft_weight, hard_weight, temperature = recipe.weights["soft"], recipe.weights["hard"], recipe.temperature
    if recipe.regression:
        soft = (logits - teacher).square()[:, 0]
        hard = (logits[:, 0] - labels.float()).square()
        trust = (-(teacher[:, 0] - labels.float()).square()).exp()
    else:
        p = F.softmax(teacher / temperature, -1)
        soft = temperature**2 * (p * (p.log() - F.log_softmax(logits / temperature, -1))).sum(-1)
        hard = F.cross_entropy(logits, labels, reduction="none")
        trust = F.softmax(teacher, -1)[torch.arange(len(labels)), labels]
    if recipe.adaptive:
        return (soft_weight * trust * soft + (hard_weight + soft_weight * (1 - trust)) * hard).mean()
    return soft_weight * soft.mean() + hard_weight * hard.mean()


def bare_inner(ours, theirs, real, recipe):
    """The losses on hidden states and on those of the first piece."""
    pairs = [(ours[s + 1], theirs[t + 1]) for s, t in recipe.hidden_pairs]
    if recipe.hidden_loss == "cosine":
        parts = [(1 - F.cosine_similarity(a[real], b[real])).mean() for a, b in pairs]
    else:
        parts = [F.mse_loss(a[real], b[real]) for a, b in pairs]
    first = [(a[:, 0] / a[:, 0].norm(dim=1)[:, None] - b[:, 0] / b[:, 0].norm(dim=1)[:, None]) for a, b in pairs]
    patient = [part.square().sum(1).mean() for part in first]
    return recipe.weights["hidden"] * sum(parts) / len(parts) + recipe.weights["cls"] * sum(patient) / len(patient)
