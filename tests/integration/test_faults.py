"""Whatever goes wrong in a real Flower run on Ray: the round goes on with the others, and what is lost is named.

The strongest fact: a run in which every lost client was recovered ends with the student of an undisturbed run, bit for
bit, and one that loses a client ends with the student of a run in which that client refuses.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import safetensors.numpy

from common.errors import RunFailed
from server.assignment import pick_cohort
from server.exchange import TOLD, StreamingGrid
from tests.integration import faulty
from tests.integration.conftest import read_lines, read_summary
from tests.integration.faulty import Fault, Outcome, Stage

CLIENTS = 12
NOTHING = {"failed": 0, "rejected": 0, "late": 0, "retried": 0}
BESIDE_0 = 5  # clients on the list that a worker gets together with client 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[Stage]:
    keys = {
        "teacher.model": tiny_teacher,
        "data.limit": 400,
        "data.max-length": 32,
        "student.layers": 1,
        "rounds": 1,
        "client.lr": 0.01,
        "runtime.workers": 2,
    }
    with Stage(tmp_path_factory.mktemp("stage"), keys) as up:
        yield up


@pytest.fixture(scope="module")
def undisturbed(stage: Stage) -> Callable[..., Outcome]:
    """The run with these settings in which nothing goes wrong."""
    known: dict[tuple[str, ...], Outcome] = {}

    def call(*settings: str) -> Outcome:
        if settings not in known:
            known[settings] = stage.run(*settings)
            assert known[settings].faults == NOTHING
            assert known[settings].heard[-1].startswith("round ")
        return known[settings]

    return call


@pytest.fixture(scope="module")
def without_client_0(stage: Stage) -> Callable[..., Outcome]:
    """The run with these settings in which client 0's training raises in every round."""
    known: dict[tuple[str, ...], Outcome] = {}

    def call(*settings: str) -> Outcome:
        if settings not in known:
            known[settings] = stage.run(*settings, faults=[Fault("raises")])
        return known[settings]

    return call


def check_recovered(run: Outcome, reference: Outcome, *, phase: str = "train", number: int = 1) -> None:
    """All clients that were lost, client 0 among them, came back; nothing shows but in the books."""
    check_recovered_in(run, reference, phase, number)
    assert run.happened > 0
    assert run.summary["status"] == "completed"
    assert run.faults == NOTHING | {"retried": len(run.costs(phase, number)["recovered"])}
    assert run.student == reference.student
    assert learnt(run) == learnt(reference)


def check_recovered_in(run: Outcome, reference: Outcome, phase: str, number: int) -> None:
    recovered = run.costs(phase, number)["recovered"]
    assert 0 in recovered
    for client in recovered[:TOLD]:
        [said] = run.said(f"round {number}: client {client} ")
        assert said.endswith("; tried again")
    more = len(recovered) - TOLD
    assert run.said(f"round {number}: {more} more") == (
        [f"round {number}: {more} more clients are tried again"] if more > 0 else []
    )
    assert run.line(phase, number) == reference.line(phase, number)


def learnt(run: Outcome) -> list[dict[str, Any]]:
    """metrics.jsonl, but for lines that say whether the teacher's outputs were on disk already."""
    return [line for line in read_lines(run.path) if line["phase"] != "teach"]


def check_lost_alone(run: Outcome, reference: Outcome, how: str) -> None:
    """Client 0, and no other, has no part in round 1."""
    assert run.error is None
    line = run.line("train")
    assert line == {**reference.line("train"), "failed": [], "rejected": [], "late": [], how: [0]}
    assert line["clients"] == CLIENTS - 1
    assert run.faults == NOTHING | {how: 1, "retried": run.faults["retried"]}
    assert run.said(f"round 1: client 0 {how}")
    assert run.student == reference.student


