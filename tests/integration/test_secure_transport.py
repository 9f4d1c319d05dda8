"""Data streams between workers over mutual TLS: whom a worker speaks to, and with which certificate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from edge_node.transport.base import MessageKey, MessageKind, Peer
from edge_node.transport.peer import PeerTransport
from edge_node.transport.streams import DialledStream
from plutino.errors import PeerLostError, SecurityError
from plutino.security.certificates import Authority
from plutino.security.identity import PeerName, Role
from plutino.security.tls import Credentials
from plutino.types import JobId, Unit, UnitKind
from plutino.wire.frames import AckFrame
from plutino.wire.messages import Ack, Origin, job_hash
from tests.integration.tcp_proxy import TcpProxy

JOB = JobId("job-1")
STEP = Unit(UnitKind.TRAIN, 1)
LOW, HIGH = Peer(0), Peer(1)
NODE_IDS = {LOW: "low", HIGH: "high"}


class Members:
    """Identity files of one authority."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = Authority.open(folder / "authority.pem")

    def issue(self, name: str, role: Role = Role.NODE) -> Credentials:
        """The credentials of a file, with a fresh certificate in it."""
        path = self._folder / f"{name}.pem"
        self._authority.identity(PeerName(name, role)).write(path)
        return Credentials(path)


@pytest.fixture
def members(tmp_path: Path) -> Members:
    return Members(tmp_path)


@pytest.fixture
def ends(members: Members) -> Iterator[dict[Peer, PeerTransport]]:
    transports = {
        peer: PeerTransport(JOB, 1, peer, credentials=members.issue(name), reconnect_s=2.0)
        for peer, name in NODE_IDS.items()
    }
    yield transports
    for transport in transports.values():
        transport.close()


def connect(
    ends: dict[Peer, PeerTransport],
    *,
    reach: dict[Peer, str] | None = None,
    timeout_s: float = 10.0,
    **node_ids: dict[Peer, str],
) -> dict[Peer, Exception]:
    """Connect all; what each of them raised."""
    addresses = {peer: transport.address for peer, transport in ends.items()} | (reach or {})
    failures: dict[Peer, Exception] = {}

    def work(peer: Peer, transport: PeerTransport) -> None:
        try:
            transport.connect(addresses, node_ids=node_ids.get(NODE_IDS[peer], NODE_IDS), timeout_s=timeout_s)
        except Exception as error:
            failures[peer] = error

    threads = [threading.Thread(target=work, args=item) for item in ends.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return failures


def exchange(ends: dict[Peer, PeerTransport], micro_batch: int) -> None:
    """One message each way, whole."""
    hidden = torch.randn(3000, generator=torch.Generator().manual_seed(micro_batch))
    for source, sink, kind in ((LOW, HIGH, MessageKind.FORWARD), (HIGH, LOW, MessageKind.BACKWARD)):
        key = MessageKey(kind, STEP, micro_batch)
        ends[source].send(sink, key, {"hidden": hidden})
        assert torch.equal(ends[sink].receive(source, key)["hidden"], hidden)


def hello_of(peer: Peer) -> AckFrame:
    return AckFrame(Origin(job_hash(JOB), 1, peer.stage_index, peer.replica_index), Ack(0, 8))


def opened(address: str, credentials: Credentials | None, peer_name: str = "high") -> grpc.RpcError:
    """What comes of a stranger's stream that claims to be the lower stage."""
    stream = DialledStream(address, hello_of(LOW), credentials, PeerName(peer_name, Role.NODE))
    stream.open(iter(()))
    try:
        with pytest.raises(grpc.RpcError) as refused:
            stream.peer_hello()
    finally:
        stream.cancel()
    return refused.value


def test_workers_of_the_named_devices_exchange_tensors(ends):
    assert connect(ends) == {}
    for micro_batch in range(4):
        exchange(ends, micro_batch)


def test_third_member_cannot_open_a_stream_of_the_plan(ends, members):
    assert connect(ends) == {}
    before = ends[HIGH].usage.received_bytes

    refused = opened(ends[HIGH].address, members.issue("third"))

    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "node low" in refused.details() and "node third" in refused.details()
    assert ends[HIGH].usage.received_bytes == before
    exchange(ends, 0)


def test_stream_in_plain_of_another_role_or_of_another_authority_is_refused(ends, members, tmp_path):
    assert connect(ends) == {}
    (tmp_path / "other").mkdir()
    stranger = Members(tmp_path / "other").issue("low")

    assert opened(ends[HIGH].address, None).code() is grpc.StatusCode.UNAVAILABLE
    assert opened(ends[HIGH].address, stranger).code() is grpc.StatusCode.UNAVAILABLE
    for role in set(Role) - {Role.NODE}:
        assert opened(ends[HIGH].address, members.issue("low", role)).code() is grpc.StatusCode.PERMISSION_DENIED
    exchange(ends, 0)


def test_dialler_refuses_a_listener_that_is_not_the_device_of_the_plan(ends):
    failures = connect(ends, timeout_s=1.0, low={LOW: "low", HIGH: "elsewhere"})

    assert isinstance(failures[LOW], PeerLostError)
    assert isinstance(failures[HIGH], PeerLostError)


def test_plan_without_the_devices_names_is_refused_before_anything_is_dialled(ends):
    with pytest.raises(SecurityError, match="names no device for stage 1"):
        ends[LOW].connect({HIGH: ends[HIGH].address}, timeout_s=1.0)


def test_stream_that_breaks_comes_back_under_the_renewed_certificates_and_loses_nothing(ends, members):
    proxy = TcpProxy(ends[HIGH].address)
    assert connect(ends, reach={HIGH: proxy.address}) == {}
    for rotation in range(20):
        exchange(ends, 2 * rotation)
        for name in NODE_IDS.values():
            members.issue(name)
        if rotation % 5 == 0:
            proxy.cut()
        exchange(ends, 2 * rotation + 1)

    assert proxy.num_connections == 5
    proxy.close()


def test_advertised_host_is_what_peers_are_told(members):
    with PeerTransport(JOB, 1, LOW, credentials=members.issue("low"), advertised_host="192.0.2.9") as transport:
        assert transport.address.startswith("192.0.2.9:")
