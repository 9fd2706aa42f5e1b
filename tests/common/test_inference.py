"""An example's logits are the same bits in any company, and those of the model called as usual."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from common.families import FAMILIES
from common.inference import ROWS, padded_lengths, predict
from common.models import load_teacher
from common.tokens import Tokens
from tests.conftest import BF16, FP32, make_sentences, make_teacher, make_tokens


def random_tokens(lengths, seed=0):
    """Examples of given lengths: exactly at, below and above the padded lengths."""
    lengths = np.asarray(lengths)
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(5, 100, offsets[-1]).astype(np.int32)
    return Tokens(ids, offsets, np.ones(len(ids), dtype=bool), lengths.astype(np.int32), pad=0, typed=True)


@pytest.fixture(scope="module")
def wide_model():
    """Wide enough that matrix kernels have a choice."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192,
        max_position_embeddings=128, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("compute", [FP32, BF16], ids=["fp32", "bf16"])
def test_an_example_has_the_same_bits_in_any_company(wide_model, compute):
    tokens = random_tokens([3, 8, 8, 7, 16, 9, 16, 64, 64, 60, 96, 70, *[8] * 33, *[5] * 5])
    everyone = np.arange(len(tokens))
    together = predict(wide_model, tokens, everyone, compute)
    assert together.shape == (len(tokens), 3)
    assert together.dtype == np.float32
    rng = np.random.default_rng(1)
    for row in range(12):
        assert predict(wide_model, tokens, everyone[row : row + 1], compute).tobytes() == together[row].tobytes()
    full = np.flatnonzero(tokens.lengths(everyone) == 8)  # nothing is padded: no mask at all
    for rows in (rng.permutation(everyone), rng.permutation(everyone)[:20], everyone[::-1], full, full[:ROWS]):
        assert predict(wide_model, tokens, rows, compute).tobytes() == together[rows].tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_called_as_usual(family, tmp_path):
    teacher = make_teacher(tmp_path, family, layers=2)
    model, tokenizer = load_teacher(teacher), AutoTokenizer.from_pretrained(teacher)
    left, right = make_sentences(40, seed=1), make_sentences(40, seed=2)
    found = predict(model, make_tokens(teacher, left, right), np.arange(40), FP32)
    with torch.no_grad():
        expected = np.concatenate(
            [model(**tokenizer(a, b, return_tensors="pt")).logits for a, b in zip(left, right, strict=True)]
        )
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_rows_give_no_logits_and_progress_counts_rows(wide_model):
    tokens = random_tokens([4] * 40 + [20] * 3)
    seen = []
    assert predict(wide_model, tokens, np.arange(0), FP32).shape == (0, 3)
    predict(wide_model, tokens, np.arange(43), FP32, seen.append)
    assert sum(seen) == 43


def test_padded_length_depends_on_the_length_alone_and_never_cuts():
    lengths = np.arange(1, 513)
    padded = padded_lengths(lengths)
    assert (padded >= lengths).all()
    assert padded[[0, 7, 8, 63, 64, 95, 96, 511]].tolist() == [8, 8, 16, 64, 96, 96, 128, 512]


def test_inference_leaves_no_gradient_and_no_training_mode(wide_model):
    wide_model.train()
    predict(wide_model, random_tokens([4]), np.arange(1), FP32)
    assert not wide_model.training
    assert all(parameter.grad is None for parameter in wide_model.parameters())
