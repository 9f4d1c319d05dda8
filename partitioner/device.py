"""What the planner knows of a device: its budget and measured seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import model_validator

from partitioner.values import PlanValue
from plutino.job.method import MethodConfig
from plutino.job.model import PLAIN, Packing


class ProfileRequest(PlanValue):
    """What a device is asked to measure: one block, the embedding and the head, at the job's real shape."""

    config_json: str
    """The model's config.json."""
    dtype: str
    packing: Packing = PLAIN
    """How the job's frozen weights are held: unpacking them takes time too."""
    micro_batch_rows: int
    row_tokens: int
    source_tokens: int = 0
    """Of an encoder-decoder's longest source; 0: of a whole row's length."""
    label_tokens: int
    method: MethodConfig
    """As its ``for_profile`` gives it."""
    threads: int
    recomputes: bool = False
    """The plan may let blocks recompute, so that their backward pass is measured that way as well."""
    scales: bool = False
    """The plan may choose micro-batches of other rows, so that blocks and head are measured with one row as well."""
    is_tight: bool = False
    """Its budget, or that of a device that measures beside it, may have no room for a heap that malloc keeps, so that
    blocks are measured without one as well."""
    beside: tuple[int, ...] = ()
    """Threads of each of the other devices of the host that measure the same meanwhile; empty: it measures alone."""
    attempt: int = 0
    """Which of several measurements of the same this is: they are taken in turns with other devices."""
    is_fresh: bool = False
    """An answer that the device has kept does not do: it measures."""


_ONE_ROW = "one_row_"


class BlockSeconds(NamedTuple):
    """Seconds of one block for one micro-batch."""

    forward_s: float
    backward_s: float
    """Without recomputation."""
    recompute_s: float
    """What recomputing adds to the backward pass."""

    @property
    def both_ways_s(self) -> float:
        """Forward and backward, nothing recomputed."""
        return self.forward_s + self.backward_s


class BlockTimings(PlanValue):
    """Measured seconds for one micro-batch.

    A block of an encoder-decoder's decoder has seconds of its own, because a target is shorter than its source; those
    without ``decoder`` in their names are its encoder's then, and every block's of any other model.
    """

    forward_s: float
    """One block, forward, with its adapters."""
    backward_s: float
    """One block, backward, without recomputation."""
    embedding_s: float
    head_forward_s: float
    """Final norm, head and loss."""
    head_backward_s: float
    recomputed_backward_s: float | None = None
    """One block, backward, its recomputation included; None: nobody asked for it."""
    decoder_forward_s: float | None = None
    """One block of a decoder that has an encoder; None: it is priced as any other block."""
    decoder_backward_s: float | None = None
    decoder_recomputed_backward_s: float | None = None
    one_row_forward_s: float | None = None
    """One block, forward, for a micro-batch of one row: much of it is there however few tokens there are. None: nobody
    asked for it, as for those below."""
    one_row_backward_s: float | None = None
    decoder_one_row_forward_s: float | None = None
    decoder_one_row_backward_s: float | None = None
    head_one_row_forward_s: float | None = None
    """Of a large vocabulary and few label tokens most is reading the weights, which costs the same for one row."""
    head_one_row_backward_s: float | None = None
    mapped_forward_s: float | None = None
    """One block, forward, where malloc gives back what is freed, for which a budget may have no room
    (:mod:`partitioner.heap`): its pages are faulted in anew. None: it takes no longer."""
    mapped_backward_s: float | None = None
    mapped_recomputed_backward_s: float | None = None
    mapped_decoder_forward_s: float | None = None
    mapped_decoder_backward_s: float | None = None
    mapped_decoder_recomputed_backward_s: float | None = None

    @model_validator(mode="after")
    def _has_whole_halves(self) -> BlockTimings:
        if (self.decoder_forward_s is None) != (self.decoder_backward_s is None):
            raise ValueError("give both decoder_forward_s and decoder_backward_s, or neither")
        return self

    @property
    def block(self) -> BlockSeconds:
        """One block; of an encoder-decoder one of the encoder."""
        return _block_seconds(self.forward_s, self.backward_s, self.recomputed_backward_s)

    @property
    def decoder_block(self) -> BlockSeconds:
        """One block of a decoder; where no encoder's was measured beside it, any block."""
        if self.decoder_forward_s is None or self.decoder_backward_s is None:
            return self.block
        return _block_seconds(self.decoder_forward_s, self.decoder_backward_s, self.decoder_recomputed_backward_s)

    @property
    def all_s(self) -> dict[str, float]:
        """What was measured, by the fields' names."""
        return self.model_dump(exclude_none=True)

    @property
    def known_s(self) -> dict[str, float]:
        """What was measured with the rows that were asked about, by the fields' names."""
        return {name: seconds for name, seconds in self.all_s.items() if _ONE_ROW not in name}

    @property
    def one_row_s(self) -> dict[str, float]:
        """What was measured with one row, by the names of what it is with the rows that were asked about."""
        return {name.replace(_ONE_ROW, ""): seconds for name, seconds in self.all_s.items() if _ONE_ROW in name}

    @property
    def mapped(self) -> BlockTimings:
        """As in a worker whose malloc gives back what is freed."""
        prefix = "mapped_"
        found = {name.removeprefix(prefix): s for name, s in self.known_s.items() if name.startswith(prefix)}
        return self.model_copy(update=found)

    def times(self, factor: float) -> BlockTimings:
        """As on a device that takes so many times as long."""
        return BlockTimings(**{name: seconds * factor for name, seconds in self.all_s.items()})

    def fastest(self, other: BlockTimings) -> BlockTimings:
        """The faster of two measurements, part by part: what disturbs one makes it slower, never faster."""
        one, two = self.all_s, other.all_s
        return BlockTimings(**{name: min(one.get(name, s), two.get(name, s)) for name, s in (one | two).items()})


