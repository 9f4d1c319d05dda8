from __future__ import annotations

import importlib
import pkgutil

import pytest

import protos
from edge_node.transport import streams
from plutino.doctor import burst
from plutino.errors import SecurityError
from plutino.security.identity import PeerName, Role
from plutino.security.interceptors import check_call, nobody_is_revoked
from plutino.security.roles import METHOD_ROLES, OPEN_METHODS


def described_methods() -> set[str]:
    """Every method of every .proto file."""
    methods = set()
    for module in pkgutil.iter_modules(protos.__path__):
        if module.name.endswith("_pb2"):
            descriptor = importlib.import_module(f"protos.{module.name}").DESCRIPTOR
            for service in descriptor.services_by_name.values():
                methods |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    return methods


def context(caller: PeerName | None, version: bytes = b"TLSv1.3") -> dict[str, list[bytes]]:
    names = {} if caller is None else {"x509_subject_alternative_name": [caller.dns.encode()]}
    return {"ssl_tls_version": [version], **names}


def test_every_method_has_its_roles_and_every_entry_its_method():
    of_bytes = {f"/{streams._SERVICE}/{streams._METHOD}", f"/{burst.SERVICE}/Take", f"/{burst.SERVICE}/Give"}

    assert METHOD_ROLES.keys() | OPEN_METHODS == described_methods() | of_bytes
    assert not METHOD_ROLES.keys() & OPEN_METHODS
    assert all(roles for roles in METHOD_ROLES.values())


def test_only_joining_is_open():
    assert {"/plutino.v1.JoinService/Join"} == OPEN_METHODS


@pytest.mark.parametrize("method", sorted(METHOD_ROLES))
@pytest.mark.parametrize("role", Role)
def test_method_is_for_its_roles_alone(method, role):
    caller = PeerName("x", role)
    if role in METHOD_ROLES[method]:
        assert check_call(method, context(caller), nobody_is_revoked) == caller
    else:
        with pytest.raises(SecurityError, match="may not call"):
            check_call(method, context(caller), nobody_is_revoked)


@pytest.mark.parametrize("method", sorted(METHOD_ROLES))
def test_method_is_refused_without_certificate_without_tls13_and_to_the_revoked(method):
    caller = PeerName("x", min(METHOD_ROLES[method]))
    for auth_context in (context(None), {}, context(caller, b"TLSv1.2"), {**context(caller), "ssl_tls_version": []}):
        with pytest.raises(SecurityError):
            check_call(method, auth_context, nobody_is_revoked)
    with pytest.raises(SecurityError, match="revoked"):
        check_call(method, context(caller), lambda asked: asked == caller)


def test_method_that_the_table_does_not_name_is_refused_to_all():
    for role in Role:
        with pytest.raises(SecurityError, match="may not call"):
            check_call("/plutino.v1.NewService/New", context(PeerName("x", role)), nobody_is_revoked)


def test_certificate_with_two_names_is_refused():
    names = [PeerName(name, Role.PERSON).dns.encode() for name in ("x", "y")]
    auth_context = {"ssl_tls_version": [b"TLSv1.3"], "x509_subject_alternative_name": names}

    with pytest.raises(SecurityError, match="one name"):
        check_call("/plutino.v1.JobService/List", auth_context, nobody_is_revoked)