# --- a client, its worker ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "failed: RuntimeError"),
        ("uses up its memory", "failed: MemoryError"),
        ("diverges", "rejected: update is not finite"),
    ],
)
def test_a_bad_client_costs_only_itself(stage, without_client_0, how, told, capfd):
    run = stage.run(faults=[Fault(how)])
    check_lost_alone(run, without_client_0(), told.split(":")[0])
    assert run.said("round 1: client 0") == [f"round 1: client 0 {told}{end}" for end in ("; tried again", "")]
    assert run.faults["retried"] == 0
    check_no_private_text(run, capfd)


def test_a_message_that_raises_tells_no_private_text(stage, undisturbed, without_client_0, capfd):
    once = stage.run(faults=[Fault("the message raises", times=1)])
    check_recovered(once, undisturbed())
    always = stage.run(faults=[Fault("the message raises")])
    check_lost_alone(always, without_client_0(), "failed")
    assert always.faults["retried"] == BESIDE_0
    for run in (once, always):
        assert run.said("round 1: client 0 failed: RuntimeError at faulty.py:")
        check_no_private_text(run, capfd)


def check_no_private_text(run: Outcome, capfd: pytest.CaptureFixture[str]) -> None:
    """Not on screen, not in the run's folder, not in Ray's logs."""
    out, err = capfd.readouterr()
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    files = [path for folder in (run.path, session / "logs") for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert "Smith" not in "".join(run.heard) + out + err
    assert not [path for path in files if b"Smith" in path.read_bytes()]


@pytest.mark.parametrize("how", ["is killed", "is killed for its memory", "crashes in native code"])
def test_the_clients_of_a_worker_that_dies_are_retried(stage, undisturbed, how):
    run = stage.run(faults=[Fault(how, times=1)])
    check_recovered(run, undisturbed())
    assert run.said("round 1: client 0 failed: its worker process died; tried again")


@pytest.mark.parametrize("phase", ["teach", "evaluate"])
def test_a_worker_may_die_in_any_phase(stage, undisturbed, tmp_path, phase):
    run = stage.run(f"runtime.cache={tmp_path}", faults=[Fault("is killed", phase=phase, times=1)])
    check_recovered(run, undisturbed(), phase=phase)


def test_a_client_that_always_kills_its_worker_is_lost_alone_and_travels_alone_from_then_on(stage, without_client_0):
    run = stage.run("rounds=2", faults=[Fault("is killed")])
    assert run.student == without_client_0("rounds=2").student
    assert run.summary["status"] == "completed"
    assert [run.line("train", number)["failed"] for number in (1, 2)] == [[0], [0]]
    assert [len(run.costs("train", number)["recovered"]) for number in (1, 2)] == [BESIDE_0, 0]
    assert run.faults == NOTHING | {"failed": 2, "retried": BESIDE_0}
    assert run.said("round 2: client ") == [
        f"round 2: client 0 failed: its worker process died{end}" for end in ("; tried again", "")
    ]


def test_a_worker_may_die_in_a_later_round(stage, undisturbed):
    settings = ("rounds=3", "server.strategy=fedadam")
    run = stage.run(*settings, faults=[Fault("is killed", round=2, times=1)])
    check_recovered(run, undisturbed(*settings), number=2)


def test_all_workers_may_die_and_come_back(stage, undisturbed):
    run = stage.run(faults=[Fault("is killed", client=client, times=1) for client in (0, 3)])
    assert run.happened == 2
    check_recovered(run, undisturbed())


# --- time ----------------------------------------------------------------------------------------


def test_a_client_that_hangs_once_is_retried(stage, undisturbed):
    run = stage.run("server.round-timeout=30", faults=[Fault("hangs", times=1)])
    check_recovered(run, undisturbed())
    assert run.said("round 1: client 0 late: no reply in time; tried again")


def test_a_client_that_always_hangs_is_lost_alone(stage, without_client_0):
    run = stage.run("server.round-timeout=30", faults=[Fault("hangs")])
    check_lost_alone(run, without_client_0(), "late")
    assert run.faults["retried"] == BESIDE_0
    assert run.seconds < 300


def test_a_reply_that_comes_twice_counts_once(stage, undisturbed):
    run = stage.run("rounds=2", odd={"twice": True})
    assert run.error is None
    assert run.faults == NOTHING
    assert run.student == undisturbed("rounds=2").student


def test_a_reply_that_comes_late_is_not_added_to_what_was_done_again(stage, undisturbed):
    run = stage.run("rounds=2", "server.round-timeout=12", odd={"late": 12.5})
    assert run.error is None
    recovered = run.costs("train")["recovered"]
    assert 0 < len(recovered) == run.faults["retried"]
    assert all(f"round 1: client {client} late: no reply in time; tried again" in run.heard for client in recovered)
    assert run.student == undisturbed("rounds=2").student


def test_a_reply_that_nobody_waits_for_is_fetched_and_forgotten():
    kept = {"a": "late", "b": "in time"}  # replies that Flower holds until they are fetched

    def fetch(wanted: set[str]) -> list[SimpleNamespace]:
        found = [one for one in sorted(wanted) if one in kept and (one != "a" or "b" not in kept)]
        for one in found:
            del kept[one]
        return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=one)) for one in found]

    flower = SimpleNamespace(push_messages=lambda messages: messages, pull_messages=fetch)
    grid = StreamingGrid(flower, lambda: None)
    first = grid.send_and_receive(["a", "b"], timeout=60)
    assert next(iter(first)).metadata.reply_to_message_id == "b"
    first.close()
    assert grid.abandoned == {"a"}
    kept["c"] = "of the next round"
    assert [one.metadata.reply_to_message_id for one in grid.send_and_receive(["c"])] == ["c"]
    assert not kept
    assert not grid.abandoned


