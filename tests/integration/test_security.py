"""Every call of every service, over real TLS: who may make it, and that nobody else may."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import grpc
import pytest

from coordinator.security.warden import SECURITY_DIR
from plutino.security.certificates import Authority
from plutino.security.identity import Identity, PeerName, Role
from plutino.security.roles import METHOD_ROLES, OPEN_METHODS
from plutino.security.tls import Credentials, Newcomer
from plutino.wire.channel import Lane, sync_channel
from protos import agents_pb2, agents_pb2_grpc
from tests.integration.secure_stack import CALL_S, DAY_S, METHODS, SecureStack


def outcomes(secure_stack: SecureStack, dial: Callable[[str], grpc.Channel]) -> dict[str, grpc.StatusCode]:
    """What comes of every method, called over one channel a port."""
    with ExitStack() as channels:
        by_port = {port: channels.enter_context(dial(port)) for port in secure_stack.addresses}
        return {method.name: method.call(by_port[method.port]) for method in METHODS}


def test_every_call_in_plain_is_refused(secure_stack):
    found = outcomes(secure_stack, lambda port: secure_stack.dial(port, None))

    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


def test_every_call_but_joining_is_refused_without_a_certificate(secure_stack):
    newcomer = Newcomer(secure_stack.authority.ca_pem)
    found = outcomes(secure_stack, lambda port: secure_stack.dial(port, newcomer))

    # Joining got as far as being told that its empty request is none.
    assert found.pop("/plutino.v1.JoinService/Join") is grpc.StatusCode.INVALID_ARGUMENT
    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("role", Role)
def test_every_call_with_a_certificate_of_another_authority_is_refused(secure_stack, stranger, role):
    """Self-signed from where the coordinator stands: an authority that it does not know."""
    foreign = stranger.identity(PeerName("x", role))
    credentials = secure_stack.credentials(
        Identity(foreign.key_pem, foreign.certificate_pem, secure_stack.authority.ca_pem)
    )
    found = outcomes(secure_stack, lambda port: secure_stack.dial(port, credentials))

    # The joining port asks for no certificate, so it does not look at this one either.
    assert found.pop("/plutino.v1.JoinService/Join") is grpc.StatusCode.INVALID_ARGUMENT
    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


def test_every_call_with_an_expired_certificate_is_refused(secure_stack):
    long_ago = Authority.open(
        secure_stack.state_dir / SECURITY_DIR / "authority.pem", clock=lambda: time.time() - 2 * DAY_S
    )
    for role in Role:
        credentials = secure_stack.credentials(long_ago.identity(PeerName("x", role)))
        found = outcomes(secure_stack, lambda port, by=credentials: secure_stack.dial(port, by))

        assert found.pop("/plutino.v1.JoinService/Join") is grpc.StatusCode.INVALID_ARGUMENT
        assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("role", Role)
def test_every_call_is_refused_to_every_role_that_it_is_not_for(secure_stack, role):
    credentials = secure_stack.of_role(role)
    found = outcomes(secure_stack, lambda port: secure_stack.dial(port, credentials))

    for method, code in found.items():
        if method in OPEN_METHODS:
            assert code is grpc.StatusCode.INVALID_ARGUMENT, "told that its empty request is none"
        elif role not in METHOD_ROLES[method]:
            assert code is grpc.StatusCode.PERMISSION_DENIED, method
        else:
            assert code not in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE), method


def test_every_call_is_refused_to_a_device_that_never_joined_although_its_certificate_is_ours(secure_stack):
    credentials = secure_stack.credentials(secure_stack.authority.identity(PeerName("never-joined", Role.NODE)))
    found = outcomes(secure_stack, lambda port: secure_stack.dial(port, credentials))

    assert found.pop("/plutino.v1.JoinService/Join") is grpc.StatusCode.INVALID_ARGUMENT
    # Devices know their authority and not its members: a certificate of it is one of a device to them.
    of_devices = {method.name: found.pop(method.name) for method in METHODS if method.port == "cache"}
    assert set(of_devices.values()) == {grpc.StatusCode.INVALID_ARGUMENT}
    assert set(found.values()) == {grpc.StatusCode.PERMISSION_DENIED}


def test_every_port_is_refused_by_callers_if_it_shows_another_name(secure_stack):
    credentials = secure_stack.of_role(Role.PERSON)
    other = PeerName("somebody", Role.COORDINATOR)
    found = outcomes(
        secure_stack, lambda port: sync_channel(secure_stack.addresses[port], Lane.CONTROL, credentials, peer=other)
    )

    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


def test_agent_cannot_speak_for_another_device(secure_stack):
    mine, other = secure_stack.member("mine"), secure_stack.member("other")
    hello = agents_pb2.AgentEvent(hello=agents_pb2.AgentHello(agent_id=other.node_id, name="other"))

    channel = sync_channel(mine.devices_address, Lane.CONTROL, Credentials(mine.identity))
    with channel, pytest.raises(grpc.RpcError) as refused:
        list(agents_pb2_grpc.AgentServiceStub(channel).Attach(iter((hello,)), timeout=CALL_S))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert mine.node_id in refused.value.details() and other.node_id in refused.value.details()
