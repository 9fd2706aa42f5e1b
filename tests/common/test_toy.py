"""The toy corpus: the same everywhere, no sentence twice, shards that differ, too hard for a bag of words."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from common import toy
from common.toy import DOMAINS, GRAMMAR, LABEL_NOISE, toy_corpus

SPLITS = ("train", "validation")
SEED_0_SHA256 = "3c61fb172f924b3c22a02fbcfe5b80759abefe2854bc13584b7ffbd1bcea4dad"
"""Changes with any change of the grammar; then the accuracies in toy.py are to be measured again."""


@pytest.fixture(scope="module")
def corpus() -> dict[str, dict[str, list[Any]]]:
    return toy_corpus(0)


@pytest.fixture(scope="module")
def truth() -> dict[str, dict[str, list[Any]]]:
    return toy_corpus(0, noise=0)


def digest(corpus: dict[str, dict[str, list[Any]]]) -> str:
    """SHA-256 over one line a row, train first."""
    tables = [corpus[split] for split in SPLITS]
    rows = [row for t in tables for row in zip(t["sentence"], t["label"], t["domain"], strict=True)]
    return hashlib.sha256("\n".join("\t".join(map(str, row)) for row in rows).encode()).hexdigest()


def word_count_accuracy(corpus: dict[str, dict[str, list[Any]]], longest: int) -> float:
    """Validation accuracy of logistic regression on counts of up to `longest` words in a row."""
    model = make_pipeline(CountVectorizer(ngram_range=(1, longest)), LogisticRegression(max_iter=1000))
    model.fit(corpus["train"]["sentence"], corpus["train"]["label"])
    return float(model.score(corpus["validation"]["sentence"], corpus["validation"]["label"]))


def test_same_seed_same_corpus(corpus):
    assert toy_corpus(0) == corpus
    assert digest(corpus) == SEED_0_SHA256


def test_another_process_with_another_hash_seed_makes_the_same_corpus():
    code = "import json; from common.toy import toy_corpus; print(json.dumps(toy_corpus(5, 60, 24)))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]


def test_another_seed_makes_other_sentences(corpus):
    other = toy_corpus(1)
    shared = set(corpus["train"]["sentence"]) & set(other["train"]["sentence"])
    assert digest(other) != SEED_0_SHA256
    assert len(shared) < 0.1 * len(corpus["train"]["sentence"])


def test_no_sentence_occurs_twice_in_the_corpus(corpus):
    sentences = [" ".join(s.casefold().split()) for split in SPLITS for s in corpus[split]["sentence"]]
    assert len(set(sentences)) == len(sentences) == 7200


@pytest.mark.parametrize(("train", "validation"), [(12, 12), (13, 29), (1234, 567), (6000, 1200)])
def test_sizes_are_the_ones_asked_for(train, validation):
    made = toy_corpus(3, train, validation)
    assert list(made) == list(SPLITS)
    for split, size in (("train", train), ("validation", validation)):
        assert [len(column) for column in made[split].values()] == [size] * 3
        assert set(made[split]["domain"]) == set(DOMAINS)
        assert all(type(label) is int and label in (0, 1) for label in made[split]["label"])


def test_domains_differ_in_size_by_a_factor_of_three(corpus):
    for split, slack in (("train", 0.1), ("validation", 0.2)):
        sizes = Counter(corpus[split]["domain"])
        assert max(sizes.values()) / min(sizes.values()) == pytest.approx(3, abs=slack)


def test_label_shares_differ_by_domain_and_balance_overall(truth):
    assert len(DOMAINS) == 12
    for split in SPLITS:
        labels, domains = np.array(truth[split]["label"]), np.array(truth[split]["domain"])
        for domain in GRAMMAR:
            shard = labels[domains == domain.name]
            assert 0.35 <= domain.positive <= 0.65
            assert abs(shard.sum() - domain.positive * len(shard)) <= 0.5
        assert labels.mean() == pytest.approx(0.5, abs=0.03)
    assert max(d.positive for d in GRAMMAR) - min(d.positive for d in GRAMMAR) > 0.25


def test_rows_are_shuffled(corpus):
    domains, labels = corpus["train"]["domain"], corpus["train"]["label"]
    neighbours = np.mean([a == b for a, b in pairwise(domains)])
    assert neighbours < 0.15  # sorted by domain it would be above 0.99, by chance it is 0.09
    assert np.mean(labels[:3000]) == pytest.approx(np.mean(labels[3000:]), abs=0.05)


def test_noise_turns_its_share_of_labels_and_nothing_else(corpus, truth):
    for split in SPLITS:
        assert corpus[split]["sentence"] == truth[split]["sentence"]
        assert corpus[split]["domain"] == truth[split]["domain"]
        turned = np.not_equal(corpus[split]["label"], truth[split]["label"])
        assert turned.sum() == round(LABEL_NOISE * len(turned))
        # both labels are turned, so noise is no bias
        assert turned[np.array(truth[split]["label"]) == 1].mean() == pytest.approx(LABEL_NOISE, abs=0.02)


def test_a_typo_touches_a_few_words_in_a_hundred(corpus, monkeypatch):
    known = set()
    monkeypatch.setattr(toy, "TYPO_RATE", 0.0)
    for split in SPLITS:
        known.update(word.strip(".,") for text in toy_corpus(0)[split]["sentence"] for word in text.split())
    words = [word.strip(".,") for text in corpus["train"]["sentence"] for word in text.split()]
    assert 0.01 < np.mean([word not in known for word in words]) < 0.04


def test_words_that_praise_in_one_domain_complain_in_another():
    senses: dict[str, set[bool]] = {}
    for aspect in (aspect for domain in GRAMMAR for aspect in domain.aspects):
        sides = aspect.partition(": ")[2].split(" | ")
        for praise, words in zip((True, False), sides, strict=True):
            for word in words.split(", "):
                senses.setdefault(word, set()).add(praise)
    both = {word for word, sense in senses.items() if len(sense) == 2}
    assert {"light", "unpredictable", "predictable", "cold", "dark", "soft", "hard", "long"} <= both
    assert len(both) >= 15


def test_templates_are_filled_and_read_as_sentences(corpus):
    for text in corpus["train"]["sentence"]:
        assert not set("{}[]|") & set(text)
        assert "  " not in text and text[0].isupper() and text.endswith(".")
        assert 3 <= len(text.split()) <= 30
    lengths = [len(text.split()) for text in corpus["train"]["sentence"]]
    assert 11 < np.mean(lengths) < 16


@pytest.mark.parametrize(("label", "sentence"), [(1, "I have seen worse films."), (0, "I have seen better films.")])
def test_a_template_is_true_of_both_labels(label, sentence, monkeypatch):
    monkeypatch.setattr(toy, "TEMPLATES", {"one": (1.0, ("I have seen [worse|better] {items}",))})
    monkeypatch.setattr(toy, "FRAMES", ((1.0, "{core}."),))
    monkeypatch.setattr(toy, "TYPO_RATE", 0.0)
    film = next(domain for domain in GRAMMAR if domain.name == "film")
    assert toy._sentence(film, label, np.random.default_rng(0)) == sentence


def test_a_slot_takes_the_side_its_sign_says(monkeypatch):
    """Of a negated template the word contradicts the label; of a plain one it agrees."""
    monkeypatch.setattr(toy, "OWN_WORDS", 1.0)
    hotel = next(domain for domain in GRAMMAR if domain.name == "hotel")
    praise, complaint = {"hot", "strong"}, {"cold", "weak"}
    aspects, rng = {"a": "shower: hot, strong | cold, weak"}, np.random.default_rng(0)
    cases = (("a+", 1, praise), ("a-", 1, complaint), ("a+", 0, complaint), ("a-", 0, praise))
    for slot, label, words in cases:
        assert {toy._fill(slot, hotel, aspects, label, rng) for _ in range(40)} == words


def test_shares_of_templates_and_frames_sum_to_one():
    assert sum(share for share, _ in toy.TEMPLATES.values()) == pytest.approx(1)
    assert sum(share for share, _ in toy.FRAMES) == pytest.approx(1)


def test_a_bag_of_words_does_not_solve_it(corpus):
    assert 0.68 < word_count_accuracy(corpus, longest=1) < 0.78


def test_pairs_of_words_do_not_solve_it_either(corpus):
    assert 0.73 < word_count_accuracy(corpus, longest=2) < 0.83


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"train": 11}, "^train must be at least 12"),
        ({"validation": 0}, "^validation must be at least 12"),
        ({"train": 10**6}, "^train must be at most 100000"),
        ({"validation": 10**6}, "^validation must be at most 100000"),
        ({"train": 99_000, "validation": 2000}, r"^train \+ validation must be at most 100000"),
        ({"seed": -1}, "^seed must be"),
        ({"noise": 0.5}, "^noise must be"),
        ({"noise": -0.1}, "^noise must be"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        toy_corpus(**{"seed": 0, **arguments})
