"""The ceiling sees all train text, and none that it is scored on."""

import numpy as np
import pytest

from common.config import changed, from_flat
from common.errors import InputError
from common.progress import Silent
from server import teacher as module
from server.ceiling import prepare_ceiling, train_rows
from tests.conftest import make_dataset, make_reviews, make_teacher


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("encoder"), labels=0, layers=1)


@pytest.fixture
def config(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDISTILL_CACHE", str(tmp_path / "cache"))
    source = make_reviews(tmp_path / "a.csv", 150)
    return from_flat(
        {
            "task": "text", "data.source": str(source), "data.clients": 3, "data.max-length": 64, "data.alpha": 10.0,
            "teacher.model": str(encoder), "teacher.epochs": 1, "teacher.lr": 0.01, "client.precision": "fp32",
        }
    )  # fmt: skip


def test_it_learns_from_private_and_held_out_text_but_not_from_what_is_scored(config, encoder, tmp_path):
    _, data = make_dataset(tmp_path / "a.csv", encoder, tmp_path / "cache")
    private = np.concatenate([np.concatenate([shard.train, shard.heldout]) for shard in data.shards])
    rows = train_rows(config, data)
    assert set(rows) == {*private.tolist(), *data.public.tolist()}
    assert len(rows) == 150 - len(data.validation["validation"])


def test_with_a_validation_file_of_its_own_all_rows_are_learnt(config, encoder, tmp_path):
    other = make_reviews(tmp_path / "b.csv", 40, seed=1)
    config, data = make_dataset(tmp_path / "a.csv", encoder, tmp_path / "cache", data__validation=str(other))
    assert len(train_rows(config, data)) == 150


def test_it_is_trained_once_and_follows_the_teachers_keys_alone(config, monkeypatch):
    first = prepare_ceiling(config, Silent())
    assert first.model.fine_tuned_on == 144
    assert set(first.validation) == {"accuracy", "f1_macro", "matthews", "n"}
    tune, again = module.fine_tune, []
    monkeypatch.setattr(module, "fine_tune", lambda *given: again.append(given) or tune(*given))
    other = config.model_copy(update={"rounds": 9, "student": config.student.model_copy(update={"layers": 1})})
    assert prepare_ceiling(other, Silent()).model == first.model
    assert again == []
    prepare_ceiling(config.model_copy(update={"seed": 1}), Silent())
    assert len(again) == 1


def test_without_the_private_text_there_is_no_ceiling(config):
    at_clients = changed(config, {"data.private": "at-clients", "data.partition": "natural"})
    with pytest.raises(InputError, match="the private texts are with the clients; there is no ceiling"):
        prepare_ceiling(at_clients, Silent())


def test_a_head_of_another_task_is_refused(config, tmp_path):
    headed = make_teacher(tmp_path / "headed", labels=3, layers=1)
    keys = config.teacher.model_copy(update={"model": str(headed)})
    with pytest.raises(InputError, match="its head has 3 labels"):
        prepare_ceiling(config.model_copy(update={"teacher": keys}), Silent())
