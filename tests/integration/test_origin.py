"""A student cut from a narrower model than its teacher, through the command line, with a projection between them."""

from transformers import AutoModelForSequenceClassification

from tests.conftest import make_reviews, make_teacher
from tests.integration.conftest import read_lines, read_summary


def test_a_narrower_model_learns_with_a_projection_with_the_same_bits_for_any_workers(fedistill, tmp_path):
    teacher = make_teacher(tmp_path / "teacher", labels=0, width=32)
    small = make_teacher(tmp_path / "small", labels=0, layers=3, seed=1)
    reviews = make_reviews(tmp_path / "reviews.csv", 900)
    keys = (
        "-s", "task=text", "-s", f"data.source={reviews}", "-s", f"teacher.model={teacher}",
        "-s", f"student.model={small}", "-s", "teacher.lr=0.005", "-s", "teacher.epochs=15",
        "-s", "teacher.token-budget=256", "-s", "data.public-fraction=0.4", "-s", "data.clients=4",
        "-s", "data.max-length=32", "-s", "student.layers=2", "-s", "distill.hidden-weight=1.0",
        "-s", "distill.hidden-loss=mse", "-s", "rounds=4", "-s", "client.epochs=6", "-s", "client.lr=0.01",
        "-s", "client.token-budget=256",
    )  # fmt: skip
    for name, workers in (("two", 2), ("one", 1)):
        done = fedistill("simulate", *keys, "-s", f"runtime.workers={workers}", "--out", name)
        assert done.returncode == 0, done.stderr
    two, one = (read_summary(tmp_path / name) for name in ("two", "one"))
    assert one["student_sha256"] == two["student_sha256"]
    lines = read_lines(tmp_path / "two")
    train = [line for line in lines if line["phase"] == "train"]
    assert train[-1]["hidden_loss"] < 0.8 * train[0]["hidden_loss"]
    validation = [line["student"]["matthews"] for line in lines if line["phase"] == "validation"]
    assert validation[-1] > validation[0] + 0.2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two" / "student")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 2)
    assert not any("projection" in name for name in model.state_dict())
