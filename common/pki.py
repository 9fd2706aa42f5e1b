"""A private certificate authority for one federation, the server's certificate and the clients' key pairs.

The server proves itself with a certificate (TLS, RFC 5280); clients know its authority and no other. A client proves
itself with an ECDSA P-384 key in OpenSSH's format, which the server keeps a list of: revoking one needs no
revocation list.
"""

import datetime
import hashlib
import ipaddress
import re
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import InputError

AUTHORITY_YEARS = 10
SERVER_YEARS = 1
CLOCK_SLACK = datetime.timedelta(hours=1)  # a device whose clock is behind may still connect at once
LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")  # of a DNS name


@dataclass(frozen=True)
class Issued:
    """A certificate and the private key it speaks for."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """The private key, PKCS 8, without a password."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def check_host(host: str) -> str:
    """A DNS name in lower case or an IP address, as clients are to call the server.

    Raises:
        InputError: it is neither, or an address that nobody can connect to.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower().removesuffix(".")
        labels = name.split(".")
        fits = len(name) <= 253 and all(LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()
        if not fits:
            raise InputError(f"host = {host!r}: neither a DNS name nor an IP address") from None
        return name
    if address.is_unspecified or address.is_multicast:
        raise InputError(f"host = {host!r}: give the name or address by which clients reach the server")
    return str(address)


def create_authority() -> Issued:
    """A new authority, valid for ten years, that can sign server certificates and nothing beneath itself."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedistill federation CA")])
    usage = {"key_cert_sign": True, "crl_sign": True}
    return Issued(
        key,
        _certificate(name, name, key, AUTHORITY_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384()),
    )


def issue_server(authority: Issued, host: str, key: ec.EllipticCurvePrivateKey | None = None) -> Issued:
    """A server certificate, valid for a year, for ``host`` and for the machine itself (localhost, 127.0.0.1, ::1).

    Args:
        key: of the certificate that is renewed; by default a new one.
    """
    key = key or ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedistill server")])
    names = [_general_name(name) for name in dict.fromkeys((host, "localhost", "127.0.0.1", "::1"))]
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return Issued(
        key,
        _certificate(subject, authority.certificate.subject, key, SERVER_YEARS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(authority.key, hashes.SHA384()),
    )


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, years: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + datetime.timedelta(days=365 * years))
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=key_cert_sign, crl_sign=crl_sign,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def names_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and addresses that a server certificate holds for."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(entry.value) for entry in found]


def create_client_key(comment: str) -> tuple[bytes, bytes]:
    """A client's key pair, ECDSA on P-384: (private, public), both in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, _public_line(key.public_key()) + f" {comment}\n".encode()


def _public_line(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def load_client_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of a client.

    Raises:
        InputError: it cannot be read, is no ECDSA key in OpenSSH's format, or has a password.
    """
    try:
        key = serialization.load_ssh_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: not an ECDSA private key in OpenSSH's format, without a password; copy it again")
    return key


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The public key of a client.

    Raises:
        InputError: it cannot be read, or is no ECDSA key in OpenSSH's format.
    """
    try:
        key = serialization.load_ssh_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(f"{path}: not an ECDSA public key in OpenSSH's format")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """As ``ssh-keygen -l`` shows it."""
    digest = hashlib.sha256(b64decode(_public_line(key).split()[1])).digest()
    return "SHA256:" + b64encode(digest).decode().rstrip("=")


def load_certificate(path: Path, *, authority: bool) -> x509.Certificate:
    """A certificate that is valid today.

    Args:
        authority: it must be one of an authority.

    Raises:
        InputError: it cannot be read, is no certificate, not of that kind, expired, or not valid yet.
    """
    try:
        certificate = x509.load_pem_x509_certificate(_read(path))
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (ValueError, x509.ExtensionNotFound):
        raise InputError(f"{path}: not a certificate that fedistill has made; copy it again") from None
    if constraints.ca != authority:
        raise InputError(f"{path}: not the certificate of {'an authority' if authority else 'a server'}; copy it again")
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        cure = "make a new federation with `fedistill edge init`" if authority else "renew it: `fedistill edge renew`"
        raise InputError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {cure}")
    if now < certificate.not_valid_before_utc:
        begin = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise InputError(f"{path}: not valid before {begin}; set this machine's clock")
    return certificate


def load_issued(certificate: Path, key: Path, *, authority: bool) -> Issued:
    """A certificate that is valid today, with its private key.

    Raises:
        InputError: either cannot be read, or they do not belong together.
    """
    found = load_certificate(certificate, authority=authority)
    private = load_private_key(key)
    if private.public_key() != found.public_key():
        raise InputError(f"{key}: not the private key of {certificate.name}")
    return Issued(private, found)


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of a certificate.

    Raises:
        InputError: it cannot be read, or is no such key.
    """
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: not the private key of a certificate that fedistill has made")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
