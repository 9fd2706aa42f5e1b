"""How long a run waits for its SuperLink."""

from simulations import edge_run
from simulations.edge_run import LOST_SECONDS, Absence


def test_it_is_waited_for_from_when_it_was_missed(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(edge_run.time, "monotonic", lambda: now[0])
    absence = Absence()
    absence.end()
    now[0] += 10 * LOST_SECONDS  # the run goes well
    assert not absence.is_too_long()
    now[0] += 0.9 * LOST_SECONDS
    assert not absence.is_too_long()
    absence.end()  # it was there for a moment
    now[0] += 0.9 * LOST_SECONDS
    assert not absence.is_too_long()
    now[0] += 1.1 * LOST_SECONDS
    assert absence.is_too_long()
