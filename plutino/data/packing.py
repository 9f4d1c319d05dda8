"""Several short rows in one sequence, with the borders between them kept.

Entry point :func:`pack`. Which rows share a sequence is decided by their lengths alone (best fit, longest first), once
for all epochs; epochs shuffle the packed sequences.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from plutino.data.samples import Batchable, TokenRow
from plutino.job.objective_part import Counted


def pack(samples: Batchable, max_tokens: int) -> PackedSamples:
    """Samples that hold as many of the given ones as fit ``max_tokens`` tokens, each as a segment."""
    return PackedSamples(samples, plan_packs(samples.lengths, max_tokens))


def plan_packs(lengths: NDArray[np.int64], max_tokens: int) -> list[list[int]]:
    """Which rows share a sequence: longest first, each where the least room is left over (best fit decreasing).

    Rows of a pack come in the order of their positions, and packs in the order of their first rows.

    Args:
        lengths: tokens of each row, none above max_tokens.
        max_tokens: of a sequence.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []  # what packs have left, ascending, each once
    with_room: dict[int, list[int]] = {}
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, pack_index = max_tokens, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            pack_index = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
                rooms.pop(at)
        packs[pack_index].append(index)
        left = room - length
        if left > 0:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(pack_index)
    return sorted(sorted(pack) for pack in packs)


class PackedSamples:
    """Sequences of several rows each; see :class:`plutino.data.samples.Batchable`."""

    sequences_per_sample = 1

    def __init__(self, samples: Batchable, packs: Sequence[Sequence[int]]) -> None:
        assert samples.sequences_per_sample == 1, "pairs are not packed"
        self._samples = samples
        flat = [index for pack in packs for index in pack]
        self._members: NDArray[np.int64] = np.array(flat, np.int64)
        self._starts = np.cumsum([0, *(len(pack) for pack in packs)], dtype=np.int64)
        own_lengths = samples.lengths
        self.lengths: NDArray[np.int64] = np.add.reduceat(own_lengths[self._members], self._starts[:-1])
        self.line_numbers: NDArray[np.int64] = samples.line_numbers[self._members[self._starts[:-1]]]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def counted(self) -> Counted:
        """See :class:`plutino.data.samples.Batchable`."""
        return self._samples.counted

    def members(self, index: int) -> list[int]:
        """Positions, in what was packed, of a sequence's rows."""
        members: list[int] = self._members[self._starts[index] : self._starts[index + 1]].tolist()
        return members

    def rows(self, index: int) -> list[TokenRow]:
        """See :class:`plutino.data.samples.Batchable`."""
        parts = [self._samples.rows(member)[0] for member in self.members(index)]
        return [
            TokenRow(
                ids=np.concatenate([part.ids for part in parts]),
                mask=np.concatenate([part.mask for part in parts]),
                segment_lengths=tuple(len(part.ids) for part in parts),
            )
        ]

    def loss_weight(self, index: int, counted: Counted) -> float:
        """See :class:`plutino.data.samples.Batchable`."""
        return sum(self._samples.loss_weight(member, counted) for member in self.members(index))

    def prompt(self, index: int) -> NDArray[np.int32]:
        """Packed rows have no single prompt."""
        raise AssertionError("generation starts from rows, not from packs")
