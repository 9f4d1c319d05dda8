"""A fleet that does not exist yet, or not here: devices and links from a file, and changes to it in words.

Entry points: :class:`FleetFile` and :func:`changed`. Seconds that are not given follow from operations a second; what a
device really reaches is best taken from one that has measured itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from partitioner.block_operations import block_operations, decoder_block_operations
from partitioner.device import BlockTimings, DeviceProfile, LinkProfile, LinkTable, MeasuredLink
from partitioner.model import ModelTable
from partitioner.shape import JobShape
from partitioner.values import PlanValue
from plutino.errors import ConfigError
from plutino.sizes import format_size, parse_size

_BACKWARD_SHARE = 1.1
"""A backward pass through a frozen block computes the gradient of its input, and the adapters' own, which are small."""
_EMBEDDING_SHARE = 0.02
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(k|m|g|t)?bit(?:/s)?", re.IGNORECASE)
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


class FleetDevice(PlanValue):
    """One device, or several alike."""

    name: str
    memory: str
    """What a worker may take, baseline included: 8GiB."""
    flops: float | None = Field(None, gt=0)
    """Operations a second that it reaches in matrix products."""
    block_forward_s: float | None = Field(None, gt=0)
    """Measured seconds of one block's forward pass for one micro-batch, instead of ``flops``."""
    block_backward_s: float | None = Field(None, gt=0)
    decoder_block_forward_s: float | None = Field(None, gt=0)
    """Of a block of an encoder-decoder's decoder; the others are of its encoder's then. None: it takes as long."""
    decoder_block_backward_s: float | None = Field(None, gt=0)
    baseline: str = "350MiB"
    """What a worker takes before any job."""
    threads: int = Field(4, ge=1)
    host: str | None = None
    """Devices of one host share its memory bus and its cores; None: a host of its own."""
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    count: int = Field(1, ge=1, le=2000)

    @field_validator("memory", "baseline")
    @classmethod
    def _is_size(cls, text: str) -> str:
        parse_size(text)
        return text

    @model_validator(mode="after")
    def _has_speed(self) -> FleetDevice:
        if (self.flops is None) == (self.block_forward_s is None):
            raise ValueError(f"{self.name}: give flops or block_forward_s, one of the two")
        if self.decoder_block_forward_s is not None and self.block_forward_s is None:
            raise ValueError(
                f"{self.name}: decoder_block_forward_s goes with block_forward_s, which an encoder's block took"
            )
        if self.decoder_block_backward_s is not None and self.decoder_block_forward_s is None:
            raise ValueError(f"{self.name}: decoder_block_backward_s goes with decoder_block_forward_s; give both")
        return self

    @property
    def names(self) -> list[str]:
        """Of each device that this stands for."""
        return [self.name] if self.count == 1 else [f"{self.name}-{i}" for i in range(1, self.count + 1)]


class FleetLink(PlanValue):
    """The link between two devices by name."""

    between: tuple[str, str]
    rate: str
    """Such as 100Mbit or 2.5Gbit."""
    latency_ms: float = Field(0.5, ge=0)


