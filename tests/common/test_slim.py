"""A student of any shape computes what its teacher does without the parts that are gone, in both its forms."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AutoModelForSequenceClassification

from common.errors import InputError
from common.families import FAMILIES, check_family, embedding_width, family_of, head_count, layers_of, neuron_count
from common.models import DROPOUTS, load_teacher
from common.slim import FactoredEmbedding, Shape, build, cut_student, load_slim, narrow, save_slim, widen
from tests.conftest import make_sentences, make_student, make_teacher, make_tokens

LAYERS = (0, 2)
HEADS = ((3, 0), (1, 2))  # of four, an order of importance
NEURONS = ((30, 2, 17, 5, 8), (1, 0, 31, 12, 9))
HEAD = 4  # width of one


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A teacher with four heads of four in each of four layers; every weight and bias is random and large."""
    folder = make_teacher(tmp_path_factory.mktemp(request.param), request.param, labels=3)
    model = load_teacher(folder)
    config = model.config
    config.num_attention_heads = 4
    model = AutoModelForSequenceClassification.from_config(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(folder):
    return load_teacher(folder)


@pytest.fixture
def inputs(folder):
    return make_tokens(folder, make_sentences(6)).batch(np.arange(6))


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def every_piece_but(teacher, gone):
    return [piece for piece in range(teacher.config.vocab_size) if piece not in gone]


# --- whole --------------------------------------------------------------------------------------


def test_a_whole_student_computes_the_bits_of_its_teacher(teacher, inputs):
    student = make_student(teacher, (0, 1, 2, 3))
    expected = logits(teacher, inputs)
    assert torch.equal(logits(student, inputs), expected)
    with torch.no_grad():
        assert torch.equal(student.train()(**inputs).logits, expected)  # every dropout is 0
    assert len(expected.unique()) == 18


def test_a_cut_student_holds_the_teachers_weights_layer_by_layer(teacher, inputs):
    student = make_student(teacher, LAYERS)
    prefix, of_teacher = family_of(teacher).layers + ".", teacher.state_dict()
    for name, weight in student.state_dict().items():
        source = name
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            source = f"{prefix}{LAYERS[int(layer)]}.{rest}"
        assert torch.equal(weight, of_teacher[source]), name
    assert student.config.num_hidden_layers == len(layers_of(student)) == 2
    assert teacher.config.num_hidden_layers == 4
    assert not torch.equal(logits(student, inputs), logits(teacher, inputs))


def test_a_student_shares_no_memory_with_its_teacher(teacher):
    shape = replace(Shape.whole(teacher.config, LAYERS), rank=3)
    pieces = range(teacher.config.vocab_size)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    for student in (make_student(teacher, (0, 1, 2, 3)), cut_student(teacher, shape, pieces=list(pieces))):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert teacher.config.vocab_size == len(pieces)


def test_dropout_is_what_was_asked_for_and_only_while_training(teacher, inputs):
    student = make_student(teacher, (0, 1), dropout=0.5)
    rates = {name: rate for name, rate in student.config.to_dict().items() if name in DROPOUTS}
    assert len(rates) >= 3
    assert {rate for rate in rates.values() if rate is not None} == {0.5}
    assert {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}
    assert torch.equal(logits(student, inputs), logits(student, inputs))
    student.train()
    with torch.no_grad():
        assert not torch.equal(student(**inputs).logits, student(**inputs).logits)


def test_without_dropout_no_module_drops_anything(teacher):
    student = make_student(teacher, (0, 1))
    assert {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_cutting_draws_nothing_from_the_global_generator(teacher):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    shape = Shape.whole(teacher.config, (0,))
    cut_student(teacher, replace(shape, pieces=90, rank=3), pieces=list(range(90)))
    cut_student(teacher, shape, random=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_student_has_the_teachers_embedding_and_head_and_layers_of_its_own(teacher):
    shape = Shape.whole(teacher.config, LAYERS)
    torch.manual_seed(1)
    drawn = cut_student(teacher, shape, random=True).state_dict()
    kept = cut_student(teacher, shape).state_dict()
    layers = [name for name in kept if name.startswith(f"{family_of(teacher).layers}.")]
    for name, weight in kept.items():
        if name not in layers:
            assert torch.equal(drawn[name], weight), name
    matrices = [name for name in layers if kept[name].dim() == 2]
    assert len(matrices) >= 8
    assert not any(torch.equal(drawn[name], kept[name]) for name in matrices)


def test_a_random_student_is_drawn_from_torchs_generator(teacher):
    shape, found = Shape.whole(teacher.config, LAYERS), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        state = cut_student(teacher, shape, random=True).state_dict()
        found.append(torch.cat([tensor.reshape(-1) for tensor in state.values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- narrow -------------------------------------------------------------------------------------


def masked(model, heads, neurons):
    """Hooks that put zeros where other heads and neurons leave their outputs."""
    family = family_of(model)
    for layer, kept, width in zip(layers_of(model), heads, neurons, strict=True):
        columns = [head * HEAD + place for head in kept for place in range(HEAD)]
        for path, stay in ((family.mix, columns), (family.down, list(width))):

            def zero(module, given, stay=stay):
                left = torch.zeros_like(given[0])
                left[..., stay] = given[0][..., stay]
                return (left,)

            layer.get_submodule(path).register_forward_pre_hook(zero)
    return model


def narrowed(teacher, heads=HEADS, neurons=NEURONS):
    return cut_student(teacher, replace(Shape.whole(teacher.config, LAYERS), heads=heads, neurons=neurons))


def test_a_narrow_student_computes_what_masking_the_rest_would(teacher, inputs):
    expected = logits(masked(make_student(teacher, LAYERS), HEADS, NEURONS), inputs)
    whole = logits(make_student(teacher, LAYERS), inputs)
    found = logits(narrowed(teacher), inputs)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (expected - whole).abs().max() > 0.01


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masking_equals_cutting_in_double_precision_whichever_attention(teacher, inputs, attention):
    found = []
    for model in (masked(make_student(teacher, LAYERS), HEADS, NEURONS), narrowed(teacher)):
        model.set_attn_implementation(attention)
        found.append(logits(model.double(), inputs))
    torch.testing.assert_close(found[0], found[1], atol=1e-13, rtol=1e-12)


def test_the_order_of_heads_and_neurons_does_not_matter(teacher, inputs):
    again = narrowed(teacher, [kept[::-1] for kept in HEADS], [sorted(kept) for kept in NEURONS])
    torch.testing.assert_close(logits(again, inputs), logits(narrowed(teacher), inputs), atol=2e-5, rtol=1e-5)


def test_a_narrow_student_is_as_small_as_it_says(teacher):
    """By hand: of each layer two of four heads in four matrices, five of all neurons in two."""
    whole, narrow_ = make_student(teacher, LAYERS), narrowed(teacher)
    neurons = neuron_count(teacher.config)
    gone = 2 * (3 * (16 * 8 + 8) + 8 * 16 + 2 * (neurons - 5) * 16 + (neurons - 5))
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (whole, narrow_)]
    assert count[0] - count[1] == gone


def test_a_smaller_student_is_a_beginning_of_a_larger_one(teacher):
    """Cut twice, to the first of what the first cut has kept, or at once."""
    student = narrowed(teacher)
    narrow(student, [(0,), (0,)], [range(3), range(3)])
    at_once = narrowed(teacher, [kept[:1] for kept in HEADS], [kept[:3] for kept in NEURONS])
    for name, weight in at_once.state_dict().items():
        assert torch.equal(student.state_dict()[name], weight), name
    for name, weight in narrowed(teacher).state_dict().items():  # the beginning of each tensor, or of each third
        small = at_once.state_dict()[name]
        if "c_attn" not in name:
            assert torch.equal(small, weight[tuple(slice(size) for size in small.shape)]), name


def test_inner_states_of_a_narrow_student_can_be_trained(teacher, inputs):
    student = narrowed(teacher).train()
    student(**inputs).logits.square().sum().backward()
    words = student.get_input_embeddings().weight
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert parameter is words or parameter.grad.any() or "key" in name or "k_lin" in name or "token_type" in name


# --- pieces and rank ----------------------------------------------------------------------------


def test_a_student_with_fewer_pieces_computes_the_same_from_their_new_numbers(folder, teacher, inputs):
    used = set(inputs["input_ids"].unique().tolist())
    gone = set(list(set(range(10, teacher.config.vocab_size)) - used)[::2])
    pieces = every_piece_but(teacher, gone)
    assert len(gone) > 10
    shape = replace(Shape.whole(teacher.config, LAYERS), pieces=len(pieces))
    student = cut_student(teacher, shape, pieces=pieces)
    number = {piece: place for place, piece in enumerate(pieces)}
    ids = torch.tensor([[number[piece] for piece in row] for row in inputs["input_ids"].tolist()])
    expected = logits(make_student(teacher, LAYERS), inputs)
    assert torch.equal(logits(student, {**inputs, "input_ids": ids}), expected)
    assert student.config.vocab_size == student.get_input_embeddings().num_embeddings == len(pieces)
    assert student.config.pad_token_id == number[teacher.config.pad_token_id]


def test_the_rows_of_a_factored_embedding_are_the_best_of_that_rank(teacher):
    """Eckart and Young: the squared error is the sum of the squares of the singular values left out."""
    words = teacher.get_input_embeddings().weight.double()
    sizes = torch.linalg.svdvals(words)
    for rank in (1, 3, words.shape[1]):
        student = cut_student(teacher, replace(Shape.whole(teacher.config, LAYERS), rank=rank))
        factors = student.get_input_embeddings()
        assert isinstance(factors, FactoredEmbedding)
        assert factors.weight.shape == (len(words), rank)
        assert factors.project.weight.shape == (words.shape[1], rank)
        found = factors.weight.double() @ factors.project.weight.double().T
        error = (found - words).square().sum().item()
        assert error == pytest.approx(sizes[rank:].square().sum().item(), rel=1e-5, abs=1e-9)


def test_a_factored_embedding_of_full_rank_computes_what_the_matrix_did(teacher, inputs):
    rank = teacher.get_input_embeddings().embedding_dim
    student = cut_student(teacher, replace(Shape.whole(teacher.config, LAYERS), rank=rank))
    expected = logits(make_student(teacher, LAYERS), inputs)
    torch.testing.assert_close(logits(student, inputs), expected, atol=1e-4, rtol=1e-4)


# --- both forms on disk -------------------------------------------------------------------------

KINDS = {
    "layers": {},
    "heads": {"heads": HEADS},
    "neurons": {"neurons": NEURONS},
    "pieces": {"pieces": 90},
    "rank": {"rank": 5},
    "everything": {"heads": HEADS, "neurons": NEURONS, "pieces": 90, "rank": 5},
}


@pytest.fixture(params=KINDS)
def cut(request, teacher):
    """A student in which something is cut, and its shape."""
    pieces = range(KINDS[request.param].get("pieces", 0))
    shape = replace(Shape.whole(teacher.config, LAYERS), **KINDS[request.param])
    return cut_student(teacher, shape, pieces=list(pieces)), shape


def some(model):
    """Inputs of known pieces, of several lengths."""
    rng, pad = np.random.default_rng(0), model.config.pad_token_id
    ids = torch.from_numpy(rng.integers(pad + 1, model.config.vocab_size, (5, 9)))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7], [2], [9]])).long()
    return {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}


def test_the_plain_form_has_the_same_logits(cut):
    student, shape = cut
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    plain = widen(student, shape)
    inputs = some(student)
    assert (logits(plain, inputs) - logits(student, inputs)).abs().max() < 2e-5  # of logits of about 3
    assert logits(student, inputs).abs().max() > 0.5
    exact = [logits(model.double(), inputs) for model in (plain, student)]
    torch.testing.assert_close(*exact, atol=1e-6 if shape.rank else 1e-12, rtol=0)
    assert all(torch.equal(weight.float(), before[name]) for name, weight in student.state_dict().items())


def test_the_plain_form_opens_with_transformers_alone(cut, tmp_path):
    student, shape = cut
    plain = widen(student, shape)
    plain.save_pretrained(tmp_path)
    opened, told = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(logits(opened, some(student)), logits(plain, some(student)))
    assert head_count(opened.config) == 4
    assert neuron_count(opened.config) == len(shape.neurons[0])
    assert not isinstance(opened.get_input_embeddings(), FactoredEmbedding)


def test_the_slim_form_comes_back_bit_for_bit(cut, tmp_path):
    student, shape = cut
    save_slim(student, shape, tmp_path / "slim")
    assert {path.name for path in (tmp_path / "slim").iterdir()} == {"config.json", "shape.json", "model.safetensors"}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    opened, found = load_slim(tmp_path / "slim")
    assert torch.equal(torch.get_rng_state(), before)
    assert found == shape
    state, expected = opened.state_dict(), student.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    assert torch.equal(logits(opened, some(student)), logits(student, some(student)))


def test_the_slim_form_of_another_shape_is_refused(cut, tmp_path):
    student, shape = cut
    save_slim(student, shape, tmp_path)
    wrong = json.loads((tmp_path / "shape.json").read_text())
    wrong["neurons"] = [row[:-1] for row in wrong["neurons"]]
    (tmp_path / "shape.json").write_text(json.dumps(wrong))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_slim(tmp_path)


def test_an_empty_student_has_the_weights_of_a_shape(cut):
    student, shape = cut
    with torch.device("meta"):
        empty = build(student.config, shape)
    sizes = {name: parameter.shape for name, parameter in student.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == sizes


def test_a_shape_survives_json(cut):
    _, shape = cut
    raw = json.loads(json.dumps(shape.__dict__))
    assert Shape.from_json(raw) == shape


# --- families -----------------------------------------------------------------------------------


def test_another_family_is_refused_by_name():
    with pytest.raises(
        InputError, match=r"^teacher.model = 'x': .*'albert'.* bert, roberta, electra, distilbert, gpt2$"
    ):
        check_family(AlbertConfig(), "teacher.model = 'x'")


def test_every_path_of_a_family_leads_somewhere(teacher):
    family, width = family_of(teacher), neuron_count(teacher.config)
    assert (head_count(teacher.config), len(layers_of(teacher))) == (4, 4)
    assert embedding_width(teacher.config) == teacher.get_input_embeddings().embedding_dim
    for layer in layers_of(teacher):
        products = [layer.get_submodule(path) for path in (*family.heads, family.mix, family.up, family.down)]
        sizes = [product.weight.numel() for product in products]
        heads = [16 * 16] * 3 if len(family.heads) == 3 else [16 * 48]
        assert sizes == [*heads, 16 * 16, 16 * width, 16 * width]
    for path in family.embeddings:
        if path.split(".")[-1] != "embeddings_project":  # there only where the embedding is narrower
            assert list(teacher.get_submodule(path).parameters())
    assert list(teacher.get_submodule(family.classifier).parameters())
    words = next(name for name, weight in teacher.named_parameters() if weight is teacher.get_input_embeddings().weight)
    assert words.startswith(family.embeddings)
