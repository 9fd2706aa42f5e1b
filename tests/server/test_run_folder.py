"""A run's folder is its own, its JSON is JSON, and a run continues in it from where its checkpoint stands."""

import json
import multiprocessing
import os
import re
import signal

import numpy as np
import pytest

from common.config import Config, from_flat, load_config
from common.errors import InputError, Interrupted, RunFailed
from server.checkpoint import Checkpoint, checkpoints, load_latest, save_checkpoint
from server.run import told_in
from server.run_folder import JOURNALS, RunFolder, check_resumed, finite

PROCESSES = multiprocessing.get_context("fork")


def test_a_new_folder_holds_every_key_resolved(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run", Config())
    assert load_config(folder.path / "config.toml") == Config()
    assert folder.path.is_absolute()


@pytest.mark.parametrize("content", ["a.txt", "config.toml"])
def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / content).write_text("mine")
    with pytest.raises(InputError, match=f"{tmp_path}: not an empty folder"):
        RunFolder(tmp_path, Config())
    assert (tmp_path / content).read_text() == "mine"
    with pytest.raises(InputError, match="not an empty folder"):
        RunFolder(tmp_path / content, Config())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "run", Config())


def test_a_run_that_never_started_gives_its_folder_back(tmp_path):
    folder = RunFolder(tmp_path / "run", Config())
    folder.release()
    assert not (tmp_path / "run").exists()
    folder = RunFolder(tmp_path / "run", Config())
    (folder.path / "notes").write_text("")
    folder.release()
    assert [path.name for path in folder.path.iterdir()] == ["notes"]


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_json_has_no_word_for_becomes_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    assert finite({"a": nan, "b": [inf, 1.5, (-inf, "x")], "c": {"d": nan, "e": None}}) == {
        "a": None,
        "b": [None, 1.5, [None, "x"]],
        "c": {"d": None, "e": None},
    }
    folder = RunFolder(tmp_path / "run", Config())
    folder.save_summary({"score": nan, "ü": 1})
    assert strict((folder.path / "summary.json").read_text()) == {"score": None, "ü": 1}
    folder.add_line({"round": 1, "loss": nan})
    folder.add_line({"round": 2, "loss": 0.5})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [{"round": 1, "loss": None}, {"round": 2, "loss": 0.5}]


def test_a_runs_last_checkpoints_are_kept_in_its_folder_and_hold_the_weights(tmp_path):
    folder = RunFolder(tmp_path / "run", Config())
    for number in (1, 2, 9, 10, 99_999, 100_000):
        weights = {"w": np.full((2, 3), number, dtype=np.float32)}
        save_checkpoint(folder.checkpoints, Checkpoint(number, weights, {}, {}), keep=2)
    assert folder.checkpoints == folder.path / "checkpoints"
    assert [path.name for path in checkpoints(folder.checkpoints)] == ["round-99999", "round-100000"]
    loaded = load_latest(folder.checkpoints, {"w": (2, 3)}, pytest.fail)
    assert loaded.weights["w"].tolist() == [[100_000.0] * 3] * 2


# --- continuing a run ---------------------------------------------------------------------------


def begun(path, lines=3, config=None):
    """The folder of a run that was killed: its process holds it no longer."""
    folder = RunFolder(path, config or Config())
    for number in range(1, lines + 1):
        folder.add_line({"round": number})
        folder.add_costs({"round": number, "seconds": 0.5})
    folder.close()
    return folder


def content(path):
    """Every file and its bytes, but for the lock, which holds nothing."""
    return {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_run_goes_on_in_its_folder(tmp_path):
    begun(tmp_path / "run")
    folder = RunFolder(tmp_path / "run", Config(), resume=True)
    assert folder.resumed
    folder.add_line({"round": 4})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]