class FleetFile(PlanValue):
    """A whole fleet."""

    devices: tuple[FleetDevice, ...] = Field(min_length=1)
    rate: str = "1Gbit"
    """Of every link that is not named."""
    latency_ms: float = Field(0.5, ge=0)
    links: tuple[FleetLink, ...] = ()

    @field_validator("rate")
    @classmethod
    def _is_rate(cls, text: str) -> str:
        parse_rate(text)
        return text

    @model_validator(mode="after")
    def _names(self) -> FleetFile:
        names = [name for device in self.devices for name in device.names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two devices are called {twice[0]}")
        for link in self.links:
            for name in link.between:
                if name not in names:
                    raise ValueError(f"links: no device is called {name}; there are {', '.join(names[:10])}")
        return self

    def profiles(self, table: ModelTable, shape: JobShape) -> tuple[DeviceProfile, ...]:
        """The devices as the planner sees them, for a job's micro-batch."""
        return tuple(_profile(device, name, table, shape) for device in self.devices for name in device.names)

    def link_table(self) -> LinkTable:
        """The links as the planner sees them."""
        return LinkTable(
            measured=tuple(
                MeasuredLink(agent_ids=link.between, link=_link(link.rate, link.latency_ms)) for link in self.links
            ),
            other=_link(self.rate, self.latency_ms),
        )


def parse_rate(text: str) -> float:
    """Bytes a second of a rate in bits: 100Mbit, 2.5Gbit.

    Raises:
        ConfigError: it is none.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is not a rate; write a number and a unit, such as 100Mbit or 1Gbit")
    return float(match[1]) * _FACTORS[(match[2] or "").lower()] / 8


def changed(
    devices: Sequence[DeviceProfile], links: LinkTable, change: str
) -> tuple[tuple[DeviceProfile, ...], LinkTable]:
    """The fleet with one thing changed.

    ``add 8GiB 2x``: one more device of so much memory, twice as fast as the median one; ``remove NAME``;
    ``memory NAME 4GiB``; ``rate 100Mbit``: of all links between hosts.

    Raises:
        ConfigError: none of these.
    """
    words = change.split()
    match words:
        case ["add", size, *rest] if len(rest) <= 1:
            speed = _speed(rest[0]) if rest else 1.0
            return (*devices, _added(devices, parse_size(size), speed)), links
        case ["remove", name]:
            _find(devices, name)
            return tuple(device for device in devices if device.name != name), links
        case ["memory", name, size]:
            found = _find(devices, name)
            more = found.model_copy(update={"available_bytes": parse_size(size)})
            return tuple(more if device.name == name else device for device in devices), links
        case ["rate", rate]:
            other = links.other.model_copy(update={"bandwidth_bytes_per_s": parse_rate(rate)})
            return tuple(devices), links.model_copy(update={"other": other, "measured": ()})
    raise ConfigError(
        f"--what-if {change!r} is not understood; write 'add 8GiB 2x', 'remove NAME', 'memory NAME 4GiB' or "
        "'rate 100Mbit'"
    )


def _added(devices: Sequence[DeviceProfile], size_bytes: int, speed: float) -> DeviceProfile:
    if not devices:
        raise ConfigError("--what-if add takes its seconds from the other devices, and there are none")
    typical = sorted(devices, key=lambda device: device.timings.forward_s)[len(devices) // 2]
    number = sum(device.agent_id.startswith("added-") for device in devices) + 1
    return typical.model_copy(
        update={
            "agent_id": f"added-{number}",
            "name": f"added {number} ({format_size(size_bytes)}, {speed:g}x)",
            "host_id": f"added-{number}",
            "available_bytes": size_bytes,
            "timings": typical.timings.times(1 / speed),
        }
    )


def _speed(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x", text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is not a speed; write 2x or 0.5x")
    return float(match[1])


def _find(devices: Sequence[DeviceProfile], name: str) -> DeviceProfile:
    found = next((device for device in devices if device.name == name), None)
    if found is None:
        raise ConfigError(f"no device is called {name!r}; there are {', '.join(d.name for d in devices[:20])}")
    return found


def _link(rate: str, latency_ms: float) -> LinkProfile:
    return LinkProfile(bandwidth_bytes_per_s=parse_rate(rate), latency_s=latency_ms / 1e3)


def _profile(device: FleetDevice, name: str, table: ModelTable, shape: JobShape) -> DeviceProfile:
    available_bytes, baseline_bytes = parse_size(device.memory), parse_size(device.baseline)
    if available_bytes <= baseline_bytes:
        raise ConfigError(
            f"{name} offers {format_size(available_bytes)}, a worker takes {format_size(baseline_bytes)} before any job"
        )
    return DeviceProfile(
        agent_id=name,
        name=name,
        host_id=device.host or name,
        cores_id=device.host or "",
        threads=device.threads,
        available_bytes=available_bytes,
        baseline_bytes=baseline_bytes,
        timings=_timings(device, table, shape),
        dtypes=device.dtypes,
    )


def _timings(device: FleetDevice, table: ModelTable, shape: JobShape) -> BlockTimings:
    operations = block_operations(table, shape)
    head_operations = 2 * shape.label_tokens * table.head_params
    forward_s, backward_s = _block_seconds(
        operations, shape, device.flops, device.block_forward_s, device.block_backward_s
    )
    head_s = forward_s * head_operations / operations
    values: dict[str, Any] = {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "embedding_s": _EMBEDDING_SHARE * forward_s,
        "head_forward_s": head_s,
        "head_backward_s": head_s,
    }
    # Where somebody gives one block's seconds, without a decoder's, they are those of all blocks.
    if table.num_encoder_blocks and (device.flops or device.decoder_block_forward_s):
        values["decoder_forward_s"], values["decoder_backward_s"] = _block_seconds(
            decoder_block_operations(table, shape),
            shape,
            device.flops,
            device.decoder_block_forward_s,
            device.decoder_block_backward_s,
        )
    return BlockTimings(**values)


def _block_seconds(
    operations: float, shape: JobShape, flops: float | None, forward_s: float | None, backward_s: float | None
) -> tuple[float, float]:
    """A block's passes as they were given, and what was not from its operations."""
    if forward_s is not None:
        return forward_s, backward_s or _BACKWARD_SHARE * forward_s
    forward_s = operations / (flops or 1.0)
    if not shape.side_reduction:
        return forward_s, backward_s or _BACKWARD_SHARE * forward_s
    # Blocks run forward alone. A side block's products with the full width fall with its reduction, the others faster;
    # its pass back takes twice its pass forward.
    side_s = forward_s / shape.side_reduction
    return forward_s + side_s, 2 * side_s
