"""Keys, certificate requests and certificates: what the coordinator's authority signs and what a device asks for.

Elliptic keys on P-256, certificates of 24 hours. Private keys never leave the machine they were made on: a device sends
a request for its public key, and the coordinator chooses the name that it certifies.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from plutino.errors import ConfigError, SecurityError
from plutino.security.identity import Identity, PeerName, Role, write_private

LIFETIME_S = 24 * 3600.0
"""Life of a certificate. A device that was off for longer joins again."""

BACKDATED_S = 600.0
"""Certificates begin this long before they were made: clocks of devices are not always right."""

_AUTHORITY_DAYS = 3650
_MAX_PEM_BYTES = 16 * 1024
_SERVERS = frozenset({Role.COORDINATOR, Role.NODE})
"""Roles that are dialled."""

Clock = Callable[[], float]


class Authority:
    """The certificate authority of one coordinator.

    Args:
        key: signs everything.
        certificate: its own, which everybody trusts.
        clock: seconds since 1970.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, clock: Clock) -> None:
        self._key = key
        self._certificate = certificate
        self._clock = clock
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def open(cls, path: Path, clock: Clock = time.time) -> Authority:
        """The authority of a file; made there, readable by its owner alone, where there is none.

        Raises:
            SecurityError: the file is damaged or may be read by other users.
        """
        if not path.exists():
            made = cls._make(clock)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(path, _key_pem(made._key) + made.ca_pem)
        if path.stat().st_mode & 0o077:
            raise SecurityError(f"other users may read the authority's key in {path}; run: chmod 600 {path}")
        content = path.read_bytes()
        try:
            key = serialization.load_pem_private_key(content, password=None)
            certificate = x509.load_pem_x509_certificate(content[content.index(b"-----BEGIN CERT") :])
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SecurityError(
                f"the authority {path} is damaged ({error}); restore it from a backup, or remove it and let every "
                "device join again"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SecurityError(f"the authority {path} holds a key of another kind; remove it")
        return cls(key, certificate, clock)

    @classmethod
    def _make(cls, clock: Clock) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _subject("plutino authority")
        begins = _utc(clock() - BACKDATED_S)
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + datetime.timedelta(days=_AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate, clock)

    @property
    def fingerprint(self) -> bytes:
        """sha256 of its certificate: what a join token carries."""
        return fingerprint(self.ca_pem)

    def identity(self, name: PeerName, lifetime_s: float = LIFETIME_S) -> Identity:
        """A key and a certificate for somebody on this machine."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Identity(_key_pem(key), self._certify(key.public_key(), name, lifetime_s), self.ca_pem)

    def sign(self, request_pem: bytes, name: PeerName, lifetime_s: float = LIFETIME_S) -> bytes:
        """A certificate for the key of a request, under the name that we choose; whatever else it asks is ignored.

        Raises:
            ConfigError: it is no request, not signed by its key, or for another kind of key.
        """
        if len(request_pem) > _MAX_PEM_BYTES:
            raise ConfigError(f"a certificate request of {len(request_pem)} bytes passes {_MAX_PEM_BYTES}")
        try:
            request = x509.load_pem_x509_csr(request_pem)
            is_signed = request.is_signature_valid
            key = request.public_key()
        except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
            raise ConfigError(f"the certificate request cannot be read: {error}") from error
        if not is_signed:
            raise ConfigError("the certificate request is not signed by its own key")
        if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
            raise ConfigError("the certificate request must be for an elliptic key on P-256")
        return self._certify(key, name, lifetime_s)

    def _certify(self, key: ec.EllipticCurvePublicKey, name: PeerName, lifetime_s: float) -> bytes:
        now_s = self._clock()
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if name.role in _SERVERS:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_subject(name.name))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(_utc(now_s - BACKDATED_S))
            .not_valid_after(_utc(now_s + lifetime_s))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name.dns)]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate_pem: bytes) -> bytes:
    """sha256 of a certificate as it travels.

    Raises:
        SecurityError: it is no certificate.
    """
    return hashlib.sha256(_load(certificate_pem).public_bytes(serialization.Encoding.DER)).digest()


def make_request() -> tuple[bytes, bytes]:
    """A fresh key and the request for its certificate, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The name is the coordinator's to choose.
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject("plutino")).sign(key, hashes.SHA256())
    return _key_pem(key), request.public_bytes(serialization.Encoding.PEM)


def life(certificate_pem: bytes) -> tuple[float, float]:
    """When a certificate was made and when it ends, in seconds since 1970.

    Raises:
        SecurityError: it is no certificate.
    """
    certificate = _load(certificate_pem)
    return (
        certificate.not_valid_before_utc.timestamp() + BACKDATED_S,
        certificate.not_valid_after_utc.timestamp(),
    )


def renewal_due_s(made_s: float, ends_s: float) -> float:
    """When to ask for the next certificate: at two thirds of this one's life."""
    return made_s + (ends_s - made_s) * 2 / 3


def _load(certificate_pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate_pem)
    except ValueError as error:
        raise SecurityError(f"this is no certificate: {error}") from error


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _utc(at_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_s, datetime.timezone.utc)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
