"""Texts come back as they were, from memory and from disk."""

import numpy as np
import pytest

from common.texts import Texts

TEXTS = ["plain", "", "Grüße 映画 🎬\n\ttab", "a\0b", " spaces "]


@pytest.mark.parametrize("texts", [TEXTS, [], [""], ["", ""]], ids=["some", "none", "one empty", "all empty"])
def test_texts_survive_memory_and_disk(texts, tmp_path):
    column = Texts.of(texts)
    column.save(tmp_path, "train.0")
    for found in (column, Texts.open(tmp_path, "train.0")):
        assert len(found) == len(texts)
        assert found.all() == texts
        assert found.take(np.arange(len(texts))[::-1]) == texts[::-1]


def test_saved_texts_are_mapped(tmp_path):
    Texts.of(TEXTS).save(tmp_path, "a")
    opened = Texts.open(tmp_path, "a")
    assert isinstance(opened.data, np.memmap)
    assert opened.take(np.array([2, 0, 2])) == [TEXTS[2], TEXTS[0], TEXTS[2]]


def test_offsets_count_bytes():
    """An umlaut has two of them."""
    column = Texts.of(["aü", "", "b"])
    assert column.offsets.tolist() == [0, 3, 3, 4]
    assert column.data.tolist() == [97, 0xC3, 0xBC, 98]
