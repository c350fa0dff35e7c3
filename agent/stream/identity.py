"""Who a peer is: one self-signed certificate per agent, pinned exactly through the control plane.

There is no authority to trust or to lose. Each side is told over the bus which certificate the other one
has, makes that the only one it accepts (mutual TLS 1.3) and compares it byte by byte after the handshake.
Names, issuers and dates say nothing; the pin says everything.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
from typing import TYPE_CHECKING, Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from whimbrel.agent.stream.errors import LocalError, WrongPeer

if TYPE_CHECKING:
    from pathlib import Path

_CERTIFICATE_FILE: Final = "identity.crt"
_KEY_FILE: Final = "identity.key"
_LIFETIME: Final = datetime.timedelta(days=3650)
_CLOCK_SKEW: Final = datetime.timedelta(days=30)


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A host's certificate and its private key, both PEM."""

    host: str
    certificate_pem: str
    key_pem: str

    @classmethod
    def create(cls, host: str) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        # A common name has at most 64 characters; which host this is says the pin, not the name.
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"whimbrel {host}"[:64])])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(
            host=host,
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            key_pem=key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ).decode(),
        )

    def save(self, folder: Path) -> None:
        """Two files, 0600, the key first: a certificate without its key is never seen."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in ((_KEY_FILE, self.key_pem), (_CERTIFICATE_FILE, self.certificate_pem)):
            draft = folder / f".{name}.{os.getpid()}"
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(text)
            draft.rename(folder / name)

    @classmethod
    def load(cls, host: str, folder: Path) -> Identity:
        """Raises FileNotFoundError where none was saved, LocalError where certificate and key do not fit."""
        identity = cls(
            host=host,
            certificate_pem=(folder / _CERTIFICATE_FILE).read_text(),
            key_pem=(folder / _KEY_FILE).read_text(),
        )
        _context(identity, identity.certificate_pem, ssl.PROTOCOL_TLS_CLIENT)
        return identity

    @classmethod
    def load_or_create(cls, host: str, folder: Path) -> Identity:
        try:
            return cls.load(host, folder)
        except FileNotFoundError:
            identity = cls.create(host)
            identity.save(folder)
            return identity

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.certificate_pem)

    def client_context(self, peer_certificate_pem: str) -> ssl.SSLContext:
        return _context(self, peer_certificate_pem, ssl.PROTOCOL_TLS_CLIENT)

    def server_context(self, peer_certificate_pem: str) -> ssl.SSLContext:
        context = _context(self, peer_certificate_pem, ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # sessions are never resumed below our own frames
        return context


def fingerprint(certificate_pem: str) -> str:
    """`sha256:<hex>` of the certificate. Raises LocalError where the PEM is none."""
    return _fingerprint_of_der(_der(certificate_pem))


def check_peer(tls: ssl.SSLObject | ssl.SSLSocket, peer_certificate_pem: str) -> None:
    """After the handshake: raises WrongPeer unless exactly the pinned certificate answered."""
    found = tls.getpeercert(binary_form=True)
    if found != _der(peer_certificate_pem):
        raise wrong_peer(peer_certificate_pem, _fingerprint_of_der(found) if found else "no certificate")


def failed_peer(tls: ssl.SSLObject, peer_certificate_pem: str) -> WrongPeer:
    """The error for a handshake that OpenSSL ended because the certificate is not the pinned one."""
    # Public since Python 3.13, before on the inner object. A server's OpenSSL keeps no refused certificate.
    chain = None
    for owner in (tls, getattr(tls, "_sslobj", None)):
        ask = getattr(owner, "get_unverified_chain", None)
        if ask is not None:
            chain = ask()
            break
    if not chain:
        return wrong_peer(peer_certificate_pem, "another one")
    first = chain[0]
    der = first if isinstance(first, bytes) else first.public_bytes(ssl._ssl.ENCODING_DER)  # type: ignore[attr-defined]
    return wrong_peer(peer_certificate_pem, _fingerprint_of_der(der))


def wrong_peer(expected_pem: str, found: str) -> WrongPeer:
    return WrongPeer(
        f"the peer's certificate is not the pinned one: expected {fingerprint(expected_pem)}, found {found}; "
        "the agent there has a new identity or another program answers: check the host's record on the bus"
    )


def _context(identity: Identity, peer_certificate_pem: str, protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # Under TLS 1.3 OpenSSL's first choice is AES-256-GCM, which is what the hardware does fastest.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _der(peer_certificate_pem)
    context.load_verify_locations(cadata=peer_certificate_pem)
    # Python reads keys from files only: one that exists in memory alone, for these few lines.
    fd = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        os.write(fd, (identity.certificate_pem + identity.key_pem).encode())
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    except ssl.SSLError as error:
        raise LocalError(
            f"identity of host {identity.host} is unusable: {error}; delete it to make a new one"
        ) from error
    finally:
        os.close(fd)
    return context


def _der(certificate_pem: str) -> bytes:
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    except ValueError as error:
        raise LocalError(f"not a PEM certificate: {certificate_pem[:40]!r}…: {error}") from error
    return certificate.public_bytes(serialization.Encoding.DER)


def _fingerprint_of_der(der: bytes) -> str:
    return f"sha256:{hashlib.sha256(der).hexdigest()}"
