"""The benchmark with tiny random models: every arm runs, plain loops and federation learn the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import load_config
from common.errors import InputError
from simulations.bench import AGREE, ARMS, MUST_AGREE, WORKLOADS, bench, choose_arms, workload_settings

# the learning rate of the plain loop in this process, ten times what it should be
WRONG_LOOP = """
import sys
from simulations import bare_loop, cli
right = bare_loop.learning_rate
bare_loop.learning_rate = lambda config, number: 10 * right(config, number)
cli.main(sys.argv[1:])
"""


def test_all_arms_run_and_learn_what_they_should(fedistill, tiny, tmp_path):
    own = ["task=toy", "data.clients=40", "server.cohort=6", "client.precision=fp32"]  # over the workload's keys
    keys = [*tiny, *(part for key in own for part in ("-s", key))]
    done = fedistill("bench", "--workload", "many-small", *keys, "--repeats", "1", "--out", "bench.json", timeout=1500)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    result = json.loads((tmp_path / "bench.json").read_text())
    assert tuple(result["arms"]) == ARMS
    assert result["workload"] == "many-small"
    assert result["keys"]["data.clients"] == 40
    assert result["cores"] == os.cpu_count()
    assert len(result["cohort"]) == 6
    for name, arm in result["arms"].items():
        assert arm["name"] in done.stdout
        assert arm["least"] == arm["median"] == arm["most"] == arm["examples_per_s"][0] > 0
        assert arm["examples_per_s"][0] == pytest.approx(arm["examples"][0] / arm["seconds"][0])
        assert 0 <= arm["overhead"] < 1
        # the usual app cuts other batches: near enough to have learnt from the same clients, not the same
        assert arm["update_difference"] < (AGREE["fp32"] if name in MUST_AGREE else 1.0)
    for name in ("loop-1xN", "loop-Nx1", "flower"):  # ours times a second round, with a cohort of its own
        assert result["arms"][name]["examples"] == [result["examples"]]
    times = result["arms"]["fedistill"]["median"] / result["arms"]["flower"]["median"]
    assert result["fedistill_over_flower"] == pytest.approx(times)


def test_a_loop_that_learns_something_else_fails_the_bench(tiny, tmp_path):
    keys = ["--arms", "loop-1xN,fedistill", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", WRONG_LOOP, "bench", *tiny, *keys]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "the run failed: bare loop" in done.stderr
    assert "learnt another update" in done.stderr


def test_what_the_loops_cannot_do_is_refused(fedistill, tiny):
    done = fedistill("bench", *tiny, "-s", "student.dropout=0.1")
    assert done.returncode == 2
    assert "student.dropout = 0.1" in done.stderr


@pytest.mark.parametrize(
    "key",
    [
        "student.tiers='1/0/0@0.5'", "student.heads=1", "student.neurons=8", "student.vocabulary=90",
        "student.target-ratio=0.5", "distill.weighting=annealed", "distill.cls-weight=1.0",
        "distill.relation-weight=1.0", "distill.general-rounds=1", "server.average-rounds=2", "client.max-seconds=5",
        "client.energy-budget=5", "privacy.secure-aggregation=true",
    ],
)  # fmt: skip
def test_students_and_losses_that_the_loops_do_not_have_are_refused(key):
    with pytest.raises(InputError, match=rf"{key.partition('=')[0]} = .*: the plain loops know only"):
        bench(load_config(settings=[key]), 1, None)


def test_arms_and_workloads_go_by_name():
    assert choose_arms("") == ARMS
    assert choose_arms("flower, loop-1xN") == ("loop-1xN", "flower")
    assert workload_settings(None) == []
    assert 'task="sst2"' in workload_settings("few-large")
    with pytest.raises(InputError, match="no such arm"):
        choose_arms("flower,slow")
    with pytest.raises(InputError, match=" or ".join(WORKLOADS)):
        workload_settings("huge")