# --- replies of the whole list: one sum -----------------------------------------------------------

IN_SUMS = {
    "another shape": "expected <i8 of shape",
    "another dtype": "expected <i8",
    "NaN": "<f8",
    "Inf": "<f8",
    "integers too large to add": "too large to add up",
    "a huge header": "shape (5000000000000,)",
    "a shape beyond 64 bits": "beyond 64 bits",
    "a negative shape": "shape (-1,)",
    "Fortran order": "Fortran order",
    "an array of objects": "|O of shape (1,)",
    "no header": "no readable array header",
    "half the data": "no readable array header | bytes of data",
    "more data than it says": "bytes",
    "another kind of array": "torch.tensor",
    "a missing array": "1 arrays missing",
    "an extra array": "1 unknown",
    "another name": "1 arrays missing",
    "no arrays at all": "arrays missing",
    "an extra record": "unexpected records: 1",
    "no records": "record 'clients': not there",
    "no record of lines": "record 'clients': not there",
    "lines that are no text": "record 'clients'",
    "lines that are no JSON": "not readable",
    "a count of zero": "client 0 counts 0 examples",
    "a negative count": "client 0: the count of examples is not",
    "a count that is NaN": "client 0: the count of examples is not",
    "a count of 1e12": "client 0: the count of examples is not",
    "a count of a million million": "client 0: the count of examples is not",
    "a count that is text": "client 0: the count of examples is not",
    "a count that is true": "client 0: the count of examples is not",
    "one example more": "client 0 counts",
    "a line for someone else": "not one for each client",
    "no line": "not one for each client",
    "a line twice": "not one for each client",
    "endless seconds": "client 0: seconds is not a number",
    "a loss that is NaN": "client 0: loss is not a number",
    "a loss of 400 digits": "client 0: loss is not a number",
    "codes for the terminal": "client 0: problem is not a short text",
    "an unknown field": "not readable",
}


@pytest.fixture(scope="module")
def broken_sums(stage: Stage) -> Outcome:
    """A run in each of whose rounds another reply is broken."""
    faults = [Fault(how, round=number, times=1) for number, how in enumerate(IN_SUMS, start=1)]
    return stage.run(f"rounds={len(faults)}", faults=faults)


@pytest.mark.parametrize("how", IN_SUMS)
def test_a_broken_reply_is_refused_and_its_clients_are_retried(broken_sums, undisturbed, how):
    number = 1 + list(IN_SUMS).index(how)
    check_recovered_in(broken_sums, undisturbed(f"rounds={len(IN_SUMS)}"), "train", number)
    [said] = broken_sums.said(f"round {number}: client 0 rejected: ")
    assert any(part in said for part in IN_SUMS[how].split(" | ")), said
    assert said.isprintable()


