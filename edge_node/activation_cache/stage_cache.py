"""What a stage keeps of its blocks in the activation cache, and gives back instead of running them.

States are named by their place in the model, not in a stage (:mod:`edge_node.activation_cache.places`). Rows lie
without padding and come back with zeros there: nothing that is not padding depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edge_node.activation_cache.codecs import decode, encode
from edge_node.activation_cache.places import (
    get_state,
    is_of_target,
    put_state,
    state_names_below,
    state_names_between,
)
from edge_node.activation_cache.row_tokens import RowTokens
from edge_node.activation_cache.store import ActivationStore, StateFile, billed_bytes
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.errors import ActivationCacheError
from plutino.side_network import BackboneStates
from plutino.state_codecs import StateCodec, token_bytes

KEY_BYTES = 16
_CARD_NUMBERS_AT_ONCE = 1 << 22
"""Of all states that are coded at once on a card, where starting a kernel takes longer than what it does for one state;
what coding holds meanwhile is four times their 16 MiB. A processor codes state after state, near its caches."""


@dataclass(frozen=True, slots=True)
class CacheKeys:
    """A micro-batch as the cache knows it."""

    keys: Tensor
    """uint8 [B, 16], from :func:`row_keys`."""
    lengths: Tensor
    """[B], tokens of each row."""
    padded_tokens: int
    target_lengths: Tensor | None = None
    """[B], tokens of each row's target, of encoder-decoders; the longest one is what targets are padded to."""

    def of_target(self) -> CacheKeys:
        """The same for states of the target."""
        assert self.target_lengths is not None, "rows of an encoder-decoder have targets"
        return CacheKeys(self.keys, self.target_lengths, max(1, int(self.target_lengths.max())))


@dataclass(slots=True)
class CacheCounts:
    """What became of rows since the worker started."""

    rows_read: int = 0
    rows_written: int = 0
    rows_left_out: int = 0
    """Had no room in the budget: their blocks run again in every epoch."""


