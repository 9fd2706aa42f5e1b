"""What the command line says to bad input: one line on standard error, exit code 2, nothing left behind."""

from pathlib import Path

import pytest

from simulations import cli
from tests.conftest import make_reviews, make_teacher


@pytest.fixture
def call(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()  # what making the models printed
        with pytest.raises(SystemExit) as left:
            cli.main(["simulate", *arguments])
        return left.value.code, capfd.readouterr().err.strip()

    return run


TINY = ["teacher.model=tiny", "student.layers=2", "data.max-length=32"]
BAD = {
    "a sweep's key": (["seeds=3"], "seeds: it lists several runs; give the file to `fedistill sweep` or"),
    "unknown key": (["rounbs=3"], "rounbs: no such key; did you mean rounds?"),
    "mistyped": (["rounds=many"], "rounds = 'many'"),
    "fraction": (["data.public-fraction=1.5"], "data.public-fraction = 1.5"),
    "cohort": (["data.clients=4", "server.cohort=5"], "server.cohort = 5: there are data.clients = 4"),
    "task": (["task=sst3"], "task = 'sst3'"),
    "layers": (["teacher.model=tiny", "student.layers=9"], "student.layers = 9: the teacher has 4 layers"),
    "no such layer": (["teacher.model=tiny", "student.layers=1", "student.layer-selection=7"], "from 0 to 3"),
    "no source": (["task=sst2", "data.source=nowhere", *TINY], "data.source = 'nowhere': no such folder"),
    "column": (["task=text", "data.source=a.csv", "data.text-columns=body", *TINY], "no column 'body'"),
    "clients": (["task=text", "data.source=a.csv", "data.clients=5000", *TINY], "data.clients = 5000: only"),
    "no weights": (["teacher.model=empty"], "no config.json"),
    "pickled weights": (["teacher.model=pickled"], "only pickled weights (pytorch_model.bin)"),
    "hub": (["task=rte", *TINY], "data.source: the hub's dataset"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(call, tmp_path, name):
    make_teacher(tmp_path / "tiny")
    make_teacher(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    make_reviews(tmp_path / "a.csv", 60)
    settings, expected = BAD[name]
    code, error = call(*(part for setting in settings for part in ("-s", setting)), "--out", "run")
    assert code == 2, error
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_left_alone(call, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    code, error = call("--out", "run")
    assert (code, error) == (2, "fedistill: run: not an empty folder; give another --out, or remove it")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_a_configuration_file_that_is_none(call, tmp_path):
    assert call("nowhere.toml")[0] == 2
    Path("bad.toml").write_text("rounds = = 3")
    code, error = call("bad.toml")
    assert code == 2
    assert "bad.toml: not a TOML file" in error


def test_the_shell_completes_keys(monkeypatch, capsys):
    for name, value in {"COMP_WORDS": "fedistill simulate -s student.l", "COMP_CWORD": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_FEDISTILL_COMPLETE", "complete_bash")
    with pytest.raises(SystemExit):
        cli.app(prog_name="fedistill")
    assert capsys.readouterr().out.split() == ["student.layers=", "student.layer-selection="]
