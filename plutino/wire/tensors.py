"""Tensors to bytes and back; the only module of this package that imports torch.

Out: :func:`pack` gives views of the tensors' own memory, which the frame's join copies once; what lies on a card comes
to the host by :class:`HostCopy` first, beside the computation. In: a :class:`BufferPool` lends aligned memory that was
faulted in before, and :func:`unpack` gives tensors that live in it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from plutino.errors import ConfigError, FrameError
from plutino.wire.messages import ALIGNMENT_BYTES, MAX_NAME_BYTES, MAX_RANK, Codec, DType, TensorSpec, layout

CODED_NAMES = frozenset({"hidden", "gradient", "source", "source gradient"})
"""Tensors that a lossy codec may round; everything else travels as it is."""

_DTYPES: dict[torch.dtype, DType] = {
    torch.float32: DType.FLOAT32,
    torch.float16: DType.FLOAT16,
    torch.bfloat16: DType.BFLOAT16,
    torch.float64: DType.FLOAT64,
    torch.int64: DType.INT64,
    torch.int32: DType.INT32,
    torch.int16: DType.INT16,
    torch.int8: DType.INT8,
    torch.uint8: DType.UINT8,
    torch.bool: DType.BOOL,
}
_TORCH_DTYPES = {code: dtype for dtype, code in _DTYPES.items()}
_CODECS = {"raw": Codec.RAW, "bf16": Codec.BF16}
_PADDING = memoryview(bytes(ALIGNMENT_BYTES))
_PAGES_BYTES = 64 << 10


def codec_named(name: str) -> Codec:
    """Look a codec up by the name that plans use.

    Raises:
        ConfigError: there is no such codec.
    """
    try:
        return _CODECS[name]
    except KeyError:
        raise ConfigError(f"codec {name!r} is not known; choose one of {', '.join(sorted(_CODECS))}") from None


def describe(tensors: Mapping[str, Tensor], codec: Codec) -> tuple[TensorSpec, ...]:
    """The tensor table of a message. The codec applies to wider floats among ``CODED_NAMES``.

    Raises:
        FrameError: a tensor's dtype, rank or name cannot travel.
    """
    return tuple(_spec(name, tensor, codec) for name, tensor in tensors.items())


def pack(specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """View the bytes of described tensors, in the order and with the gaps of the payload's layout.

    Contiguous CPU tensors that travel raw are not copied: the views are their own memory and keep it alive.
    """
    pieces: list[memoryview] = []
    end = 0
    for start, spec in zip(layout(specs)[0], specs, strict=True):
        pieces.append(_PADDING[: start - end])
        pieces.append(_bytes_of(tensors[spec.name], spec.codec))
        end = start + spec.wire_bytes
    return pieces


def unpack(specs: Sequence[TensorSpec], memory: Tensor) -> dict[str, Tensor]:
    """Tensors over a received payload, by name.

    Args:
        specs: the tensor table.
        memory: the payload, uint8 [bytes]. Raw tensors share it; it must not be written while one of them lives, which
            a :class:`BufferPool` sees to. Tensors of another codec are decoded into memory of their own, in the dtype
            they had at the sender.
    """
    offsets, _ = layout(specs)
    return {spec.name: _tensor_at(spec, memory, offset) for offset, spec in zip(offsets, specs, strict=True)}


def transmitted(name: str, tensor: Tensor, codec: Codec) -> Tensor:
    """A detached, contiguous copy of ``tensor`` with the values that it would have after its way over the wire."""
    spec = _spec(name, tensor, codec)
    if spec.codec is Codec.BF16:
        return tensor.detach().to(torch.bfloat16).to(tensor.dtype).contiguous()
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class HostCopy:
    """Tensors of a message in the host's memory; those of a card come there beside what the card computes.

    The copy runs on a stream of its own, behind what was queued when it was asked for and before anything that is
    queued later: a message does not wait for the next micro-batch's passes.

    Args:
        specs: the tensor table.
        tensors: the message, by name. A card's are taken once; later writes to them, queued on the stream that is
            current now, may come too early.
    """

    def __init__(self, specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._copied: torch.cuda.Event | None = None
        self._device: torch.device | None = None
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if not devices:
            return
        (device,) = devices
        self._device = device
        on_card = {spec.name: _wire_values(tensors[spec.name], spec.codec) for spec in specs}
        stream = _copy_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for name, values in on_card.items():
                if values.is_cuda:
                    self._tensors[name] = torch.empty_like(values, device="cpu", pin_memory=True)
                    self._tensors[name].copy_(values, non_blocking=True)
                    values.record_stream(stream)
            # Whoever waits sleeps: the cores are those that launch kernels.
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(stream)

    def wait(self) -> Mapping[str, Tensor]:
        """The tensors, once they are there."""
        if self._copied is not None:
            # A thread that never chose a card would open a context on the first one.
            with torch.cuda.device(self._device):
                self._copied.synchronize()
        return self._tensors


class BufferPool:
    """Lends receive buffers and takes each back by itself when the last tensor over it is gone.

    A fresh buffer costs a page fault per 4 KiB (20 ms per 32 MiB, measured), a returned one costs nothing. At most
    ``max_idle`` buffers of at most ``max_kept_bytes`` wait for their next use.

    Page-locked memory, from which a card takes copies without anybody waiting, is torch's own to keep: it knows which
    copies are still under way.
    """

    def __init__(self, *, max_idle: int = 4, max_kept_bytes: int = 8 << 20, is_page_locked: bool = False) -> None:
        # Buffers come back from destructors, at any point of any thread: only atomic operations, no lock.
        self._idle: deque[Tensor] = deque(maxlen=max_idle)
        self._max_kept_bytes = max_kept_bytes
        self._is_page_locked = is_page_locked

    def lend(self, num_bytes: int) -> Tensor:
        """At least ``num_bytes`` as a uint8 tensor, aligned to 64 bytes, with arbitrary contents."""
        if self._is_page_locked:
            return torch.empty(max(num_bytes, 1), dtype=torch.uint8, pin_memory=True)
        memory = self._reuse(num_bytes)
        if memory is None:
            rounded_bytes = max(-(-num_bytes // _PAGES_BYTES), 1) * _PAGES_BYTES
            memory = torch.empty(rounded_bytes, dtype=torch.uint8)
        # torch.frombuffer keeps this very object alive, so its end is the end of all tensors over the memory.
        buffer = memory.numpy().data
        if memory.numel() <= self._max_kept_bytes:
            weakref.finalize(buffer, self._idle.append, memory).atexit = False
        return torch.frombuffer(buffer, dtype=torch.uint8)

    @property
    def num_idle(self) -> int:
        """Number of buffers that wait for their next use."""
        return len(self._idle)

    def _reuse(self, num_bytes: int) -> Tensor | None:
        for _ in range(len(self._idle)):
            try:
                memory = self._idle.popleft()
            except IndexError:  # another thread was faster
                return None
            if num_bytes <= memory.numel() <= 2 * num_bytes + _PAGES_BYTES:
                return memory
            self._idle.append(memory)
        return None


def _spec(name: str, tensor: Tensor, codec: Codec) -> TensorSpec:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        known = ", ".join(str(known_dtype) for known_dtype in _DTYPES)
        raise FrameError(f"tensor {name!r} is of {tensor.dtype}, which does not travel; convert it to one of {known}")
    if tensor.dim() > MAX_RANK:
        raise FrameError(f"tensor {name!r} has {tensor.dim()} axes; at most {MAX_RANK} travel: flatten some")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise FrameError(f"tensor name {name!r} takes more than {MAX_NAME_BYTES} bytes; use a shorter one")
    is_rounded = name in CODED_NAMES and tensor.dtype.is_floating_point and dtype is not DType.BFLOAT16
    return TensorSpec(name, dtype, tuple(tensor.shape), codec if is_rounded else Codec.RAW)


def _bytes_of(tensor: Tensor, codec: Codec) -> memoryview:
    return _wire_values(tensor, codec).reshape(-1).view(torch.uint8).numpy().data


def _wire_values(tensor: Tensor, codec: Codec) -> Tensor:
    """What goes over the wire, where the tensor lies."""
    values = tensor.detach()
    if codec is Codec.BF16:
        values = values.to(torch.bfloat16)
    return values.contiguous()


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _tensor_at(spec: TensorSpec, memory: Tensor, offset_bytes: int) -> Tensor:
    dtype = _TORCH_DTYPES[spec.dtype]
    if spec.wire_bytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    is_rounded = spec.codec is Codec.BF16
    wire_dtype = torch.bfloat16 if is_rounded else dtype
    values = memory[offset_bytes : offset_bytes + spec.wire_bytes].view(wire_dtype).reshape(spec.shape)
    return values.to(dtype) if is_rounded else values