def _block_seconds(forward_s: float, backward_s: float, recomputed_backward_s: float | None) -> BlockSeconds:
    """Where recomputing was not measured it takes a forward pass."""
    # Passes that are measured apart may come out the other way round where both are short.
    recompute_s = forward_s if recomputed_backward_s is None else max(0.0, recomputed_backward_s - backward_s)
    return BlockSeconds(forward_s, backward_s, recompute_s)


class DeviceProfile(PlanValue):
    """One agent, as the planner sees it."""

    agent_id: str
    name: str
    host_id: str
    """Devices with the same host id share their link (memory) and their cores."""
    threads: int
    available_bytes: int
    """Resident memory that a new worker may take on this device, baseline included."""
    baseline_bytes: int
    """Resident memory of a worker before any job."""
    timings: BlockTimings
    dtypes: tuple[str, ...] = ("fp32",)
    """Compute dtypes that it offers, fastest first."""
    slow_dtypes: tuple[tuple[str, float], ...] = ()
    """Dtypes that it keeps back, each with the factor over fp32's seconds."""
    is_card: bool = False
    """Its memory is a card's, which malloc has no part in."""
    remark: str = ""
    """Why a job may find it slower than its timings; empty: it measured as jobs will run."""
    cores_id: str = ""
    """Devices with the same one compute on the same cores, so that two of them are no faster than one; empty: its own
    cores alone."""


class LinkProfile(PlanValue):
    """A link between two devices, in either direction."""

    bandwidth_bytes_per_s: float = 125e6
    latency_s: float = 5e-4


class MeasuredLink(PlanValue):
    """The link between two agents, named in either order."""

    agent_ids: tuple[str, str]
    link: LinkProfile
    age_s: float | None = None
    """Seconds since it was measured; None for one that somebody gave."""


class LinkTable(PlanValue):
    """All links of a fleet: the measured ones, and what is assumed of the others."""

    measured: tuple[MeasuredLink, ...] = ()
    same_host: LinkProfile = LinkProfile(bandwidth_bytes_per_s=1e9, latency_s=3e-4)
    """One gRPC stream over loopback carries about 1 GB/s, and a small message takes 0.3 ms."""
    other: LinkProfile = LinkProfile()

    def between(self, one: DeviceProfile, other: DeviceProfile) -> LinkProfile:
        """The link between two devices."""
        return self.matrix((one, other))[0][1]

    def how_known(self, one: DeviceProfile, other: DeviceProfile) -> str:
        """Where the figures of the link between two devices come from."""
        host = "one host, " if one.host_id == other.host_id else ""
        pair = {one.agent_id, other.agent_id}
        found = next((entry for entry in self.measured if set(entry.agent_ids) == pair), None)
        if found is None:
            return f"{host}assumed"
        return f"{host}given" if found.age_s is None else f"{host}measured {found.age_s:.0f} s ago"

    def matrix(self, devices: Sequence[DeviceProfile]) -> list[list[LinkProfile]]:
        """The links between all devices; of two measurements of one pair the first counts."""
        measured = {frozenset(entry.agent_ids): entry.link for entry in reversed(self.measured)}
        return [
            [
                measured.get(frozenset((one.agent_id, other.agent_id)))
                or (self.same_host if one.host_id == other.host_id else self.other)
                for other in devices
            ]
            for one in devices
        ]
