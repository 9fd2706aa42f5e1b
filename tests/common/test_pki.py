"""Certificates and keys, held against the verifiers that will judge them: OpenSSL, cryptography, OpenSSH's format."""

import base64
import datetime
import hashlib
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from common.errors import InputError
from common.pki import (
    check_host,
    create_authority,
    create_client_key,
    fingerprint,
    issue_server,
    load_certificate,
    load_client_key,
    load_issued,
    load_public_key,
    names_of,
)


@pytest.fixture(scope="module")
def authority():
    return create_authority()


@pytest.fixture(scope="module")
def server(authority):
    return issue_server(authority, "fed.example.org")


def verify(authority, leaf, name):
    policy = PolicyBuilder().store(Store([authority.certificate]))
    return policy.build_server_verifier(name).verify(leaf.certificate, [])


def test_the_chain_verifies_for_its_names_and_no_other(authority, server):
    for name in (x509.DNSName("fed.example.org"), x509.DNSName("localhost")):
        assert verify(authority, server, name)[-1] == authority.certificate
    with pytest.raises(VerificationError):
        verify(authority, server, x509.DNSName("other.example.org"))
    with pytest.raises(VerificationError):
        verify(create_authority(), server, x509.DNSName("fed.example.org"))
    assert names_of(server.certificate) == ["fed.example.org", "localhost", "127.0.0.1", "::1"]


def test_an_address_is_an_address_in_the_certificate(authority):
    leaf = issue_server(authority, "192.0.2.7")
    names = leaf.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "192.0.2.7" in [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert names_of(issue_server(authority, "127.0.0.1").certificate) == ["127.0.0.1", "localhost", "::1"]


def test_validity_and_serial_numbers(authority, server):
    now = datetime.datetime.now(datetime.UTC)
    days = [(each.certificate.not_valid_after_utc - now).days + 1 for each in (authority, server)]
    assert days == [3650, 365]
    assert all(each.certificate.not_valid_before_utc < now for each in (authority, server))
    assert len({issue_server(authority, "a").certificate.serial_number for _ in range(3)}) == 3


def test_the_authority_signs_no_other_authority(authority, server):
    constraints = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value.ca and constraints.value.path_length == 0
    assert not server.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_openssl_makes_a_connection_with_it(authority, server, tmp_path):
    for name, data in (("c", server.certificate_pem()), ("k", server.key_pem()), ("a", authority.certificate_pem())):
        (tmp_path / name).write_bytes(data)
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(tmp_path / "c", tmp_path / "k")
    there = ssl.create_default_context(cafile=str(tmp_path / "a"))
    there.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=lambda: here.wrap_socket(ours, server_side=True).close())
    thread.start()
    with there.wrap_socket(theirs, server_hostname="fed.example.org") as connection:
        assert connection.version() == "TLSv1.3"
    thread.join()


def test_a_renewed_certificate_keeps_the_key(authority, server):
    fresh = issue_server(authority, "fed.example.org", server.key)
    assert fresh.certificate.public_key() == server.certificate.public_key()
    assert fresh.certificate.serial_number != server.certificate.serial_number


def test_a_client_key_is_p384_in_openssh_format(tmp_path):
    private, public = create_client_key("client-0")
    assert private.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert public.startswith(b"ecdsa-sha2-nistp384 ") and public.endswith(b" client-0\n")
    (tmp_path / "k").write_bytes(private)
    (tmp_path / "k.pub").write_bytes(public)
    key = load_client_key(tmp_path / "k")
    assert isinstance(key.curve, ec.SECP384R1)
    assert key.public_key() == load_public_key(tmp_path / "k.pub")
    assert create_client_key("client-0")[0] != private


def test_a_fingerprint_is_that_of_openssh(tmp_path):
    """SHA-256 of the key's second field, in base64 without padding (RFC 4716, as ssh-keygen -l prints it)."""
    public = create_client_key("c")[1]
    (tmp_path / "k.pub").write_bytes(public)
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    assert fingerprint(load_public_key(tmp_path / "k.pub")) == f"SHA256:{base64.b64encode(digest).decode()[:43]}"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("Fed.Example.ORG", "fed.example.org"), ("10.0.0.1", "10.0.0.1"), ("::1", "::1"), ("edge-1", "edge-1")],
)
def test_hosts(given, kept):
    assert check_host(given) == kept


@pytest.mark.parametrize("given", ["", "a b", "0.0.0.0", "::", "-a", "a..b", "https://a", "a:9092", "256.1.1.1", "a_b"])
def test_what_is_no_host(given):
    with pytest.raises(InputError, match="host = "):
        check_host(given)


def expired(authority, days):
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(authority.certificate.subject)
        .issuer_name(authority.certificate.subject)
        .public_key(authority.key.public_key())
        .serial_number(1)
        .not_valid_before(now + datetime.timedelta(days=days - 1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )


def test_a_certificate_out_of_its_time_is_named(authority, tmp_path):
    from cryptography.hazmat.primitives import hashes, serialization

    for days, words in ((-1, "expired on"), (3, "not valid before")):
        signed = expired(authority, days).sign(authority.key, hashes.SHA384())
        (tmp_path / "ca.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        with pytest.raises(InputError, match=words):
            load_certificate(tmp_path / "ca.crt", authority=True)


def test_files_that_do_not_belong_together(authority, server, tmp_path):
    (tmp_path / "s.crt").write_bytes(server.certificate_pem())
    (tmp_path / "a.key").write_bytes(authority.key_pem())
    with pytest.raises(InputError, match=r"a\.key: not the private key of s\.crt"):
        load_issued(tmp_path / "s.crt", tmp_path / "a.key", authority=False)
    with pytest.raises(InputError, match="not the certificate of an authority"):
        load_certificate(tmp_path / "s.crt", authority=True)
    (tmp_path / "s.crt").write_bytes(b"half of it")
    with pytest.raises(InputError, match="copy it again"):
        load_certificate(tmp_path / "s.crt", authority=False)
    with pytest.raises(InputError, match="in OpenSSH's format"):
        load_client_key(tmp_path / "a.key")
