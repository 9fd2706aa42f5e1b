"""How long a run waits for its SuperLink, and with whom it goes on."""

from common.wire import Joined
from simulations import edge_run
from simulations.edge_run import LOST_SECONDS, Absence, with_other_data


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


def test_whose_data_have_changed_is_known_by_their_numbers():
    joined = {client: Joined(client, 8, 2, (), "1") for client in (0, 2, 3)}
    assert with_other_data(joined, {0: (8, 2), 1: (7, 2), 2: (9, 2), 3: (8, 1)}) == [2, 3]
