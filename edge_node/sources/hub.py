"""Tensors straight from the hub, by byte ranges of the files at the job's commit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from edge_node.sources.base import SourceError, WantedTensor
from plutino.hub import HubClient, HubError
from plutino.hub_id import HubId
from plutino.manifest import HubOrigin


class HubSource:
    """Byte ranges of a hub model; one client, and so one connection, per thread.

    Args:
        origin: where on the hub the model lies.
        make_client: builds a client.
    """

    name = "hub"

    def __init__(self, origin: HubOrigin, *, make_client: Callable[[], HubClient] = HubClient) -> None:
        self._hub_id = HubId(origin.repository, origin.commit)
        self._make_client = make_client
        self._local = threading.local()
        self._clients: list[HubClient] = []

    def holds(self, wanted: WantedTensor) -> bool:
        """Always."""
        return True

    def stream(self, wanted: WantedTensor, offset: int) -> Iterator[bytes]:
        """See :class:`edge_node.sources.base.ByteSource`."""
        entry = wanted.entry
        try:
            yield from self._client().stream(self._hub_id, entry.file, entry.start + offset, entry.end)
        except HubError as error:
            raise SourceError(f"the hub: {error}", is_lost=error.is_final or error.is_silent) from error

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.close()

    def _client(self) -> HubClient:
        client: HubClient | None = getattr(self._local, "client", None)
        if client is None:
            client = self._local.client = self._make_client()
            self._clients.append(client)
        return client
