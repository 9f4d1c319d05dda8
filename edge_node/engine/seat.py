"""A worker's seat in its pipeline: what those need to know of it who exchange messages for it around a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edge_node.stage.stage import Stage
from edge_node.transport.base import Peer, Transport
from plutino.job.assignment import StageShape


class Seat(Protocol):
    """Who sits there, among whom, with which blocks; :class:`edge_node.engine.executor.StageExecutor` is one."""

    @property
    def me(self) -> Peer:
        """This worker."""

    @property
    def stages(self) -> Sequence[StageShape]:
        """All stages of the plan."""

    @property
    def stage(self) -> Stage:
        """This worker's part of the model."""

    @property
    def transport(self) -> Transport:
        """The way to its peers; there is none where it has none."""
