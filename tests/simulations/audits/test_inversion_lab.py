import pytest

from common.config import from_flat
from common.errors import InputError
from common.progress import Silent
from simulations.audits.inversion import Bench, Inversion
from simulations.audits.inversion_table import MEASURES
from simulations.audits.victim import Setting
from simulations.laboratory import Laboratory
from tests.conftest import make_reviews, make_sentences

TINY = {
    "task": "text", "data.clients": 3, "data.max-length": 32, "data.alpha": 10.0, "rounds": 1, "teacher.epochs": 1,
    "student.layers": 2, "server.packing": "off", "client.precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return make_reviews(tmp_path_factory.mktemp("reviews") / "reviews.csv")


def laboratory(reviews, teacher, **keys):
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    given = {**TINY, "data.source": str(reviews), "teacher.model": str(teacher), **flat}
    return Laboratory(from_flat(given), Silent())


@pytest.fixture(scope="module")
def grid(reviews, tiny_teacher):
    lab = laboratory(reviews, tiny_teacher, student__train_embeddings=True)
    return [dict(row) for row in Inversion(grid=True, victims=2, steps=2).run(lab, Silent())]


def test_trained_embeddings_give_all_pieces_and_frozen_ones_what_a_guess_gives(grid):
    found = {row["setting"]: row for row in grid if row["method"] == "rows" and "anybody" not in row["variant"]}
    for setting in ("as configured", "one SGD step", "adamw", "8 steps", "16 examples, 8 steps, adamw", "clip 0.1"):
        assert found[setting]["success"] == found[setting]["set_precision"] == 1.0
    for setting in ("frozen embeddings", "adamw, frozen embeddings", "clip 0.1, frozen embeddings, noise 1"):
        row = next(row for name, row in found.items() if sorted(name.split(", ")) == sorted(setting.split(", ")))
        assert row["success"] == row["chance"] and row["nothing"] == 1.0
    assert found["sum of 4"]["success"] == 1.0 > found["sum of 4"]["set_precision"]


def test_every_way_has_rows_and_no_text_is_told(grid):
    assert {row["method"] for row in grid} == set(MEASURES)
    assert not any("private" in row or "recovered" in row for row in grid)
    assert len({row["variant"] for row in grid}) == len(grid)


def test_frozen_as_configured(reviews, tiny_teacher):
    rows = [*Inversion().run(laboratory(reviews, tiny_teacher), Silent())]
    assert [row["variant"] for row in rows] == ["rows: server", "rows: anybody"]
    assert all(row["success"] == row["chance"] for row in rows)


def test_methods_that_are_not_there_are_refused_by_name():
    with pytest.raises(InputError, match="no 'dager'; give all, or some of rows"):
        next(Inversion(methods="rows,dager").run(None, Silent()))


def test_noise_at_the_server_hides_pieces_from_everybody_but_the_server(reviews, tiny_teacher):
    keys = {"privacy__unit": "client", "privacy__noise_multiplier": 1.0, "privacy__clip_norm": 0.5}
    lab = laboratory(reviews, tiny_teacher, student__train_embeddings=True, **keys)
    server, anybody = Inversion().run(lab, Silent())
    assert server["success"] == server["set_precision"] == 1.0
    assert anybody["success"] < 0.2


def test_of_a_part_of_the_shard_the_truth_is_that_part(reviews, tiny_teacher):
    lab = laboratory(reviews, tiny_teacher, student__train_embeddings=True, client__share=0.3)
    server, _ = Inversion().run(lab, Silent())
    assert server["success"] == server["set_precision"] == 1.0


def test_without_a_label_there_is_nothing_to_count(tmp_path, tiny_teacher):
    source = make_reviews(tmp_path / "reviews.csv")
    lines = source.read_text().splitlines()
    lines[60:] = [line.replace(",1,", ",,").replace(",0,", ",,") for line in lines[60:]]
    source.write_text("\n".join(lines))
    lab = laboratory(source, tiny_teacher, distill__hard_weight=0.0, distill__soft_weight=1.0)
    bench = Bench(Inversion(), lab)
    assert (lab.data.train.labels[bench.asked] >= 0).all() and len(bench.asked) < len(bench.public)
    whole, single = Setting(examples=1000), Setting()
    for client in (0, 1, 2):
        assert bench.attack("labels", whole, client) == {"right": None, "guess_right": None}
    known = [c for c in (0, 1, 2) if lab.data.train.labels[bench.victims.rows(c, 1)][0] >= 0]
    assert all(bench.attack("labels", single, client)["right"] is not None for client in known)


def test_a_text_of_several_windows_is_as_long_as_the_longest(reviews, tiny_teacher):
    keys = {"student__train_embeddings": True, "data__max_length": 8, "data__windows": 3, "data__stride": 2}
    bench = Bench(Inversion(), laboratory(reviews, tiny_teacher, **keys))
    assert bench.longest == 8 < bench.victims.tokens.lengths(bench.public).max()
    for client in (0, 1, 2):
        assert bench.attack("longest", Setting(examples=4), client)["right"] == 1.0


def test_without_public_text_there_is_no_guess(reviews, tiny_teacher):
    lab = laboratory(reviews, tiny_teacher, data__public_fraction=0.0)
    with pytest.raises(InputError, match=r"data\.public-fraction: inversion is held against guesses"):
        next(Inversion().run(lab, Silent()))


def test_of_pairs_the_span_is_tried_and_no_gradient_is_matched(tmp_path, tiny_teacher):
    source, texts = tmp_path / "pairs.csv", zip(make_sentences(90), make_sentences(90, seed=1), strict=True)
    lines = [f"{one},{other},{number % 2}" for number, (one, other) in enumerate(texts)]
    source.write_text("\n".join(["first,second,label", *lines]))
    lab = laboratory(source, tiny_teacher, data__text_columns="first,second")
    assert Bench(Inversion(), lab).types == 2
    rows = {row["method"]: row for row in Inversion(grid=True, methods="tag,span", victims=1).run(lab, Silent())}
    assert rows["tag"]["success"] is None and rows["tag"]["note"] == "it looks for texts of one part and one window"
    assert rows["span"]["success"] is not None
