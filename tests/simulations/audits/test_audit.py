"""An audit from its file to its table, with tiny random models; what is refused before anything is trained."""

import json
import multiprocessing
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from common.errors import InputError, Interrupted, RunFailed
from simulations.audits.audit import audit, parquet
from simulations.audits.audit_file import read_audit
from simulations.audits.lira import Lira
from tests.conftest import make_reviews

ATTACKS = ["utility", "teacher", "loss", "lira", "rmia", "fedmia", "votes"]

pytestmark = pytest.mark.integration  # it trains many tiny models


KEYS = """
seeds = [0]
task = "text"
rounds = 1
data.clients = 3
data.max-length = 64
data.alpha = 10.0
student.layers = 2
client.lr = 0.02
client.epochs = 1
runtime.workers = 1
[arms.distilled]
[arms.plain]
distill.soft-weight = 0.0
distill.hard-weight = 1.0
"""
OPTIONS = """
[attack.lira]
models = 3
[attack.rmia]
models = 3
gamma = 1.05
[attack.loss]
models = 3
[attack.fedmia]
models = 1
[attack.votes]
epochs = 1
"""


@pytest.fixture(scope="module")
def write(tiny_teacher, tmp_path_factory):
    """Writes an audit of two arms to a file: some attacks with their options."""
    folder = tmp_path_factory.mktemp("audit")
    make_reviews(folder / "reviews.csv", count=120)
    place = f'data.source = "{folder / "reviews.csv"}"\nteacher.model = "{tiny_teacher}"\n'

    def writer(name, attacks, options):
        (folder / name).write_text(f"attacks = {attacks}\n{place}{KEYS}{options}")
        return folder / name

    return writer


@pytest.fixture(scope="module")
def file(write):
    return write("audit.toml", ATTACKS, OPTIONS)


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "audit"
    return out, audit(read_audit(file), out)


def test_every_attack_leaves_rows_in_every_arm(done):
    out, rows = done
    table = pq.read_table(out / "rows.parquet").to_pylist()
    assert [(row["arm"], row["attack"]) for row in table] == [(row["arm"], row["attack"]) for row in rows]
    for arm in ("distilled", "plain"):
        assert list(dict.fromkeys(row["attack"] for row in table if row["arm"] == arm)) == ATTACKS
    assert {(row["arm"], row["distill.hard-weight"]) for row in table} == {("distilled", 0.3), ("plain", 1.0)}
    for row in table:
        assert 0 <= row["success"] <= 1, row
        assert row["low"] is None or row["low"] <= row["success"] <= row["high"]
    assert "| lira online |" in (out / "audit.md").read_text()
    assert all(
        (out / name).stat().st_size > 5000 for name in ("audit.png", "audit.svg", "roc.png", "roc.svg", "report.html")
    )


def test_attacks_that_ask_for_the_same_models_share_them(done):
    out, _ = done
    folder = out / "plain" / "text" / "seed-0" / "halves-all"
    assert sorted(path.name for path in folder.iterdir()) == [f"model-{number}.npz" for number in range(3)]


def test_what_is_done_is_not_done_again(done, file, monkeypatch):
    out, rows = done
    monkeypatch.setattr("simulations.audits.runs.Laboratory", None)
    assert audit(read_audit(file), out) == rows


def test_runs_side_by_side_find_what_they_find_one_after_the_other(done, file, tmp_path, capsys):
    rows = audit(read_audit(file, ["runtime.workers=2"]), tmp_path / "two")
    assert rows == done[1]
    assert "models on halves" not in capsys.readouterr().out  # steps of several runs at once would be a muddle
    assert not multiprocessing.active_children()


def test_what_is_wrong_in_one_of_several_processes_is_said_with_the_runs_name(write, tmp_path):
    plan = read_audit(write("wrong.toml", ["poisoning"], "[attack.poisoning]\ntarget = 7\n"), ["runtime.workers=2"])
    with pytest.raises(InputError, match=r"^(distilled|plain) text seed 0: poisoning.target = 7: classes are 0 to 1"):
        audit(plan, tmp_path / "out")
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_ends_the_audit_and_what_is_done_is_kept(write, tmp_path):
    out = tmp_path / "out"

    def kill():
        while not list(out.glob("*/text/seed-0/teacher.json")):
            time.sleep(0.02)
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    attacks = ["teacher", "lira"]
    plan = read_audit(write("killed.toml", attacks, "[attack.lira]\nmodels = 3\n"), ["runtime.workers=2"])
    with pytest.raises(RunFailed, match="a process that trains models ended"):
        audit(plan, out)
    killer.join()
    assert not multiprocessing.active_children()
    rows = audit(plan, out)
    assert {(row["arm"], row["attack"]) for row in rows} == {
        (a, b) for a in ("distilled", "plain") for b in ("teacher", "lira")
    }


