"""Who gets in and who does not, over real TLS: joining, every call of every service, revocation, renewal."""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

import protos
from coordinator.security.warden import SECURITY_DIR
from edge_node.cache import BlobCache
from edge_node.cache_server import CacheServer
from edge_node.joining import Membership, Renewal, join, presented_authority
from edge_node.network import DeviceNetwork
from plutino.client import Client
from plutino.errors import ConfigError, SecurityError, UnreachableError
from plutino.security.certificates import Authority, make_request
from plutino.security.identity import COORDINATOR, Identity, PeerName, Role
from plutino.security.roles import METHOD_ROLES, OPEN_METHODS
from plutino.security.tls import Credentials, Newcomer
from plutino.security.tokens import JoinToken
from plutino.wire.channel import Lane, sync_channel
from protos import agents_pb2, agents_pb2_grpc, security_pb2, security_pb2_grpc
from tests.integration.stack import ThreadAgent, ThreadCoordinator, wait_until
from tests.integration.tls_proxy import TlsProxy

CALL_S = 10.0
DAY_S = 86400.0
PORTS = {
    "AgentService": "devices",
    "WorkerService": "devices",
    "CertificateService": "devices",
    "JobService": "people",
    "RunnerService": "people",
    "SecurityService": "people",
    "BulkService": "bulk",
    "DoctorService": "devices",
    "CacheService": "cache",
    "JoinService": "join",
}
"""Which port serves a service; a new one has to be added here."""


@dataclass(frozen=True)
class Method:
    name: str
    port: str
    is_request_stream: bool
    is_response_stream: bool

    def call(self, channel: grpc.Channel) -> grpc.StatusCode:
        """Call it with an empty message; what comes of it."""
        kind = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }[self.is_request_stream, self.is_response_stream]
        try:
            answer = kind(self.name)(iter((b"",)) if self.is_request_stream else b"", timeout=CALL_S)
            if self.is_response_stream:
                list(answer)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def described_methods() -> list[Method]:
    methods = []
    for module in pkgutil.iter_modules(protos.__path__):
        if module.name.endswith("_pb2"):
            descriptor = importlib.import_module(f"protos.{module.name}").DESCRIPTOR
            for service in descriptor.services_by_name.values():
                for method in service.methods:
                    name = f"/{service.full_name}/{method.name}"
                    methods.append(Method(name, PORTS[service.name], method.client_streaming, method.server_streaming))
    return methods


METHODS = described_methods()


class Stack:
    """A coordinator with TLS, and what a person and an attacker do to it."""

    def __init__(self, state_dir: Path, folder: Path) -> None:
        self.state_dir = state_dir
        self.folder = folder
        self.coordinator = ThreadCoordinator(state_dir, is_plaintext=False)
        self.client = Client.local(state_dir)
        endpoints = self.coordinator.endpoints
        self.addresses = {
            "devices": endpoints.devices_address,
            "people": endpoints.people_address,
            "bulk": endpoints.bulk_address,
            "join": endpoints.join_addresses[0],
        }
        self.authority = Authority.open(state_dir / SECURITY_DIR / "authority.pem")
        self._numbers = iter(range(1000))
        # The only service of a device that others dial, beside the data streams.
        host = self.member("host")
        network = DeviceNetwork.of_member(host.identity, host.devices_address)
        self.cache_server = CacheServer(BlobCache(folder / "cache", 1 << 20), network, lambda job_id: False)
        self.addresses["cache"] = self.cache_server.address
        self.names = {"cache": PeerName(host.node_id, Role.NODE)}

    def token(self, **settings: float) -> JoinToken:
        return JoinToken.decode(self.client.members.create_token(**settings).token)

    def member(self, name: str = "pi") -> Membership:
        folder = self.folder / f"{name}-{next(self._numbers)}"
        folder.mkdir(parents=True)
        return join(self.token(), name, folder)

    def credentials(self, identity: Identity) -> Credentials:
        path = self.folder / f"identity-{next(self._numbers)}.pem"
        identity.write(path)
        return Credentials(path)

    def of_role(self, role: Role) -> Credentials:
        """Credentials that the coordinator itself would issue to such a member."""
        if role is Role.NODE:
            return Credentials(self.member().identity)
        return self.credentials(self.authority.identity(PeerName("x", role)))

    def dial(self, port: str, credentials: Credentials | Newcomer | None) -> grpc.Channel:
        peer = self.names.get(port, COORDINATOR)
        return sync_channel(self.addresses[port], Lane.CONTROL, credentials, peer=peer)

    def close(self) -> None:
        self.cache_server.close()
        self.client.close()
        self.coordinator.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("members"))
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another plutino's authority."""
    return Authority.open(tmp_path_factory.mktemp("stranger") / "authority.pem")


