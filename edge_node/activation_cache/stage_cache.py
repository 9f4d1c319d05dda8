"""What a stage keeps of its blocks in the activation cache, and gives back instead of running them.

States are named by their place in the model, not in a stage (:mod:`edge_node.activation_cache.places`). Rows lie
without padding and come back with zeros there: nothing that is not padding depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from edge_node.activation_cache.store import ActivationStore, StateFile
from edge_node.stage.stage import Stage
from plutino.data.batches import MicroBatchRows
from plutino.errors import ActivationCacheError
from plutino.side_network import BackboneStates
from plutino.state_codecs import StateCodec, token_bytes

KEY_BYTES = 16


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
        for name in self.names:
            padded = self._padded(self._files[name], name, self._own_rows(rows, name), are_checked=are_checked)
            put_state(states, self._stage.side, name, padded)
        self.counts.rows_read += len(rows.keys) if self.names else 0
        return states

    def write(self, rows: CacheKeys, states: BackboneStates) -> None:
        """Keep the states of one micro-batch, row by row, as far as the budget goes; what is here stays."""
        if self._store is None:
            self.counts.rows_left_out += len(rows.keys) if self.names else 0
        if not self._files:
            return
        by_name = {name: get_state(states, self._stage.side, name) for name in self.names}
        rows_by_name = {name: self._own_rows(rows, name) for name in self.names}
        for index, key in enumerate(_each(rows.keys)):
            is_whole = True
            for name, file in self._files.items():
                if is_whole and not file.holds(key):
                    own = rows_by_name[name]
                    length = own.padded_tokens if self._keeps_padding else int(own.lengths[index])
                    data = encode(self.codec, by_name[name][index, :length])
                    is_whole = file.write(key, data.reshape(-1).numpy())
            if is_whole:
                self.counts.rows_written += 1
            else:
                self.counts.rows_left_out += 1

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

    def _padded(self, file: StateFile, name: str, rows: CacheKeys, *, are_checked: bool) -> Tensor:
        width = self._width(name)
        row_bytes = token_bytes(self.codec, width, self._stage.dtype.itemsize)
        found: list[Tensor] = []
        for index, key in enumerate(_each(rows.keys)):
            data = file.read(key, is_checked=are_checked)
            if data is None:
                raise ActivationCacheError(
                    f"row {index} of a micro-batch is not in the activation cache, or its {name} is damaged, and this "
                    "worker has no blocks to compute it; the job goes back to the pipeline"
                )
            found.append(torch.from_numpy(data).view(-1, row_bytes))
        # All rows at once: tokens of one row are too few for what an operation costs before it begins.
        states = decode(self.codec, torch.cat(found), width, self._stage.dtype)
        padded = torch.zeros(len(found), rows.padded_tokens, width, dtype=self._stage.dtype)
        for row, of_row in zip(padded, states.split([len(tokens) for tokens in found]), strict=True):
            row[: len(of_row)] = of_row
        return padded.to(self._stage.device)

    def _width(self, name: str) -> int:
        side = self._stage.side
        if side is None:
            return int(self._stage.config.hidden_size)
        return side.layout.out_width if name == "final" else side.layout.width

    def _own_rows(self, rows: CacheKeys, name: str) -> CacheKeys:
        """The micro-batch with the tokens that a state has."""
        return rows.of_target() if is_of_target(name, self._stage.num_encoder_blocks) else rows


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
