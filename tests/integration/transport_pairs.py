"""Pairs of transports for tests, and what is sent over them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from edge_node.transport.base import MessageKey, MessageKind, Peer
from edge_node.transport.peer import PeerTransport
from plutino.types import JobId, Unit, UnitKind

STEP = Unit(UnitKind.TRAIN, 1)
NEXT_STEP = Unit(UnitKind.TRAIN, 2)
LOW, HIGH = Peer(0), Peer(1)


def forward(micro_batch: int, unit: Unit = STEP) -> MessageKey:
    return MessageKey(MessageKind.FORWARD, unit, micro_batch)


def backward(micro_batch: int, unit: Unit = STEP) -> MessageKey:
    return MessageKey(MessageKind.BACKWARD, unit, micro_batch)


def hidden_of(micro_batch: int, num_elements: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(micro_batch)
    return {"hidden": torch.randn(num_elements, generator=generator), "lengths": torch.tensor([micro_batch])}


def make_transport(own: Peer, **options: object) -> PeerTransport:
    return PeerTransport(JobId("job-1"), 1, own, **options)


def connect_all(transports: dict[Peer, PeerTransport], reach: dict[Peer, str] | None = None) -> None:
    addresses = {peer: transport.address for peer, transport in transports.items()} | (reach or {})
    with ThreadPoolExecutor(len(transports)) as executor:
        list(executor.map(lambda transport: transport.connect(addresses, timeout_s=10), transports.values()))