# ---- every call ----


def outcomes(stack: Stack, dial: Callable[[str], grpc.Channel]) -> dict[str, grpc.StatusCode]:
    """What comes of every method, called over one channel a port."""
    with ExitStack() as channels:
        by_port = {port: channels.enter_context(dial(port)) for port in stack.addresses}
        return {method.name: method.call(by_port[method.port]) for method in METHODS}


def test_every_call_in_plain_is_refused(stack):
    found = outcomes(stack, lambda port: stack.dial(port, None))

    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


def test_every_call_but_joining_is_refused_without_a_certificate(stack):
    newcomer = Newcomer(stack.authority.ca_pem)
    found = outcomes(stack, lambda port: stack.dial(port, newcomer))

    # Joining got as far as being told that its empty request is none.
    assert found.pop("/plutino.v1.JoinService/Join") is grpc.StatusCode.INVALID_ARGUMENT
    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("role", Role)
def test_every_call_with_a_certificate_of_another_authority_is_refused(stack, stranger, role):
    """Self-signed from where the coordinator stands: an authority that it does not know."""
    foreign = stranger.identity(PeerName("x", role))
    credentials = stack.credentials(Identity(foreign.key_pem, foreign.certificate_pem, stack.authority.ca_pem))
    found = outcomes(stack, lambda port: stack.dial(port, credentials))

    # The joining port asks for no certificate, so it does not look at this one either.
    assert found.pop("/plutino.v1.JoinService/Join") is grpc.StatusCode.INVALID_ARGUMENT
    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


def test_every_call_with_an_expired_certificate_is_refused(stack):
    long_ago = Authority.open(stack.state_dir / SECURITY_DIR / "authority.pem", clock=lambda: time.time() - 2 * DAY_S)
    for role in Role:
        credentials = stack.credentials(long_ago.identity(PeerName("x", role)))
        found = outcomes(stack, lambda port, by=credentials: stack.dial(port, by))

        assert found.pop("/plutino.v1.JoinService/Join") is grpc.StatusCode.INVALID_ARGUMENT
        assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("role", Role)
def test_every_call_is_refused_to_every_role_that_it_is_not_for(stack, role):
    credentials = stack.of_role(role)
    found = outcomes(stack, lambda port: stack.dial(port, credentials))

    for method, code in found.items():
        if method in OPEN_METHODS:
            assert code is grpc.StatusCode.INVALID_ARGUMENT, "told that its empty request is none"
        elif role not in METHOD_ROLES[method]:
            assert code is grpc.StatusCode.PERMISSION_DENIED, method
        else:
            assert code not in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE), method


def test_every_call_is_refused_to_a_device_that_never_joined_although_its_certificate_is_ours(stack):
    credentials = stack.credentials(stack.authority.identity(PeerName("never-joined", Role.NODE)))
    found = outcomes(stack, lambda port: stack.dial(port, credentials))

    assert found.pop("/plutino.v1.JoinService/Join") is grpc.StatusCode.INVALID_ARGUMENT
    # Devices know their authority and not its members: a certificate of it is one of a device to them.
    of_devices = {method.name: found.pop(method.name) for method in METHODS if method.port == "cache"}
    assert set(of_devices.values()) == {grpc.StatusCode.INVALID_ARGUMENT}
    assert set(found.values()) == {grpc.StatusCode.PERMISSION_DENIED}


