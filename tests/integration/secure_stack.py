"""A coordinator with TLS and its members, and every call that its services know."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

import grpc

import protos
from coordinator.security.warden import SECURITY_DIR
from edge_node.cache import BlobCache
from edge_node.cache_server import CacheServer
from edge_node.joining import Membership, join
from edge_node.network import DeviceNetwork
from plutino.client import Client
from plutino.security.certificates import Authority
from plutino.security.identity import COORDINATOR, Identity, PeerName, Role
from plutino.security.tls import Credentials, Newcomer
from plutino.security.tokens import JoinToken
from plutino.wire.channel import Lane, sync_channel
from tests.integration.stack import ThreadCoordinator

CALL_S = 10.0
DAY_S = 86400.0
PORTS = {
    "AgentService": "devices",
    "WorkerService": "devices",
    "CertificateService": "devices",
    "JobService": "people",
    "Llm2LlmService": "people",
    "RunnerService": "people",
    "SecurityService": "people",
    "SweepService": "people",
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


class SecureStack:
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
