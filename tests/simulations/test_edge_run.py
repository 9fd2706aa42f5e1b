"""Which keys a run of real clients has, how long it waits for its SuperLink, and with whom it goes on."""

import numpy as np
import pytest

from common.config import load_config
from common.errors import InputError
from common.wire import Joined
from server.edge_folder import init
from server.run_folder import RunFolder, keys_of_run
from simulations import edge_run
from simulations.edge_run import LOST_SECONDS, Absence, check_keys, keys_of_clients, with_other_data

PUBLIC = ["task=text", "data.source=a.csv", "data.validation=b.csv", "data.text-columns=t", "data.label-column=l"]


@pytest.mark.parametrize(
    ("clients", "settings"),
    [
        (12, ["server.cohort=11"]),
        (3, ["student.tiers=1/12/1536,2/12/1536", "student.tier-of=1,3,2", "student.layers=3"]),
    ],
)
def test_keys_count_the_clients_that_may_take_part(tmp_path, clients, settings):
    edge = init(tmp_path / "fed", "a", clients, 9092)
    config = keys_of_run(None, [*PUBLIC, *settings], None, resume=False, fixed=keys_of_clients(edge))
    check_keys(config)
    assert config.data.clients == clients
    assert len(np.unique(config.tier_of(clients))) == len(config.student.sizes) + 1


def test_a_run_goes_on_with_its_clients_and_the_file_that_it_began_with(tmp_path):
    """The file may be one that is shared with simulations, and another client may have been admitted since."""
    edge, file, out = init(tmp_path / "fed", "a", 3, 9092), tmp_path / "run.toml", tmp_path / "run"
    file.write_text('[data]\nclients = 20\npartition = "dirichlet"\n')
    begun = keys_of_run(file, PUBLIC, None, resume=False, fixed=keys_of_clients(edge))
    RunFolder(out, begun)
    fixed = keys_of_clients(init(tmp_path / "more", "a", 4, 9092))
    assert keys_of_run(file, PUBLIC, out, resume=True, fixed=fixed) == begun
    with pytest.raises(InputError, match=r"seed"):
        keys_of_run(file, [*PUBLIC, "seed=3"], out, resume=True, fixed=fixed)


def test_what_does_not_fit_devices_is_refused_by_name(tmp_path):
    fixed = keys_of_clients(init(tmp_path / "fed", "a", 2, 9092))
    with pytest.raises(InputError, match=r"cohort = 3: there are data\.clients = 2"):
        keys_of_run(None, [*PUBLIC, "server.cohort=3"], None, resume=False, fixed=fixed)
    with pytest.raises(InputError, match="task = 'toy': real clients have texts of their own"):
        keys_of_run(None, [], None, resume=False, fixed=fixed)
    with pytest.raises(InputError, match=r"data\.source is empty: task = text needs"):
        check_keys(keys_of_run(None, [PUBLIC[0], *PUBLIC[2:]], None, resume=False, fixed=fixed))
    with pytest.raises(InputError, match="this run was a simulation"):
        check_keys(load_config(None, PUBLIC))


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