def test_every_port_is_refused_by_callers_if_it_shows_another_name(stack):
    credentials = stack.of_role(Role.PERSON)
    other = PeerName("somebody", Role.COORDINATOR)
    found = outcomes(stack, lambda port: sync_channel(stack.addresses[port], Lane.CONTROL, credentials, peer=other))

    assert set(found.values()) == {grpc.StatusCode.UNAVAILABLE}


def test_agent_cannot_speak_for_another_device(stack):
    mine, other = stack.member("mine"), stack.member("other")
    hello = agents_pb2.AgentEvent(hello=agents_pb2.AgentHello(agent_id=other.node_id, name="other"))

    channel = sync_channel(mine.devices_address, Lane.CONTROL, Credentials(mine.identity))
    with channel, pytest.raises(grpc.RpcError) as refused:
        list(agents_pb2_grpc.AgentServiceStub(channel).Attach(iter((hello,)), timeout=CALL_S))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert mine.node_id in refused.value.details() and other.node_id in refused.value.details()


# ---- joining ----


def test_device_joins_with_a_key_of_its_own_under_the_id_that_the_coordinator_chose(stack):
    membership = stack.member("pi")

    assert Membership.read(membership.identity.parent) == membership
    assert membership.devices_address == stack.addresses["devices"]
    assert membership.identity.stat().st_mode & 0o777 == 0o600
    audit = stack.client.members.audit()[-1]
    assert (audit.event, audit.subject, json.loads(audit.detail)) == ("joined", membership.node_id, {"name": "pi"})


def test_fifty_racing_joins_on_one_token_give_exactly_one_certificate(stack):
    token = stack.token()
    start = threading.Barrier(50)

    def race(number: int) -> bytes | None:
        _, request = make_request()
        with sync_channel(token.addresses[0], Lane.CONTROL, Newcomer(stack.authority.ca_pem)) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
            start.wait(30)
            try:
                response = security_pb2_grpc.JoinServiceStub(channel).Join(
                    security_pb2.JoinRequest(
                        token_id=token.token_id, secret=token.secret, name=f"racer{number}", certificate_request=request
                    ),
                    timeout=30,
                )
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED, error
                return None
            return response.certificate

    with ThreadPoolExecutor(50) as racers:
        certificates = [won for won in racers.map(race, range(50)) if won is not None]

    assert len(certificates) == 1
    (record,) = (found for found in stack.client.members.tokens() if found.token_id == token.token_id)
    assert (record.state, record.uses_left) == ("used up", 0)


def test_man_in_the_middle_of_another_authority_hears_no_word(stack, stranger, tmp_path):
    proxy = TlsProxy(stack.addresses["join"], stranger.identity(COORDINATOR), tmp_path)
    token = stack.token()
    lured = JoinToken((proxy.address,), token.fingerprint, token.token_id, token.secret)

    with pytest.raises(SecurityError, match=r"shows another authority.*Nothing secret was sent"):
        join(lured, "pi", tmp_path)
    proxy.close()

    assert (proxy.num_stepped_in, proxy.heard) == (1, b"")
    assert join(token, "pi", tmp_path).node_id, "the token is still good"


def test_man_in_the_middle_that_steps_in_after_the_first_look_hears_no_word(stack, stranger, tmp_path):
    proxy = TlsProxy(stack.addresses["join"], stranger.identity(COORDINATOR), tmp_path, num_passed=1)
    token = stack.token()
    lured = JoinToken((proxy.address,), token.fingerprint, token.token_id, token.secret)

    with pytest.raises((SecurityError, UnreachableError)):
        join(lured, "pi", tmp_path)
    proxy.close()

    assert proxy.num_stepped_in >= 1
    assert proxy.heard == b""
    assert join(token, "pi", tmp_path).node_id, "the token is still good"


