"""What is missing is said with how to get it, in 80 columns."""

import socket

from packaging.requirements import Requirement

from simulations.doctor import FINE, MISSING, NOTE, Finding, _extras, _is_free, _package, lines


def test_a_package_that_is_missing_or_old_is_named_with_its_command():
    missing = _package(Requirement("no-such-package>=2"), "pip install 'no-such-package>=2'")
    assert (missing.found, missing.state, missing.advice) == (
        "not installed",
        MISSING,
        "pip install 'no-such-package>=2'",
    )
    old = _package(Requirement("pytest>=999"), "x")
    assert old.state == MISSING
    assert old.found.endswith("not >=999")
    assert _package(Requirement("pytest>=1"), "x").state == FINE


def test_an_extra_that_is_not_there_is_a_note():
    needed = [Requirement("pytest>=1"), Requirement('no-such-package>=2; extra == "mlflow"')]
    [found] = _extras(needed)
    assert (found.name, found.state) == ("[mlflow]", NOTE)
    assert "pip install 'fedistill[mlflow]'" in found.advice


def test_lines_fit_80_columns_and_end_in_a_verdict():
    findings = [Finding("cache", "/" + "long " * 40), Finding("torch", "not installed", MISSING, "pip install torch")]
    told = list(lines(findings))
    assert max(map(len, told)) <= 80
    assert told[-1] == "missing: torch"
    assert list(lines(findings[:1]))[-1] == "nothing that is needed is missing"


def test_a_port_in_use_is_not_free():
    with socket.socket() as ear:
        ear.bind(("127.0.0.1", 0))
        ear.listen()
        assert not _is_free(ear.getsockname()[1])