def test_resuming_nothing_begins_a_run(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        folder = RunFolder(path, Config(), resume=True)
        assert not folder.resumed
        assert load_config(path / "config.toml") == Config()


def test_a_folder_that_holds_no_run_is_not_resumed(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match=f"{tmp_path}: not a run's folder"):
        RunFolder(tmp_path, Config(), resume=True)
    assert content(tmp_path) == {"notes": b"mine"}


def test_a_run_is_not_overwritten_without_resume(tmp_path):
    begun(tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(InputError, match="not an empty folder; --resume to continue the run in it, give another --out"):
        RunFolder(tmp_path / "run", Config())
    assert content(tmp_path / "run") == before


def take(path, told):
    try:
        RunFolder(path, Config(), resume=True)
        told.put("")
    except InputError as error:
        told.put(str(error))


def taken_by_another(path):
    """What a second process that would continue the run is told; empty when it may."""
    told = PROCESSES.SimpleQueue()
    second = PROCESSES.Process(target=take, args=(path, told))
    second.start()
    second.join(60)
    return told.get()


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_while_a_process_works_in_a_folder_no_other_can(tmp_path, resumed):
    path = tmp_path / "run"
    if resumed:
        begun(path)
    folder = RunFolder(path, Config(), resume=resumed)
    before = content(path)
    assert taken_by_another(path) == (f"{path}: another process works in it; wait for its end, or give another --out")
    with pytest.raises(InputError, match="another process works in it"):
        RunFolder(path, from_flat({"rounds": 9}), resume=True)
    assert content(path) == before
    folder.close()
    assert taken_by_another(path) == ""


def hold_until_killed(path, ready):
    folder = RunFolder(path, Config())
    folder.add_line({"round": 1})
    ready.put("")
    signal.pause()


def test_a_process_that_is_killed_gives_its_folder_free(tmp_path):
    ready = PROCESSES.SimpleQueue()
    first = PROCESSES.Process(target=hold_until_killed, args=(tmp_path / "run", ready))
    first.start()
    ready.get()
    assert "another process" in taken_by_another(tmp_path / "run")
    os.kill(first.pid, signal.SIGKILL)
    first.join(60)
    assert RunFolder(tmp_path / "run", Config(), resume=True).resumed


def test_the_summary_of_the_interrupted_run_is_gone_while_it_goes_on(tmp_path):
    begun(tmp_path / "run").save_summary({"status": "interrupted"})
    RunFolder(tmp_path / "run", Config(), resume=True)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_cannot_be_continued_leaves_its_folder_as_it_was(tmp_path):
    folder = begun(tmp_path / "run")
    folder.save_summary({"status": "interrupted"})
    before = content(folder.path)
    again = RunFolder(tmp_path / "run", from_flat({"rounds": 9}), resume=True)
    with pytest.raises(InputError, match="the teacher"), told_in(again, Config()):
        raise InputError("the teacher of this run changed since it began")
    assert content(folder.path) == before
    assert RunFolder(tmp_path / "run", Config(), resume=True).resumed


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_that_is_stopped_while_it_is_taken_up_again_is_what_it_was(tmp_path, ended):
    folder = begun(tmp_path / "run")
    if ended:
        folder.save_summary({"status": "completed", "rounds": 5})
    save_checkpoint(folder.checkpoints, Checkpoint(5, {"w": np.zeros(2, np.float32)}, {}, {}), keep=2)
    before = content(folder.path)
    again = RunFolder(tmp_path / "run", from_flat({"rounds": 9}), resume=True)
    with pytest.raises(KeyboardInterrupt), told_in(again, Config()):
        raise KeyboardInterrupt
    after = content(folder.path)
    assert after.pop("report.html", b"")
    assert after == before


@pytest.mark.parametrize(
    ("error", "status"),
    [(RunFailed("x"), "failed"), (ValueError("x"), "failed"), (Interrupted(), "interrupted"),
     (KeyboardInterrupt(), "interrupted")],
    ids=str,
)  # fmt: skip
def test_however_a_run_ends_before_its_first_round_its_folder_says_so_and_is_free(tmp_path, error, status):
    folder = RunFolder(tmp_path / "run", Config())
    with pytest.raises(type(error)), told_in(folder, Config()):
        raise error
    assert json.loads((folder.path / "summary.json").read_text())["status"] == status
    assert "Nothing was scored yet" in (folder.path / "report.html").read_text()
    assert taken_by_another(folder.path) == ""


def test_a_page_that_cannot_be_drawn_changes_nothing_about_the_end(tmp_path, monkeypatch):
    def broken(run):
        raise ValueError("what a page may not tell")

    monkeypatch.setattr("server.run.write_report", broken)
    folder, told = RunFolder(tmp_path / "run", Config()), []
    folder.trackers.tell = told.append
    with pytest.raises(Interrupted), told_in(folder, Config()):
        raise Interrupted
    assert re.fullmatch(r"no report.html: ValueError at test_run_folder.py:\d+; fedistill report RUN tries .*", told[0])
    assert json.loads((folder.path / "summary.json").read_text())["status"] == "interrupted"


def test_a_summary_that_is_there_already_is_not_written_over(tmp_path):
    folder = RunFolder(tmp_path / "run", Config())
    with pytest.raises(RunFailed), told_in(folder, Config()):
        folder.save_summary({"status": "failed", "rounds": 3})
        raise RunFailed("x")
    assert json.loads((folder.path / "summary.json").read_text())["rounds"] == 3


# --- the configuration of a run that goes on ----------------------------------------------------


BEFORE = {"task": "sst2", "rounds": 5, "data.clients": 7, "client.lr": 0.01}


def test_the_same_keys_and_more_rounds_go_on(tmp_path):
    before = from_flat(BEFORE)
    check_resumed(before, from_flat(BEFORE), tmp_path)
    check_resumed(before, from_flat(BEFORE | {"rounds": 6}), tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rounds": 4}, "rounds = 4 (was 5)"),
        ({"seed": 1}, "seed = 1 (was 0)"),
        ({"client.lr": 0.02}, "client.lr = 0.02 (was 0.01)"),
        ({"server.strategy": "fedprox"}, "server.strategy = 'fedprox' (was 'fedavg')"),
        ({"rounds": 9, "data.clients": 8}, "data.clients = 8 (was 7)"),
        ({"runtime.threads": 2}, "runtime.threads = 2 (was 1)"),
    ],
    ids=str,
)
def test_changed_keys_are_named_with_both_values(tmp_path, changed, told):
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        check_resumed(from_flat(BEFORE), from_flat(BEFORE | changed), tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: --resume with another configuration: ")
    assert str(caught.value).endswith("; only rounds may grow")
    assert str(caught.value).count("(was ") == 1


def test_all_changed_keys_are_named(tmp_path):
    with pytest.raises(InputError) as caught:
        check_resumed(from_flat(BEFORE), from_flat(BEFORE | {"seed": 2, "rounds": 1, "data.alpha": 0.5}), tmp_path)
    for told in ("seed = 2 (was 0)", "rounds = 1 (was 5)", "data.alpha = 0.5 (was 1.0)"):
        assert told in str(caught.value)


# --- journals -----------------------------------------------------------------------------------


def test_journals_are_cut_back_to_where_a_checkpoint_stands(tmp_path):
    folder = RunFolder(tmp_path / "run", Config())
    assert folder.lengths() == dict.fromkeys(JOURNALS, 0)
    folder.add_line({"round": 1})
    folder.add_costs({"round": 1})
    lengths = folder.lengths()
    before = content(folder.path)
    assert lengths == {name: len(before[name]) for name in JOURNALS}
    for number in (2, 3):
        folder.add_line({"round": number, "more": "x" * 1000})
        folder.add_costs({"round": number})
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 4, "los')  # killed while it wrote
    folder.cut_back(lengths)
    assert content(folder.path) == before
    assert folder.lengths() == lengths


def test_a_run_that_begins_anew_has_empty_journals(tmp_path):
    folder = begun(tmp_path / "run")
    (folder.path / "costs.jsonl").unlink()
    folder.cut_back({})
    assert {name: content(folder.path)[name] for name in JOURNALS} == dict.fromkeys(JOURNALS, b"")


@pytest.mark.parametrize("short", JOURNALS)
def test_a_journal_shorter_than_at_the_checkpoint_is_refused_and_nothing_is_cut(tmp_path, short):
    folder = begun(tmp_path / "run", lines=2)
    lengths = folder.lengths()
    folder.add_line({"round": 3})
    folder.add_costs({"round": 3})
    path = folder.path / short
    path.write_bytes(path.read_bytes()[: lengths[short] - 1])
    before = content(folder.path)
    have = lengths[short] - 1
    with pytest.raises(
        InputError, match=f"{path}: {have} bytes; at its last checkpoint the run had written {have + 1}"
    ):
        folder.cut_back(lengths)
    assert content(folder.path) == before
    path.unlink()
    with pytest.raises(InputError, match=f"{path}: 0 bytes"):
        folder.cut_back(lengths)