def test_man_in_the_middle_with_our_own_devices_certificate_hears_no_word(stack, tmp_path):
    """A member is no coordinator: its certificate is of the right authority, under the wrong name."""
    member = Identity.read(stack.member().identity)
    proxy = TlsProxy(stack.addresses["join"], member, tmp_path)
    token = stack.token()
    lured = JoinToken((proxy.address,), token.fingerprint, token.token_id, token.secret)

    with pytest.raises((SecurityError, UnreachableError)):
        join(lured, "pi", tmp_path)
    proxy.close()

    assert proxy.num_stepped_in >= 2
    assert proxy.heard == b""


def test_join_goes_on_to_the_next_address_of_the_token(stack, stranger, tmp_path):
    token = stack.token()
    proxy = TlsProxy(stack.addresses["join"], stranger.identity(COORDINATOR), tmp_path)
    many = JoinToken(("127.0.0.1:1", proxy.address, *token.addresses), token.fingerprint, token.token_id, token.secret)

    assert join(many, "pi", tmp_path).devices_address == stack.addresses["devices"]
    proxy.close()


def test_join_where_nobody_listens_says_so(tmp_path):
    nowhere = JoinToken(("127.0.0.1:1",), bytes(32), "0" * 12, bytes(32))

    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
        join(nowhere, "pi", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_join_with_a_clock_that_is_days_off_is_told(stack, tmp_path):
    with pytest.raises(SecurityError, match=r"clock is 72\.0 h behind"):
        join(stack.token(), "pi", tmp_path, clock=lambda: time.time() - 3 * DAY_S)


def test_token_that_a_person_revoked_lets_nobody_in(stack, tmp_path):
    token = stack.token(uses=5)
    stack.client.members.revoke_token(token.token_id[:10])

    with pytest.raises(SecurityError, match="revoked"):
        join(token, "pi", tmp_path)


def test_token_with_bounds_that_are_not_allowed_is_refused(stack):
    for settings in ({"uses": 100_000}, {"ttl_s": 1e9}):
        with pytest.raises(ConfigError, match="at most"):
            stack.client.members.create_token(**settings)


def test_shown_authority_is_that_of_the_state_folder(stack):
    assert presented_authority(stack.addresses["join"]) == stack.authority.ca_pem


# ---- staying in and being cut off ----


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as cleanup:
        yield cleanup


def attached(cleanup: ExitStack, stack: Stack, membership: Membership, name: str) -> ThreadAgent:
    agent = ThreadAgent(membership.devices_address, name, membership=membership)
    cleanup.callback(agent.close)
    wait_until(lambda: state_of(stack, membership) == "alive", f"{name} attaches")
    return agent


def state_of(stack: Stack, membership: Membership) -> str:
    found = {device["agent_id"]: device["state"] for device in stack.client.devices()}
    return found.get(membership.node_id, "")


def test_devices_shows_members_that_are_away_with_the_reason(stack):
    membership = stack.member("sleeper")
    (device,) = (device for device in stack.client.devices() if device["agent_id"] == membership.node_id)

    assert (device["name"], device["state"], device["links"]) == ("sleeper", "away", [])
    assert "has not attached" in device["reason"] and device["joined_at_s"] > 0


def test_revoked_device_is_cut_off_at_once_and_stays_out_after_a_restart(tmp_path, cleanup):
    first = Stack(tmp_path / "state", tmp_path)
    cleanup.callback(first.close)
    membership, other = first.member("lost-phone"), first.member("pi")
    agent, kept = (
        attached(cleanup, first, member, name) for member, name in ((membership, "lost-phone"), (other, "pi"))
    )
    bulk = sync_channel(first.addresses["bulk"], Lane.BULK, Credentials(membership.identity))

    assert first.client.members.revoke_device("lost-phone") == (membership.node_id, "lost-phone")

    wait_until(lambda: any(is_refusal(error) for error in agent.refusals), "the refusal")
    assert state_of(first, membership) == "revoked"
    manifest = next(method for method in METHODS if method.name.endswith("GetManifest"))
    assert manifest.call(bulk) is grpc.StatusCode.PERMISSION_DENIED
    assert not any(is_refusal(error) for error in kept.refusals), "the other device is not disturbed"
    with pytest.raises(SecurityError, match="revoked"):
        renew(membership)
    wait_until(lambda: kept.revoked_ids == [membership.node_id], "the other device hears of it")
    kept.revoked_ids.clear()
    bulk.close()
    first.close()

    again = Stack(tmp_path / "state", tmp_path / "again")
    cleanup.callback(again.close)
    wait_until(lambda: state_of(again, other) == "alive", "the other device comes back")
    wait_until(lambda: kept.revoked_ids == [membership.node_id], "the other device hears of it again")
    wait_until(lambda: is_refusal(agent.refusals[-1]), "the refusal after the restart")
    assert state_of(again, membership) == ""
    assert [row.subject for row in again.client.members.audit() if row.event == "device revoked"] == [
        membership.node_id
    ]


def is_refusal(error: grpc.RpcError) -> bool:
    return error.code() is grpc.StatusCode.PERMISSION_DENIED and "revoked" in error.details()


def test_devices_refuse_those_that_they_heard_are_revoked(stack, tmp_path):
    host, revoked = stack.member("host"), stack.member("revoked")
    network = DeviceNetwork.of_member(host.identity, host.devices_address)
    server = CacheServer(
        BlobCache(tmp_path, 1 << 20), network, lambda job_id: False, lambda caller: caller.name == revoked.node_id
    )
    holds = next(method for method in METHODS if method.name.endswith("Holds"))
    name = PeerName(host.node_id, Role.NODE)
    codes = []
    for member in (revoked, host):
        with sync_channel(server.address, Lane.BULK, Credentials(member.identity), peer=name) as channel:
            codes.append(holds.call(channel))
    server.close()

    assert codes == [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT]


def test_device_that_is_not_there_cannot_be_revoked(stack):
    with pytest.raises(ConfigError, match="no device 'nobody' is a member"):
        stack.client.members.revoke_device("nobody")


def renew(membership: Membership) -> None:
    import asyncio

    asyncio.run(Renewal(membership.devices_address, Credentials(membership.identity))._renew())


def test_renewed_certificate_has_a_fresh_key_and_the_same_name_and_works(stack, cleanup):
    membership = stack.member()
    before = Identity.read(membership.identity)

    renew(membership)

    after = Identity.read(membership.identity)
    assert after.key_pem != before.key_pem and after.certificate_pem != before.certificate_pem
    attached(cleanup, stack, membership, "pi")


# ---- what must not be told ----


def test_secrets_and_keys_are_in_no_log(stack, stranger, tmp_path, caplog, cleanup):
    caplog.set_level(logging.DEBUG)
    token = stack.token(uses=2)
    membership = join(token, "pi", tmp_path)
    renew(membership)
    agent = attached(cleanup, stack, membership, "pi")
    wrong = JoinToken(token.addresses, token.fingerprint, token.token_id, bytes(32))
    with pytest.raises(SecurityError, match="does not know this token"):
        join(wrong, "pi", tmp_path)
    stack.client.members.revoke_device(membership.node_id)
    wait_until(lambda: any(is_refusal(error) for error in agent.refusals), "the refusal")

    keys = [Identity.read(membership.identity).key_pem.decode().splitlines()[1]]
    secrets = [token.encode(), token.secret.hex(), repr(token.secret), *keys]
    told = caplog.text + "".join(repr(record.args) for record in caplog.records)
    assert membership.node_id in told, "the log was looked at"
    assert not [secret for secret in secrets if secret in told]
    for path in stack.state_dir.rglob("*"):
        if path.is_file() and path.name != "authority.pem":
            content = path.read_bytes()
            assert token.secret not in content and token.encode().encode() not in content, path
