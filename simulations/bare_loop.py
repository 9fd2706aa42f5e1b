"""The floor of a round: one process, plain PyTorch, no federation software.

The same clients, batches, trained weights, cached teacher outputs and precision as a federated round, written
as anybody would write it. `fedistill bench` times it beside the real thing.
"""

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from common.batches import token_budget_batches
from common.seeding import generator
from server.preparation import Federation


def bare_round(
    federation: Federation, clients: tuple[int, ...], soft: dict[int, NDArray[np.float32]], round_number: int
) -> tuple[float, dict[str, NDArray[np.float64]]]:
    """Train each client from the federation's weights, one after the other.

    Args:
        soft: the teacher's logits of each client's training rows.

    Returns:
        Seconds, and the example-weighted mean of the clients' updates by parameter name.
    """
    config, data, model = federation.config, federation.data.train, federation.student
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: torch.from_numpy(array.copy()) for name, array in federation.weights.items()}
    total = {name: np.zeros(array.shape) for name, array in federation.weights.items()}
    examples = 0
    falling = config.client.lr_decay == "linear" and config.rounds > 1
    lr = config.client.lr * (1.0 - 0.9 * (round_number - 1) / (config.rounds - 1) if falling else 1.0)
    model.train()
    began = time.perf_counter()
    for client in clients:
        rows = federation.data.shard(client).train
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=config.client.weight_decay, fused=True)
        lengths, targets = data.tokens.lengths(rows), torch.from_numpy(soft[client].copy())
        for epoch in range(config.client.epochs):
            rng = generator(config.seed, "batches", round_number, client, epoch)
            for places in token_budget_batches(lengths, config.client.token_budget, rng):
                with federation.compute.autocast():
                    logits = model(**data.tokens.batch(rows[places])).logits.float()
                loss = _loss(logits, targets[places], torch.from_numpy(data.labels[rows[places]]), config)
                optimizer.zero_grad()
                loss.backward()
                if config.client.clip_norm > 0:
                    torch.nn.utils.clip_grad_norm_(trained.values(), config.client.clip_norm)
                optimizer.step()
        for name, parameter in trained.items():
            total[name] += len(rows) * (parameter.detach() - start[name]).numpy()
        examples += len(rows)
    seconds = time.perf_counter() - began
    return seconds, {name: array / examples for name, array in total.items()}


def _loss(logits: torch.Tensor, soft: torch.Tensor, labels: torch.Tensor, config: Any) -> Any:
    keys = config.distill
    if logits.shape[1] == 1:
        scores = logits[:, 0]
        return keys.soft_weight * F.mse_loss(scores, soft[:, 0]) + keys.hard_weight * F.mse_loss(scores, labels.float())
    heat = keys.temperature
    kl = F.kl_div(F.log_softmax(logits / heat, -1), F.softmax(soft / heat, -1), reduction="batchmean")
    return keys.soft_weight * heat**2 * kl + keys.hard_weight * F.cross_entropy(logits, labels)
