"""A federation's folder: what lies where, who may read it, and that a change is whole or absent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from clients.edge_folder import ClientFolder, check_data
from common.errors import InputError
from server.edge_folder import EdgeFolder, add_client, describe, init, renew, revoke
from server.edge_server import check_control


@pytest.fixture
def folder(tmp_path):
    return init(tmp_path / "fed", "fed.example.org", 2, 9092)


def files(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_a_client_folder_holds_all_it_needs_and_nothing_else(folder):
    home = folder.path / "clients" / "client-1"
    assert files(home) == {"ca.crt", "client.key", "client.key.pub", "client.toml"}
    assert (home / "client.toml").read_text() == 'host = "fed.example.org"\nport = 9092\nclient = 1\n'
    assert (home / "ca.crt").read_bytes() == folder.ca_file.read_bytes()
    opened = ClientFolder.open(home)
    assert opened.settings.client == 1 and opened.settings.address == "fed.example.org:9092"


def test_no_client_folder_holds_anothers_secret(folder):
    secrets = [folder.path / "ca" / "ca.key", folder.key_file, *folder.path.glob("clients/*/client.key")]
    assert len(secrets) == 4
    for home in (folder.path / "clients").iterdir():
        inside = b"".join(file.read_bytes() for file in home.iterdir())
        assert [secret.read_bytes() in inside for secret in secrets].count(True) == 1


def test_only_the_owner_reads_keys(folder):
    for path in folder.path.rglob("*"):
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix == ".key":
            assert mode == 0o600, path
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_a_key_that_others_can_read_is_refused(folder):
    (folder.path / "clients" / "client-0" / "client.key").chmod(0o640)
    folder.key_file.chmod(0o604)
    with pytest.raises(InputError, match=r"mode 640\); run: chmod 600"):
        ClientFolder.open(folder.path / "clients" / "client-0")
    with pytest.raises(InputError, match="mode 604"):
        folder.server()


def test_nothing_is_overwritten(folder):
    before = {path: (folder.path / path).read_bytes() for path in files(folder.path)}
    with pytest.raises(InputError, match="nothing is overwritten"):
        init(folder.path, "a", 1, 9092)
    assert {path: (folder.path / path).read_bytes() for path in files(folder.path)} == before


def test_a_killed_init_leaves_nothing_under_the_name(tmp_path):
    code = "import sys, pathlib; from server.edge_folder import init; init(pathlib.Path(sys.argv[1]), 'a', 9999, 1)"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "fed")])
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".fed.*/keys/client-3.pub")):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "fed").exists()
    assert list(tmp_path.glob(".fed.*"))  # a draft with keys in it, which the next one removes
    assert len(EdgeFolder.open(init(tmp_path / "fed", "a", 1, 9092).path).admitted()) == 1
    assert not list(tmp_path.glob(".fed.*"))


def test_numbers_are_never_used_again(folder):
    assert add_client(folder).name == "client-2"
    assert revoke(folder, "2") == 2
    assert revoke(folder, "client-0") == 0
    assert list(folder.admitted()) == [1] and list(folder.revoked()) == [0, 2]
    assert add_client(folder).name == "client-3"


def test_a_client_that_was_never_listed_is_made_anew(folder):
    """add-client was killed between the folder's name and the key's."""
    home = add_client(folder)
    (folder.path / "keys" / "client-2.pub").unlink()
    old = (home / "client.key").read_bytes()
    assert add_client(folder) == home
    assert (home / "client.key").read_bytes() != old
    assert ClientFolder.open(home).settings.client == 2


def test_revoking_says_who_is_there(folder):
    with pytest.raises(InputError, match="client-7: no such client; there are: 0, 1"):
        revoke(folder, "7")
    revoke(folder, "1")
    with pytest.raises(InputError, match="was revoked before"):
        revoke(folder, "1")
    with pytest.raises(InputError, match="not a client"):
        revoke(folder, "../ca")


def test_renewing_changes_the_certificate_and_nothing_else(folder):
    before = {path: (folder.path / path).read_bytes() for path in files(folder.path)}
    renew(folder)
    after = {path: (folder.path / path).read_bytes() for path in files(folder.path)}
    assert {path for path in after if before.get(path) != after[path]} <= {"server/server.crt", ".lock"}
    assert before["server/server.crt"] != after["server/server.crt"]
    folder.server()


def test_a_certificate_of_another_authority_is_refused(folder, tmp_path):
    other = init(tmp_path / "other", "fed.example.org", 1, 9092)
    folder.ca_file.write_bytes(other.ca_file.read_bytes())
    with pytest.raises(InputError, match="not signed by"):
        folder.server()


def test_what_it_tells(folder):
    revoke(folder, "1")
    text = "\n".join(describe(folder))
    number = f"{folder.server().certificate.serial_number:x}"
    assert number in text and "for fed.example.org, localhost, 127.0.0.1, ::1" in text
    assert text.count("SHA256:") == 2 and text.count(" revoked") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('host = "a"\nport = 0\nclient = 0', "port: Input should be greater"),
        ('host = "a"\nport = "9092"\nclient = 0', "port: Input should be a valid integer"),
        ('host = "a b"\nport = 1\nclient = 0', "host: host = 'a b': neither"),
        ('host = "a"\nport = 1', "client: Field required"),
        ('host = "a"\nport = 1\nclient = 0\nkey = 1', "key: Extra inputs"),
        ("host", "not a TOML file"),
    ],
)
def test_a_client_file_is_checked(folder, text, words):
    (folder.path / "clients" / "client-0" / "client.toml").write_text(text)
    with pytest.raises(InputError, match=words) as error:
        ClientFolder.open(folder.path / "clients" / "client-0")
    assert len(str(error.value).splitlines()) == 1


def test_a_key_of_another_client_is_noticed(folder):
    one, other = (folder.path / "clients" / name for name in ("client-0", "client-1"))
    (one / "client.key").write_bytes((other / "client.key").read_bytes())
    with pytest.raises(InputError, match=r"does not belong to client\.key\.pub"):
        ClientFolder.open(one)


def test_data_is_looked_at_before_anything_starts(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(InputError, match="holds no example"):
        check_data(tmp_path / "a.csv")
    with pytest.raises(InputError, match="no such file"):
        check_data(tmp_path / "b.csv")
    (tmp_path / "a.csv").write_text("text,label\ngood,1\n")
    assert check_data(tmp_path / "a.csv") == tmp_path / "a.csv"


NAMES = ["192.0.2.1", "localhost", "127.0.0.1", "::1"]


@pytest.mark.parametrize(
    ("host", "port", "exposed", "words"),
    [
        ("0.0.0.0", 9093, False, "no login"),
        ("192.0.2.1", 9093, False, "no login"),
        ("0.0.0.0", 9093, True, "certificate is for"),
        ("server", 9093, False, "give an IP address"),
        ("127.0.0.1", 9092, False, "clients' port"),
    ],
)
def test_the_control_api_stays_at_home(host, port, exposed, words):
    with pytest.raises(InputError, match=words):
        check_control((host, port), 9092, NAMES, exposed=exposed)


def test_where_the_control_api_may_be():
    check_control(("127.0.0.1", 9093), 9092, NAMES, exposed=False)
    check_control(("::1", 9093), 9092, NAMES, exposed=False)
    check_control(("192.0.2.1", 9093), 9092, NAMES, exposed=True)