def test_broken_replies_leave_no_trace_in_the_result(broken_sums, undisturbed):
    assert broken_sums.error is None
    assert broken_sums.happened == len(IN_SUMS)
    reference = undisturbed(f"rounds={len(IN_SUMS)}")
    assert broken_sums.student == reference.student
    assert learnt(broken_sums) == learnt(reference)
    assert not faulty.unpickled().exists()


def test_a_client_whose_replies_are_always_broken_is_lost_alone(stage, without_client_0):
    run = stage.run(faults=[Fault("NaN")])
    check_lost_alone(run, without_client_0(), "rejected")
    assert run.faults["retried"] == BESIDE_0


BROKEN_SCORES = ["another shape", "integers too large to add", "negative", "a negative count", "no line", "no records"]


@pytest.mark.parametrize("how", BROKEN_SCORES)
def test_broken_scores_are_refused_and_their_clients_retried(stage, undisturbed, how):
    run = stage.run(faults=[Fault(how, phase="evaluate", times=1)])
    assert run.said("round 1: client 0 rejected: ")
    check_recovered(run, undisturbed(), phase="evaluate")


# --- replies of a client: its own update ----------------------------------------------------------

IN_OWN = {
    "fp32": [
        *("float32 NaN", "float32 Inf", "another shape", "another dtype", "a missing array", "an extra array"),
        *("a huge header", "a negative shape", "Fortran order", "an array of objects", "no header", "half the data"),
        *("a count of zero", "one example more", "no arrays at all"),
    ],
    "fp16": ["its own dtype, NaN", "float32 NaN"],
    "int8": ["its own dtype, NaN", "negative", "largest steps", "a missing array"],
    "topk": ["its own dtype, NaN", "negative", "largest gaps", "no gaps", "another name"],
    "svd": ["its own dtype, NaN", "another shape", "no arrays at all"],
}


def own(wire: str) -> tuple[str, ...]:
    return (f"server.wire={wire}", "server.packing=off", f"rounds={1 + len(IN_OWN[wire])}")


@pytest.fixture(scope="module")
def broken_updates(stage: Stage) -> Callable[[str], Outcome]:
    """For each wire the run in each of whose rounds but the first another update is broken."""
    known: dict[str, Outcome] = {}

    def call(wire: str) -> Outcome:
        if wire not in known:
            faults = [Fault(how, round=number, times=1) for number, how in enumerate(IN_OWN[wire], start=2)]
            known[wire] = stage.run(*own(wire), faults=faults)
        return known[wire]

    return call


@pytest.mark.parametrize(("wire", "how"), [(wire, how) for wire, kinds in IN_OWN.items() for how in kinds])
def test_a_broken_update_is_refused_and_no_neighbour_is_asked_again(broken_updates, undisturbed, wire, how):
    run, number = broken_updates(wire), 2 + IN_OWN[wire].index(how)
    check_recovered_in(run, undisturbed(*own(wire)), "train", number)
    assert run.costs("train", number)["recovered"] == [0]
    assert run.said(f"round {number}: client 0 rejected: ")


@pytest.mark.parametrize("wire", IN_OWN)
def test_broken_updates_leave_no_trace_in_the_result(broken_updates, undisturbed, wire):
    run, reference = broken_updates(wire), undisturbed(*own(wire))
    assert run.error is None
    assert run.happened == len(IN_OWN[wire])
    assert run.student == reference.student
    assert learnt(run) == learnt(reference)
    assert not faulty.unpickled().exists()


def test_a_client_whose_own_updates_are_always_broken_is_lost_alone(stage, without_client_0):
    run = stage.run("server.packing=off", faults=[Fault("float32 NaN")])
    check_lost_alone(run, without_client_0(), "rejected")  # whose updates travel as sums: packing changes no bit
    assert run.faults["retried"] == 0