def test_a_fault_in_a_plot_takes_nothing_away(done, file, monkeypatch, capsys):
    def broken(plan, rows, out):
        raise ValueError("a label of somebody's")

    out, rows = done
    monkeypatch.setattr("simulations.audits.audit.plot", broken)
    assert audit(read_audit(file), out) == rows
    said = capsys.readouterr().out
    assert "no plots: ValueError" in said and "somebody" not in said


def test_after_a_stop_only_what_is_missing_is_trained(done, file, monkeypatch, capsys):
    out, rows = done
    folder = out / "plain" / "text" / "seed-0"
    before = np.load(folder / "halves-all" / "model-2.npz")["logits"]
    for name in ("lira.json", "halves-all/model-2.npz"):
        (folder / name).unlink()

    def stopped(self, lab, progress):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Lira, "run", stopped)
        with pytest.raises(Interrupted):
            audit(read_audit(file), out)
    kept = (folder / "halves-all" / "model-1.npz").stat().st_mtime_ns
    again = audit(read_audit(file), out)
    assert (folder / "halves-all" / "model-1.npz").stat().st_mtime_ns == kept
    np.testing.assert_array_equal(np.load(folder / "halves-all" / "model-2.npz")["logits"], before)
    assert again == rows
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 200


def test_other_keys_or_options_are_not_mixed_in(done, file):
    out, _ = done
    with pytest.raises(InputError, match=r"client\.epochs = 4 \(was 1\)"):
        audit(read_audit(file, ["client.epochs=4"]), out)
    with pytest.raises(InputError, match=r"rmia\.json: with other options .*gamma = 1\.05"):
        audit(read_audit(file, options=["rmia.gamma=2"]), out)


def test_a_run_and_a_plain_file_are_audits_of_one_arm(done):
    run = done[0] / "plain" / "text" / "seed-0"
    plan = read_audit(run, attacks="lira,rmia", options=["lira.models=3"], seeds=2)
    assert [(each.arm, each.seed) for each in plan.plan.runs] == [("run", 0), ("run", 1)]
    assert list(plan.attacks) == ["lira", "rmia"]
    assert plan.attacks["lira"] == Lira(models=3)
    assert plan.plan.runs[0].config.flat() == json.loads(json.dumps(plan.plan.runs[0].config.flat()))
    assert plan.plan.runs[0].config.server.packing == "off"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"attacks": "lyra"}, "attack 'lyra': no such attack; give some of utility"),
        ({"options": ["lira.model=3"]}, r"lira\.model: no such option; lira has models, examples"),
        ({"options": ["lira.models=many"]}, r"lira\.models = 'many': give int, as the default 16"),
        ({"options": ["lira.models=true"]}, r"lira\.models = True: give int"),
        ({"options": ["models=3"]}, "-o models: give ATTACK.OPTION=VALUE"),
        ({"attacks": "utility", "options": ["lira.models=3"]}, r"attack\.lira: options of an attack that is not among"),
        ({"settings": ["client.lr=fast"]}, "client.lr"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path, given, told):
    (tmp_path / "a.toml").write_text("rounds = 1\n")
    with pytest.raises(InputError, match=told):
        read_audit(tmp_path / "a.toml", **given)
    with pytest.raises(InputError, match="not a run's folder"):
        read_audit(tmp_path)
    (tmp_path / "b.toml").write_text('tasks = ["sst2", "mrpc"]\n')
    with pytest.raises(InputError, match=r"tasks = \['sst2', 'mrpc'\]: an audit is of one task"):
        read_audit(tmp_path / "b.toml")


def test_a_column_holds_numbers_of_both_kinds_and_gaps(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([{"a": 1, "b": "x"}, {"a": 0.5}, {"a": None, "c": True}]))
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == [
        {"a": 1.0, "b": "x", "c": None}, {"a": 0.5, "b": None, "c": None}, {"a": None, "b": None, "c": True},
    ]  # fmt: skip
