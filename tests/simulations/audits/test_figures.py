"""The table of attacks against defences."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from common.config import Config
from simulations.audits.attack import EPSILON
from simulations.audits.figures import against, attack_sheets, wide_sheet
from simulations.audits.plots import _against_epsilon
from simulations.table import show

ARMS = ("none", "example-8", "example-3", "example-1", "client-8", "client-3", "client-1")


def row(arm, seed, attack, success, **more):
    return {"arm": arm, "task": "toy", "seed": seed, "attack": attack, "success": success, **more}


@pytest.fixture
def rows():
    found = []
    for seed in (0, 1):
        for arm in ARMS:
            bare = arm == "none"
            found.append(row(arm, seed, "utility", 0.9 - 0.1 * seed, measure="accuracy on validation"))
            rate = 0.05 + 0.02 * seed if bare else 0.002
            known = {"low": rate / 2, "high": 2 * rate, "chance": 0.002, "measure": "TPR at 0.1 % FPR"}
            found.append(row(arm, seed, "lira", rate, variant="online", **known))
            found.append(row(arm, seed, "rows", None if bare else 0.1, chance=0.2, measure="token recall"))
    return found


def test_an_attack_gets_through_where_its_interval_is_above_chance(rows):
    found = against(rows, ARMS)
    bare, private = found["lira", "online"]["none"], found["lira", "online"]["client-1"]
    assert (bare.mean, bare.std, bare.through) == (pytest.approx(0.06), pytest.approx(0.02 / 2**0.5), True)
    assert (private.mean, private.through) == (0.002, False)
    assert found["rows", ""]["none"].mean is None
    assert found["rows", ""]["client-1"].through is False
    assert found["utility", ""]["none"].through is None


def test_without_an_interval_nobody_knows_whether_more_than_chance_got_through():
    rows = [row("none", 0, "tag", 0.9, chance=0.2), row("client-1", 0, "tag", 0.2, chance=0.2)]
    found = against(rows, ("none", "client-1"))["tag", ""]
    assert found["none"].through is None and found["client-1"].through is False
    [sheet] = attack_sheets(rows, ("none", "client-1"))
    assert sheet.sections == [[], [("tag", "90.0", "20.0")]]


def test_an_epsilon_is_no_share():
    rows = [row("none", s, "canaries", 0.49 + s, low=0.49, chance=0.0, measure=EPSILON) for s in (0, 1)]
    assert attack_sheets(rows, ("none",))[0].sections[1] == [("canaries", "0.99*")]
    assert wide_sheet(rows, ("none",)).sections[1] == [("canaries", "0.99 ±0.71*")]
    axis = _against_epsilon(plan_of("none"), rows).axes[0]
    assert axis.yaxis.get_major_formatter()(0.5, 0) == "0.5"


def plan_of(*arms):
    runs = [SimpleNamespace(arm=arm, config=Config()) for arm in arms]
    return SimpleNamespace(plan=SimpleNamespace(arms=arms, runs=runs))


def test_the_table_says_it_in_80_columns(rows, capsys):
    [sheet] = attack_sheets(rows, ARMS)
    utility, attacks = sheet.sections
    assert utility == [("utility", *["85.0"] * 7)]
    assert attacks == [("lira online", "6.0*", *["0.2"] * 6), ("rows", "-", *["10.0"] * 6)]
    show(Console(width=80), sheet)
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    assert "lira: TPR at 0.1 % FPR." in printed
    assert "6.0 ±1.4*" in wide_sheet(rows, ARMS).sections[1][0]


def test_more_arms_stand_below_each_other(rows):
    arms = (*ARMS, "more")
    first, second = attack_sheets([*rows, row("more", 0, "utility", 0.5)], arms)
    assert (len(first.head), second.head) == (8, ("", "more"))
    assert second.sections[0] == [("utility", "50.0")]
    assert [line[1] for line in second.sections[1]] == ["", ""]
    assert not first.notes and second.notes