class StageCache:
    """The states of one stage.

    Args:
        store: the device's cache; None: its owner gives none, and nothing is ever found.
        namespace: everything that the states follow from beside rows and blocks.
        stage: with its side network beside it, or told which blocks are frozen.
        codec: how states lie on the disk.
    """

    def __init__(self, store: ActivationStore | None, namespace: str, stage: Stage, codec: StateCodec) -> None:
        self._stage = stage
        self.codec = codec
        self.counts = CacheCounts()
        self.names = state_names(stage)
        """The states that this stage reads: its side network, or its lowest trained block."""
        # Experts compute their tokens together, padding among them: how many these are may change the last bit.
        self._keeps_padding = codec == "raw" and bool(stage.family.merged)
        self._store = store
        self._namespace = namespace
        self._files: dict[str, StateFile] = {}
        self._further: dict[str, StateFile] = {}
        """States of other stages, kept for epochs without the backbone."""
        if store is not None:
            self._files = {name: store.open(namespace, name) for name in self.names}

    @property
    def num_damaged(self) -> int:
        """Entries whose checksum was wrong."""
        return sum(file.num_damaged for file in self._files.values())

    def holds(self, keys: Tensor) -> bool:
        """Whether the states of all these rows are here and intact; a stage that reads none has them."""
        if len(self._files) < len(self.names):
            return False
        return all(file.holds(key) for file in self._files.values() for key in _each(keys))

    def read(self, rows: CacheKeys, *, are_checked: bool = True) -> BackboneStates:
        """States of rows.

        Args:
            rows: the micro-batch.
            are_checked: :meth:`holds` has just found them; else they are checked here.

        Raises:
            ActivationCacheError: one is not here or damaged.
        """
        states = BackboneStates()
        for group, tokens in self._groups(rows):
            data = self._read_group(group, tokens, _each(rows.keys), are_checked=are_checked)
            packed = decode(self.codec, data.to(self._stage.device), self._width(group[0]), self._stage.dtype)
            for name, padded in zip(group, tokens.pad(packed), strict=True):
                put_state(states, self._stage.side, name, padded)
        self.counts.rows_read += len(rows.keys) if self.names else 0
        return states

    @torch.no_grad()
    def write(self, rows: CacheKeys, states: BackboneStates) -> None:
        """Keep the states of one micro-batch, each row's all or none, as far as the budget goes; what is here stays."""
        if self._store is None:
            self.counts.rows_left_out += len(rows.keys) if self.names else 0
            return
        if not self._files:
            return
        keys = _each(rows.keys)
        # Of equal rows the first.
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        missing = {name: [i for key, i in first.items() if not file.holds(key)] for name, file in self._files.items()}
        if not any(missing.values()):
            self.counts.rows_written += len(keys)
            return
        sizes_bytes = [0] * len(keys)
        groups = list(self._groups(rows))
        for group, tokens in groups:
            for name in group:
                for i in missing[name]:
                    sizes_bytes[i] += billed_bytes(tokens.lengths[i] * self._token_bytes(name))
        with self._store.writing(self._namespace, sizes_bytes) as is_room:
            is_whole = list(is_room)
            for group, tokens in groups:
                wanted = {name: [i for i in missing[name] if is_whole[i]] for name in group}
                if not any(wanted.values()):
                    continue
                packed = tokens.pack([get_state(states, self._stage.side, name) for name in group])
                data = encode(self.codec, packed).cpu().unflatten(0, (len(group), -1))
                for name, of_name in zip(group, data, strict=True):
                    of_row = [part.flatten().numpy() for part in of_name.split(tokens.lengths)]
                    if not self._files[name].append([(keys[i], of_row[i]) for i in wanted[name]]):
                        is_whole = [whole and i not in wanted[name] for i, whole in enumerate(is_whole)]
        self.counts.rows_written += sum(is_whole)
        self.counts.rows_left_out += len(is_whole) - sum(is_whole)

    def entries(self, name: str, keys: Tensor) -> list[Tensor] | None:
        """The bytes of rows as they lie on the disk, uint8 each; None: one of them is not here or damaged."""
        file = self._files.get(name)
        if file is None:
            return None
        found: list[Tensor] = []
        for key in _each(keys):
            if (data := file.read(key)) is None:
                return None
            found.append(torch.from_numpy(data))
        return found

    def keep(self, name: str, keys: Tensor, entries: Sequence[Tensor]) -> None:
        """Keep what :meth:`entries` of another stage gave, as far as the budget goes; empty ones are nothing new."""
        if self._store is None:
            return
        if name not in self._files and name not in self._further:
            self._further[name] = self._store.open(self._namespace, name)
        file = self._files.get(name) or self._further[name]
        for key, entry in zip(_each(keys), entries, strict=True):
            if len(entry) and not file.has(key):
                file.write(key, entry.numpy())

    def count_missing(self, keys: Tensor) -> None:
        """Count rows of which some state of the whole model has not come, or had no room."""
        layout = self._stage.side_layout
        assert layout is not None
        files = self._files | self._further
        wanted = state_names_between(layout, 0, layout.num_blocks)
        self.counts.rows_left_out += sum(
            not all(name in files and files[name].has(key) for name in wanted) for key in _each(keys)
        )

    def close(self) -> None:
        """Let go of the files."""
        for file in (*self._files.values(), *self._further.values()):
            file.close()

    def _groups(self, rows: CacheKeys) -> Iterator[tuple[list[str], RowTokens]]:
        """The states, those together that are coded at once, each with its tokens of the rows."""
        tokens: dict[bool, RowTokens] = {}
        alike: dict[tuple[bool, int], list[str]] = {}
        for name in self.names:
            of_target = is_of_target(name, self._stage.num_encoder_blocks)
            if of_target not in tokens:
                own = rows.of_target() if of_target else rows
                lengths = [own.padded_tokens] * len(own.keys) if self._keeps_padding else own.lengths.tolist()
                tokens[of_target] = RowTokens(lengths, own.padded_tokens, self._stage.device)
            alike.setdefault((of_target, self._width(name)), []).append(name)
        for (of_target, width), names in alike.items():
            of_one = max(1, tokens[of_target].num_tokens * width)
            at_once = max(1, _CARD_NUMBERS_AT_ONCE // of_one) if self._stage.device.type == "cuda" else 1
            for start in range(0, len(names), at_once):
                yield names[start : start + at_once], tokens[of_target]

    def _read_group(
        self, group: Sequence[str], tokens: RowTokens, keys: Sequence[bytes], *, are_checked: bool
    ) -> Tensor:
        """Bytes of all tokens of some states as they lie on the disk: uint8 [N * V, bytes a token]."""
        data = np.empty((len(group) * tokens.num_tokens, self._token_bytes(group[0])), np.uint8)
        start = 0
        for name in group:
            for i, (key, length) in enumerate(zip(keys, tokens.lengths, strict=True)):
                entry = data[start : start + length].reshape(-1)
                if not self._files[name].read_into(entry, key, is_checked=are_checked):
                    raise ActivationCacheError(
                        f"row {i} of a micro-batch is not in the activation cache, or its {name} is damaged, and this "
                        "worker has no blocks to compute it; the job goes back to the pipeline"
                    )
                start += length
        return torch.from_numpy(data)

    def _token_bytes(self, name: str) -> int:
        return token_bytes(self.codec, self._width(name), self._stage.dtype.itemsize)

    def _width(self, name: str) -> int:
        side = self._stage.side
        if side is None:
            return int(self._stage.config.hidden_size)
        return side.layout.out_width if name == "final" else side.layout.width


def state_names(stage: Stage) -> tuple[str, ...]:
    """The states that a stage reads: its side network, or the lowest block that is trained."""
    side = stage.side
    if side is None:
        place = None if stage.frozen_prefix is None else stage.kept_place
        return () if place is None else state_names_below(place, stage.num_encoder_blocks)
    return state_names_between(side.layout, stage.start_block, stage.end_block)


def row_keys(rows: MicroBatchRows, codec: StateCodec, *, has_targets: bool = False) -> Tensor:
    """What the rows of a micro-batch are called: uint8 [B, 16].

    With targets a row is an encoder-decoder's: its tokens that carry loss are what is written of the others.

    Uncompressed states are promised to the bit, and another padding or place among the rows may change the last one:
    they are found again in a micro-batch of the same shape. Compressed ones are found wherever the row comes.
    """
    keys: list[int] = []
    start = 0
    shape = f"{len(rows.lengths)} {rows.padded_tokens}"
    if has_targets:
        row_of = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
        num_target_B = np.bincount(row_of, weights=rows.label_mask, minlength=len(rows.lengths)).astype(int)
        # Source and target are padded each to its longest.
        shape = f"{len(rows.lengths)} {(rows.lengths - num_target_B).max()} + {num_target_B.max()}"
    segments = b"" if rows.segment_lengths is None else rows.segment_lengths.tobytes()
    for index, length in enumerate(rows.lengths.tolist()):
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        if codec == "raw":
            digest.update(f"{shape} {index} ".encode())
        digest.update(segments)
        if rows.second_starts is not None:
            digest.update(f"second text at {rows.second_starts[index]} ".encode())
        if has_targets:
            digest.update(rows.label_mask[start : start + length].astype(bool).tobytes())
        digest.update(rows.input_ids[start : start + length].astype("<i4").tobytes())
        start += length
        keys += digest.digest()
    return torch.tensor(keys, dtype=torch.uint8).view(-1, KEY_BYTES)


def namespace_of(*parts: object) -> str:
    """A folder's name for everything that states follow from beside rows and blocks."""
    text = "\n".join(("plutino activations 3", *map(str, parts)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _each(keys: Tensor) -> Sequence[bytes]:
    return [bytes(key) for key in keys.numpy()]
