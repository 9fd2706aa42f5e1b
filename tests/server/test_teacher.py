"""The teacher is found and checked before the run, and fine-tuned on public text alone, once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from common.dataset import FederatedDataset
from common.errors import InputError
from common.families import FAMILIES
from common.hashing import hash_tensors
from common.models import load_teacher
from common.progress import Silent
from common.tasks import GLUE, TOY, text_task
from server import teacher as module
from server.teacher import (
    TeacherSource,
    check_head,
    check_length,
    find_teacher,
    fine_tune,
    labelled_rows,
    prepare_teacher,
)
from tests.conftest import make_dataset, make_reviews, make_sentences, make_teacher


def copy_of(teacher, folder, *, without=(), **changed):
    folder.mkdir()
    for path in teacher.iterdir():
        if path.name not in without:
            (folder / path.name).write_bytes(changed.get(path.stem, path.read_bytes()))
    return folder


def refusal(model):
    with pytest.raises(InputError) as caught:
        find_teacher(str(model))
    assert str(model) in str(caught.value)
    return str(caught.value)


# Finding


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_layers_and_positions_are_read_without_the_weights(family, tmp_path):
    classifier = make_teacher(tmp_path / "classifier", family, labels=3, layers=2)
    encoder = make_teacher(tmp_path / "encoder", family, labels=0, layers=3)
    assert find_teacher(str(classifier)) == TeacherSource(
        classifier, 3, ("label_0", "label_1", "label_2"), layers=2, positions=66
    )
    assert find_teacher(str(encoder)) == TeacherSource(encoder, 0, (), layers=3, positions=66)


def test_a_folder_without_config_is_refused(tiny_teacher, tmp_path):
    assert "no config.json" in refusal(copy_of(tiny_teacher, tmp_path / "t", without=("config.json",)))
    assert "no config.json" in refusal(tmp_path)


def test_pickled_weights_are_never_an_offer(tiny_teacher, tmp_path):
    folder = copy_of(tiny_teacher, tmp_path / "t", without=("model.safetensors",))
    assert "no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refusal(folder)
    assert "only pickled weights (pytorch_model.bin)" in message
    assert "pickle is never loaded" in message


@pytest.mark.parametrize("keep", [0, 4, 2000])
def test_broken_weights_are_refused(tiny_teacher, tmp_path, keep):
    whole = (tiny_teacher / "model.safetensors").read_bytes()
    folder = copy_of(tiny_teacher, tmp_path / "t", model=whole[:keep])
    assert "model.safetensors is not a readable safetensors file" in refusal(folder)


@pytest.mark.parametrize("config", [b"{", b"{}", b'{"model_type": "no-such-model"}', b"[]"])
def test_a_broken_config_is_refused(tiny_teacher, tmp_path, config):
    assert "config.json does not load" in refusal(copy_of(tiny_teacher, tmp_path / "t", config=config))


def test_another_family_is_refused_by_name(tmp_path):
    config = AlbertConfig(vocab_size=20, hidden_size=8, embedding_size=4, num_attention_heads=2, intermediate_size=8)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert "family 'albert' cannot be cut" in refusal(tmp_path)


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path):
    for name in (str(tmp_path / "no"), "./no", "../no", "a/b/c", "", "a b"):
        assert refusal(name).endswith("no such folder")


def test_a_hub_id_out_of_reach_says_how_to_do_without(tmp_path):
    message = refusal("no-such-owner/no-such-model")
    assert "could not be fetched" in message
    assert "teacher.model = FOLDER" in message


# Fitting the task


def source(**changed):
    return TeacherSource(**{"folder": None, "head": 2, "labels": (), "layers": 6, "positions": 512} | changed)


def test_a_head_must_have_the_tasks_labels():
    check_head(source(), TOY, 0)
    check_head(source(head=1), GLUE["stsb"], 0)
    with pytest.raises(InputError, match="its head has 2 labels, task = mnli has 3"):
        check_head(source(), GLUE["mnli"], 100)


def test_a_head_with_the_tasks_labels_in_another_order_is_refused():
    check_head(source(labels=("negative", "positive")), TOY, 0)
    with pytest.raises(InputError, match="its labels are in the order positive, negative"):
        check_head(source(labels=("positive", "negative")), TOY, 0)
    named = text_task(("text",), ("Negative", "Positive"), "label", False)  # a model's are read in lower case
    check_head(source(labels=("negative", "positive")), named, 0)
    with pytest.raises(InputError, match="its labels are in the order positive, negative"):
        check_head(source(labels=("positive", "negative")), named, 0)


def test_a_teacher_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_teacher(tmp_path, layers=1)
    weights = load_file(folder / "model.safetensors")
    weights.pop("bert.encoder.layer.0.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights, e.g. bert.encoder.layer.0.output"):
        load_teacher(folder)


def test_a_bare_encoder_needs_public_examples():
    check_head(source(head=0), GLUE["mnli"], 1)
    with pytest.raises(InputError, match=r"data.public-fraction: no public example"):
        check_head(source(head=0), TOY, 0)


def test_examples_must_not_be_longer_than_the_teacher_can_take():
    check_length(source(), 512)
    with pytest.raises(InputError, match=r"data.max-length = 128: the teacher takes 66 word pieces"):
        check_length(source(positions=66), 128)


# Fine-tuning


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("encoder"), labels=0, layers=1)


@pytest.fixture(scope="module")
def federation(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    keys = {"teacher__epochs": 2, "teacher__lr": 0.01, "teacher__token_budget": 128, "client__precision": "fp32"}
    config, data = make_dataset(make_reviews(folder / "a.csv", 150), encoder, folder / "cache", **keys)
    return config, data, folder / "cache"


def contents(data, rows):
    tokens = data.train.tokens
    return {tuple(tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()) for row in rows}


def test_only_public_text_is_shown_to_a_bare_encoder(encoder, federation, tmp_path, monkeypatch):
    config, data, _ = federation
    seen = []

    def record(model, arguments, inputs):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))

    def watched(*arguments, **overrides):
        model = load_teacher(*arguments, **overrides)
        model.register_forward_pre_hook(record, with_kwargs=True)
        return model

    monkeypatch.setattr(module, "load_teacher", watched)
    found = prepare_teacher(config, find_teacher(str(encoder)), data, tmp_path, Silent())
    private = np.concatenate([[*shard.train, *shard.heldout] for shard in map(data.shard, range(data.clients))])
    assert len(private) == 120
    assert set(seen) == contents(data, data.public)
    assert set(seen).isdisjoint(contents(data, private.astype(int)))
    assert len(seen) == 2 * len(data.public) == 2 * found.fine_tuned_on


def test_a_fine_tuned_teacher_is_a_plain_transformers_folder_that_fits_the_task(encoder, federation):
    config, data, cache = federation
    found = prepare_teacher(config, find_teacher(str(encoder)), data, cache, Silent())
    model = AutoModelForSequenceClassification.from_pretrained(found.folder)
    assert hash_tensors(model.state_dict()) == found.hash
    assert model.config.id2label == {0: "0", 1: "1"}
    assert AutoTokenizer.from_pretrained(found.folder)("good")["input_ids"]
    assert find_teacher(str(found.folder)).head == 2
    bare = load_teacher(encoder, complete=False).state_dict()
    changed = [not torch.equal(weight, bare[name]) for name, weight in model.state_dict().items() if "layer.0" in name]
    assert all(changed)


def test_a_teacher_is_fine_tuned_once(encoder, federation, monkeypatch):
    config, data, cache = federation
    first = prepare_teacher(config, find_teacher(str(encoder)), data, cache, Silent())
    monkeypatch.setattr(module, "fine_tune", lambda *arguments: pytest.fail("trained again"))
    assert prepare_teacher(config, find_teacher(str(encoder)), data, cache, Silent()) == first


def test_fine_tuning_is_repeatable_and_follows_the_seed(encoder, federation):
    config, data, _ = federation

    def tuned(config):
        return hash_tensors(fine_tune(config, encoder, data, data.public, Silent()).state_dict())

    assert tuned(config) == tuned(config)
    assert tuned(config) != tuned(config.model_copy(update={"seed": 1}))


def test_a_teacher_with_a_head_is_used_as_it_is(tiny_teacher, federation, tmp_path):
    config, data, _ = federation
    found = prepare_teacher(config, find_teacher(str(tiny_teacher)), data, tmp_path, Silent())
    assert (found.folder, found.fine_tuned_on) == (tiny_teacher, 0)
    assert list(tmp_path.iterdir()) == []


def test_public_examples_without_labels_cannot_fine_tune(encoder, federation):
    data = federation[1]
    fields = {name: getattr(data, name) for name in FederatedDataset.__dataclass_fields__}
    blank = type(data.train)(data.train.tokens, np.full(len(data.train), -1), data.train.keys)
    labelled = labelled_rows(FederatedDataset(**fields | {"train": blank}), data.public)
    with pytest.raises(InputError, match="no public example with a label is left"):
        check_head(find_teacher(str(encoder)), data.task, len(labelled))


def test_a_multi_label_teacher_says_so_and_fits_no_other_task(encoder, tmp_path):
    path = tmp_path / "many.csv"
    rows = [(text, "|".join(["short", "long", "good"][: number % 4])) for number, text in enumerate(make_sentences(60))]
    path.write_text("text,label\n" + "".join(f"{text},{label or '|'}\n" for text, label in rows))
    keys = {"data__multi_label": True, "data__windows": 2, "data__max_length": 8, "teacher__epochs": 1}
    config, data = make_dataset(path, encoder, tmp_path / "cache", data__public_fraction=0.5, **keys)
    found = prepare_teacher(config, find_teacher(str(encoder)), data, tmp_path / "cache", Silent())
    model = AutoModelForSequenceClassification.from_pretrained(found.folder)
    assert model.config.id2label == {0: "good", 1: "long", 2: "short"}
    assert model.config.problem_type == "multi_label_classification"
    told = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(found.folder))
    logits = model(**told.tokenizer("good film", return_tensors="pt")).logits[0]
    scores = {one["label"]: one["score"] for one in told("good film", top_k=None)}
    assert scores == pytest.approx({model.config.id2label[k]: torch.sigmoid(x).item() for k, x in enumerate(logits)})

    own, task = find_teacher(str(found.folder)), data.task
    check_head(own, task, 0)
    with pytest.raises(InputError, match=r"data.multi-label = true: .* is not multi_label_classification"):
        check_head(source(head=3), task, 0)
    with pytest.raises(InputError, match=r"data.multi-label = false: .* is multi_label_classification"):
        check_head(own, replace(task, multi_label=False), 0)
