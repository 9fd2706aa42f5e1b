"""An audit's page says which attack got through where, and what it read and reached."""

import re

import numpy as np

from simulations.audits.plots import GRID
from simulations.audits.report import audit_page

ARMS = ("none", "<i>noised")
ROWS = [
    {"arm": arm, "task": "toy", "seed": 0, "attack": attack, "success": success, "low": low, "chance": chance,
     "measure": measure}
    for arm, attack, success, low, chance, measure in (
        ("none", "utility", 0.8, None, None, "accuracy"),
        ("<i>noised", "utility", 0.7, None, None, "accuracy"),
        ("none", "lira", 0.3, 0.2, 0.01, "TPR"),
        ("<i>noised", "lira", 0.05, 0.01, 0.04, "TPR"),
        ("none", "votes", None, None, None, ""),
    )
]  # fmt: skip


def test_an_audits_page_says_what_got_through():
    curves = {"lira": {"none": np.sqrt(GRID), "<i>noised": GRID}}
    found = audit_page(ROWS, ARMS, {"lira": "https://example.org/paper"}, curves)
    assert "Attacks that got through: 1 of 1 in arm none and 0 of 1 in arm &lt;i&gt;noised." in found
    assert "<i>" not in found
    text = re.sub(r"<[^>]+>", " ", found)
    assert "Most leaks in arm none: 30.0 % (TPR) at a utility of 80.0 %" in text
    assert "least in arm &lt;i&gt;noised: 5.0 % at 70.0 %" in text
    # sqrt(0.001) is 3.16 %, that of 0.0001 is 1 %
    assert "Members that are found at 0.1 % false positives: none 3.2 %, &lt;i&gt;noised 0.1 %" in text
    assert "It could not be tried where utility was measured." in text
    assert len(re.findall("<svg ", found)) == 2
    assert "https://example.org/paper" in text


def test_an_epsilon_is_told_as_it_is():
    told = {"success": 0.49, "low": 0.49, "chance": 3.0, "measure": "epsilon at least"}
    rows = [row for row in ROWS if row["attack"] == "utility"] + [ROWS[0] | {"attack": "canaries"} | told]
    text = re.sub(r"<[^>]+>", " ", audit_page(rows, ARMS, {}, {}))
    assert "Most leaks in arm none: 0.5 (epsilon at least) at a utility of 80.0 %." in text
    assert re.search(r"none +80\.00 % +0\.49 +3\.00 +no", text)


def test_an_audit_without_rows_has_a_page():
    assert "No attack has ended yet." in audit_page([], ARMS, {}, {})
