from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from plutino.errors import ConfigError
from plutino.security.certificates import Authority, fingerprint, life, make_request, renewal_due_s
from plutino.security.identity import PeerName, Role

NODE = PeerName("4f2a", Role.NODE)
NOW_S = 1_800_000_000.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.open(tmp_path_factory.mktemp("authority") / "authority.pem", clock=lambda: NOW_S)


def names(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return extension.value.get_values_for_type(x509.DNSName)


def test_certificate_carries_the_name_that_the_coordinator_chose_not_the_requested_one(authority):
    key = ec.generate_private_key(ec.SECP256R1())
    wanted = x509.SubjectAlternativeName([x509.DNSName("coordinator.coordinator.plutino")])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "coordinator")]))
        .add_extension(wanted, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )

    signed = x509.load_pem_x509_certificate(authority.sign(request.public_bytes(serialization.Encoding.PEM), NODE))

    assert names(signed) == [NODE.dns]
    assert signed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert signed.public_key() == key.public_key()


def test_certificate_lives_as_long_as_said_and_is_due_at_two_thirds(authority):
    _, request = make_request()
    made_s, ends_s = life(authority.sign(request, NODE, lifetime_s=3600.0))

    assert (made_s, ends_s) == (NOW_S, NOW_S + 3600)
    assert renewal_due_s(made_s, ends_s) == NOW_S + 2400


@pytest.mark.parametrize("role", Role)
def test_only_roles_that_are_dialled_get_a_server_certificate(authority, role):
    certificate = x509.load_pem_x509_certificate(authority.identity(PeerName("x", role)).certificate_pem)
    usages = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert ExtendedKeyUsageOID.CLIENT_AUTH in usages
    assert (ExtendedKeyUsageOID.SERVER_AUTH in usages) == (role in (Role.COORDINATOR, Role.NODE))


def _rsa_request() -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def _request_signed_by_another_key() -> bytes:
    _, request = make_request()
    der = bytearray(x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "request_pem",
    [
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"x" * 100_000, id="too long"),
        pytest.param(lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", id="junk"),
        pytest.param(_rsa_request, id="another kind of key"),
        pytest.param(_request_signed_by_another_key, id="not signed by its key"),
    ],
)
def test_request_that_is_none_is_refused(authority, request_pem):
    with pytest.raises(ConfigError):
        authority.sign(request_pem(), NODE)


def test_fingerprint_is_of_the_certificate_not_of_its_text(authority):
    assert fingerprint(authority.ca_pem) == fingerprint(b"a comment\n" + authority.ca_pem) == authority.fingerprint
