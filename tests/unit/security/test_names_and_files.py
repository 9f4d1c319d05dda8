from __future__ import annotations

import os
from pathlib import Path

import pytest

from plutino.errors import SecurityError
from plutino.security.certificates import Authority
from plutino.security.identity import COORDINATOR, Identity, PeerName, Role
from plutino.security.tls import Credentials


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.open(tmp_path_factory.mktemp("authority") / "authority.pem")


@pytest.mark.parametrize("role", Role)
def test_name_of_every_role_is_read_back_from_its_certificate_text(role):
    name = PeerName("4f2a", role)

    assert PeerName.parse(name.dns) == name


@pytest.mark.parametrize(
    "dns",
    ["", "a", "a.node", "a.king.plutino", "a.node.example.org", "a.b.node.plutino", ".node.plutino", "*.x"],
)
def test_name_of_another_system_or_shape_is_refused(dns):
    with pytest.raises(SecurityError):
        PeerName.parse(dns)


def test_identity_file_is_for_its_owner_alone_and_read_back_whole(authority, tmp_path):
    identity = authority.identity(COORDINATOR)
    path = tmp_path / "deep" / "identity.pem"

    identity.write(path)

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert Identity.read(path) == identity
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.pem"]


def test_identity_that_others_may_read_is_refused_with_the_command_that_mends_it(authority, tmp_path):
    path = tmp_path / "identity.pem"
    authority.identity(COORDINATOR).write(path)
    path.chmod(0o644)

    with pytest.raises(SecurityError, match="chmod 600"):
        Identity.read(path)


@pytest.mark.parametrize("keep", ["none", "half", "key only"])
def test_damaged_identity_is_refused(authority, tmp_path, keep):
    path = tmp_path / "identity.pem"
    identity = authority.identity(COORDINATOR)
    identity.write(path)
    content = {"none": b"", "half": path.read_bytes()[:700], "key only": identity.key_pem}[keep]
    path.write_bytes(content)

    with pytest.raises(SecurityError, match="damaged"):
        Identity.read(path)


def test_private_key_shows_in_no_representation(authority):
    identity = authority.identity(COORDINATOR)

    assert "PRIVATE" not in repr(identity)
    assert identity.key_pem.decode().splitlines()[1] not in f"{identity!r} {identity}"


def test_credentials_follow_the_file_and_count_its_renewals(authority, tmp_path):
    path = tmp_path / "identity.pem"
    first, second = authority.identity(COORDINATOR), authority.identity(COORDINATOR)
    first.write(path)
    credentials = Credentials(path)
    assert (credentials.identity(), credentials.version) == (first, 1)

    second.write(path)

    assert (credentials.version, credentials.identity()) == (2, second)
    assert credentials.version == 2


def test_credentials_whose_file_is_lost_go_on_with_what_they_had_and_say_so(authority, tmp_path, caplog):
    path = tmp_path / "identity.pem"
    identity = authority.identity(COORDINATOR)
    identity.write(path)
    credentials = Credentials(path)
    os.unlink(path)

    assert credentials.identity() == identity
    assert str(path) in caplog.text


def test_authority_is_kept_over_a_restart_and_refused_when_others_may_read_it(tmp_path: Path):
    path = tmp_path / "authority.pem"
    first = Authority.open(path)

    assert Authority.open(path).fingerprint == first.fingerprint
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(SecurityError, match="chmod 600"):
        Authority.open(path)
