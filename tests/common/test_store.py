"""Files and folders are whole or absent, whatever interrupts their making."""

import multiprocessing
import time
from pathlib import Path

import pytest

from common.store import build_folder, cache_folder, draft_of, write_atomically


def build(target: Path, log: Path) -> None:
    with build_folder(target) as draft:
        if draft is not None:
            time.sleep(0.2)
            (draft / "content").write_text("whole")
            with log.open("a") as stream:
                stream.write("built\n")


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_processes_that_want_the_same_folder_build_it_once(tmp_path):
    target, log = tmp_path / "a" / "folder", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=build, args=(target, log)) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0] * 4
    assert log.read_text() == "built\n"
    assert left(target.parent) == ["folder"]
    assert (target / "content").read_text() == "whole"


def test_a_builder_that_fails_leaves_nothing_and_another_may_try(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt), build_folder(target) as draft:
        (draft / "content").write_text("half")
        raise KeyboardInterrupt
    assert left(tmp_path) == []
    build(target, tmp_path / "log")
    assert (target / "content").read_text() == "whole"


def test_a_folder_has_its_name_only_when_it_is_finished(tmp_path):
    target = tmp_path / "folder"
    with build_folder(target) as draft:
        assert not target.exists()
        assert draft.parent == tmp_path
    with build_folder(target) as draft:
        assert draft is None


def test_a_file_keeps_its_old_content_when_writing_fails(tmp_path):
    path = tmp_path / "a" / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is no bytes")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert left(path.parent) == ["file"]


def test_a_key_goes_before_the_variable_before_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDISTILL_CACHE", str(tmp_path / "variable"))
    assert cache_folder(str(tmp_path / "key")) == tmp_path / "key"
    assert cache_folder("~/mine") == tmp_path / "mine"
    assert cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("FEDISTILL_CACHE")
    assert cache_folder() == tmp_path / ".cache" / "fedistill"
    assert (tmp_path / "key").is_dir()


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".folder.abc123").mkdir()
    with build_folder(tmp_path / "folder") as draft:
        assert draft is not None
    assert left(tmp_path) == ["folder"]


def test_a_draft_takes_its_name_when_it_is_finished_and_vanishes_on_an_error(tmp_path):
    target = tmp_path / "a" / "folder"
    with pytest.raises(OSError, match="full"), draft_of(target) as draft:
        (draft / "half").write_text("")
        assert not target.exists()
        raise OSError("full")
    assert list(target.parent.iterdir()) == []
    with draft_of(target) as draft:
        (draft / "content").write_text("whole")
    assert left(target.parent) == ["folder"]
    assert (target / "content").read_text() == "whole"
