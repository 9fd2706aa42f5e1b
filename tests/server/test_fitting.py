"""`student.target-ratio` finds the widest student of that size whose vocabulary keeps its share."""

import pytest
import torch
from transformers import BertConfig

from common.config import from_flat
from common.errors import InputError
from common.models import choose_layers, count_parameters
from common.progress import Silent
from common.slim import Shape, build
from server.fitting import fit_width
from server.preparation import prepare
from simulations.describe import examine
from tests.conftest import make_reviews

# as of sentence-transformers/all-MiniLM-L6-v2 and google-bert/bert-base-uncased
MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
BERT = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}


def empty(sizes):
    config = BertConfig(**sizes, num_labels=2)
    with torch.device("meta"):
        return build(config, Shape.whole(config, tuple(range(config.num_hidden_layers))))


def fitted(model, layers, **keys):
    flat = {"student.layers": layers, **{f"student.{name.replace('_', '-')}": value for name, value in keys.items()}}
    kept = choose_layers("spaced", layers, model.config.num_hidden_layers)
    return fit_width(from_flat(flat), model, kept, count_parameters(model)).student


def room(model, layers, heads, neurons, *, ratio, rank=0):
    """Rows of the word embedding, or of its factor, that are left of the target; by formulas of a BERT's width."""
    whole = model.config
    size, inner = whole.hidden_size, heads * whole.hidden_size // whole.num_attention_heads
    attention = 3 * (size * inner + inner) + inner * size + size
    forward = 2 * size * neurons + neurons + size
    rest = layers * (attention + forward + 4 * size)
    rest += (whole.max_position_embeddings + whole.type_vocab_size) * size + 2 * size  # embeddings but for words
    rest += size * size + size + 2 * size + 2  # pooler and head
    return (ratio * count_parameters(model) - rest - rank * size) / (rank or size)


@pytest.mark.parametrize(
    ("sizes", "layers", "ratio"),
    [(MINILM, 6, 0.4), (MINILM, 6, 0.7), (MINILM, 3, 0.2), (BERT, 6, 0.4), (BERT, 12, 0.5)],
)
def test_it_is_the_widest_student_whose_vocabulary_keeps_its_share(sizes, layers, ratio):
    model = empty(sizes)
    found = fitted(model, layers, target_ratio=ratio)
    most, neurons = sizes["num_attention_heads"], sizes["intermediate_size"]
    assert found.neurons == neurons * found.heads // most
    assert room(model, layers, found.heads, found.neurons, ratio=ratio) >= ratio * 30_522
    wider = found.heads + 1
    assert room(model, layers, wider, neurons * wider // most, ratio=ratio) < ratio * 30_522


def test_what_trimming_alone_reaches_or_the_keys_say_already_stays():
    model = empty(MINILM)
    found = fitted(model, 3, target_ratio=0.6)
    assert (found.heads, found.neurons) == (0, 0)
    assert room(model, 3, 12, 1536, ratio=0.6) >= 0.6 * 30_522
    found = fitted(model, 6, target_ratio=0.4, heads=6, neurons=512)
    assert (found.heads, found.neurons) == (6, 512)
    assert fitted(model, 6).heads == 0
    found = fitted(model, 6, target_ratio=0.4, neurons=256)
    assert (found.heads, found.neurons) == (9, 256)
    assert room(model, 6, 9, 256, ratio=0.4) >= 0.4 * 30_522 > room(model, 6, 10, 256, ratio=0.4)


@pytest.mark.parametrize(
    ("sizes", "layers", "rank", "ratio"),
    [
        (MINILM, 6, 16, 0.3), (MINILM, 6, 64, 0.3), (MINILM, 4, 16, 0.3), (MINILM, 3, 4, 0.25), (MINILM, 6, 0, 0.1),
        (BERT, 12, 16, 0.3), (BERT, 12, 64, 0.3), (BERT, 3, 4, 0.2), (BERT, 6, 32, 0.4), (BERT, 9, 64, 0.6),
    ],
)  # fmt: skip
def test_where_a_head_is_worth_all_pieces_the_neurons_are_counted_separately(sizes, layers, rank, ratio):
    model = empty(sizes)
    found = fitted(model, layers, target_ratio=ratio, embedding_rank=rank)
    heads, neurons = found.heads or sizes["num_attention_heads"], found.neurons or sizes["intermediate_size"]
    assert ratio * 30_522 <= room(model, layers, heads, neurons, ratio=ratio, rank=rank) <= 30_522
    if neurons != sizes["intermediate_size"] * heads // sizes["num_attention_heads"]:
        assert room(model, layers, heads, neurons + 1, ratio=ratio, rank=rank) < ratio * 30_522


def test_a_width_that_other_keys_do_not_allow_is_refused_with_both_reasons():
    model = empty(MINILM)
    config = from_flat({"student.layers": 6, "student.target-ratio": 0.4, "privacy.unit": "client"})
    with pytest.raises(InputError) as caught:
        fit_width(config, model, tuple(range(6)), count_parameters(model))
    assert "student.target-ratio = 0.4: for that heads and neurons have to go; privacy.unit" in str(caught.value)
    assert "student.width-selection = 'importance'" in str(caught.value)


def test_a_federation_and_its_description_have_the_student_that_was_found(tiny_teacher, tmp_path):
    """Two of the teacher's four layers leave room for all its pieces but one half; one head of two for more."""
    config = from_flat(
        {
            "task": "text", "data.source": str(make_reviews(tmp_path / "a.csv")), "data.clients": 3, "data.alpha": 10.0,
            "data.max-length": 48, "teacher.model": str(tiny_teacher), "student.layers": 3,
            "student.target-ratio": 0.55, "runtime.cache": str(tmp_path / "cache"),
        }
    )  # fmt: skip
    federation = prepare(config, Silent())
    keys, whole = federation.config.student, count_parameters(federation.lesson.model)
    assert (keys.heads, keys.neurons) == (1, 16)
    assert config.student.heads == 0
    assert 0.55 * whole - 16 < count_parameters(federation.final_student()) <= 0.55 * whole
    found = examine(config, Silent())["student"]
    assert found["parameters"] == count_parameters(federation.final_student())
    assert found["pieces"] == federation.pupil.shape.pieces
