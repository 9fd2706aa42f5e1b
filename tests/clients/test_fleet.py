"""What a client makes of a server's answers, and of a SuperNode that gets none."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from clients.fleet import GAVE_UP, KeyRefused, Unreachable, _refusal
from common.errors import InputError

FOLDER: Any = SimpleNamespace(path=Path("here"), settings=SimpleNamespace(address="server:9092", client=3))


@pytest.mark.parametrize("status", [408, 413, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(status):
    assert type(_refusal(FOLDER, httpx.Response(status))) is Unreachable


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("date", [None, "garbage", "Sun, 22 Nov 2020 10:00:00 -0000"])
def test_a_key_is_refused_whatever_the_date_looks_like(status, date):
    headers = {} if date is None else {"date": date}
    assert type(_refusal(FOLDER, httpx.Response(status, headers=headers))) is KeyRefused


def test_another_server_and_another_time_are_named():
    assert "no fedistill server" in str(_refusal(FOLDER, httpx.Response(404)))
    apart = _refusal(FOLDER, httpx.Response(401, headers={"date": "Sun, 22 Nov 2020 10:00:00 GMT"}))
    assert type(apart) is InputError
    assert "the clocks of this machine and of server:9092 are" in str(apart)


GIVES_UP = """
import os, threading, time
import clients.fleet
from flwr.supernode import cli
cli.flower_supernode = lambda: threading.Thread(target=time.sleep, args=(600,)).start()
clients.fleet.main(str(os.getppid()))
"""


def test_a_supernode_that_has_given_up_ends_though_a_thread_of_it_runs_on():
    ended = subprocess.run([sys.executable, "-c", GIVES_UP], timeout=300, check=False)
    assert ended.returncode == GAVE_UP