@pytest.mark.parametrize("how", ["is killed", "the message raises", "no record of lines"])
def test_own_updates_of_a_lost_list_are_retried(stage, undisturbed, how):
    settings = ("server.wire=topk", "server.topk=0.1", "rounds=2")
    run = stage.run(*settings, faults=[Fault(how, round=2, times=1)])
    check_recovered(run, undisturbed(*settings), number=2)


# --- too much is lost ------------------------------------------------------------------------------


def test_fewer_nodes_than_needed_fail_the_run_in_time(stage):
    run = stage.run("server.round-timeout=3", nodes=3)
    assert isinstance(run.error, RunFailed)
    assert str(run.error) == "2 nodes came; the run waits for 3"
    assert run.summary["status"] == "failed"
    assert 3 <= run.seconds < 200


def test_a_run_that_loses_too_many_fails_and_can_be_continued(stage, undisturbed):
    settings = ("rounds=3", "server.cohort=4", "server.max-lost-fraction=0.4")
    eligible = range(CLIENTS)
    second = pick_cohort(eligible, 4, 0, 2)
    lost = second[:2]
    run = stage.run(*settings, faults=[Fault("raises", client=client, round=2) for client in lost])
    assert isinstance(run.error, RunFailed)
    assert str(run.error) == (
        "round 2 train: 2 of 4 clients lost, more than server.max-lost-fraction = 0.4 allows; "
        f"the first: client {lost[0]} failed: RuntimeError"
    )
    assert run.summary["status"] == "failed"
    assert run.faults["failed"] == 2
    weights = safetensors.numpy.load_file(run.path / "checkpoints" / "round-00001" / "student.safetensors")
    assert weights
    again = stage.run(*settings, again=run)
    assert again.error is None
    assert again.heard[0] == "continues after round 1"
    assert again.student == undisturbed(*settings).student


def test_a_run_whose_workers_always_die_fails(stage):
    settings = ("rounds=2", "server.cohort=2")
    first = pick_cohort(range(CLIENTS), 2, 0, 1)
    run = stage.run(*settings, faults=[Fault("is killed", client=client) for client in first])
    assert isinstance(run.error, RunFailed)
    assert "round 1 train: 2 of 2 clients lost" in str(run.error)
    assert run.summary["status"] == "failed"
    assert (run.path / "checkpoints" / "round-00000" / "student.safetensors").exists()


def test_the_command_line_fails_with_1_when_nobody_answers_in_time(fedistill, tiny, tmp_path):
    done = fedistill("simulate", *tiny, "-s", "server.round-timeout=0.3", "--out", "run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert "clients lost, more than server.max-lost-fraction" in done.stderr or "nodes came" in done.stderr
    assert read_summary(tmp_path / "run")["status"] == "failed"


# --- more are asked than are needed -----------------------------------------------------------------


def test_over_selection_ends_a_round_without_its_straggler(stage):
    """The straggler never ends: that the stage comes down within a minute afterwards is part of the assertion."""
    asked = pick_cohort(range(CLIENTS), 4, 0, 1, 2.0)
    straggler = stage.largest_of(asked)
    slow = [Fault("sleeps", client=client, round=1, seconds=1.0) for client in asked if client != straggler]
    settings = ("server.cohort=4", "server.over-select=2.0", "server.scores=cohort", "rounds=2")
    run = stage.run(*settings, faults=[Fault("hangs", client=straggler, round=1), *slow])
    assert run.error is None
    assert run.faults == NOTHING
    assert not [text for text in run.heard if "client" in text]
    surplus = run.costs("train")["surplus"]
    assert straggler in surplus
    assert (len(asked), len(surplus)) == (8, 4)
    assert run.line("train")["clients"] == run.line("evaluate")["clients"] == 4
    trained = stage.script.trained(1)
    assert trained >= {*asked} - {*surplus} | {straggler}
    assert len(trained) < len(asked), "the workers went on with a phase that was over"
    assert run.line("train", 2)["clients"] == run.line("evaluate", 2)["clients"] == 4
