"""A step ahead: while a worker waits for its step's sums, it runs what of the next step depends on nothing trained.

Beside a side network all blocks are frozen, and what the activation cache holds is read, not computed: both follow from
the next step's rows, which are here already. Only the first micro-batch goes ahead: what it gives is held where the
step's own pass would hold it a moment later, when nothing of the step before is left, so that no more memory is needed
than without. Whether there was time for it changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_node.engine.forward_passes import ForwardPasses, FrozenPart
from edge_node.engine.unit import UnitInput
from plutino.errors import ActivationCacheError
from plutino.types import Unit

Following = Callable[[], UnitInput | None]
"""Gives the next step, if all of its rows are here."""


class FrozenAhead:
    """The frozen part of one micro-batch of the next step.

    Args:
        passes: run it.
        first_micro_batch: of a step with so many micro-batches, the first that this worker runs; None: it runs none.
    """

    def __init__(self, passes: ForwardPasses, first_micro_batch: Callable[[int], int | None]) -> None:
        self._passes = passes
        self._first_micro_batch = first_micro_batch
        self._unit: Unit | None = None
        self._parts: dict[int, FrozenPart] = {}

    def run(self, following: UnitInput) -> int | None:
        """Run it; gives the micro-batch, None if there is nothing to run ahead."""
        m = self._first_micro_batch(following.num_micro_batches)
        rows = None if m is None else following.rows[m]
        if m is None or rows is None or self._unit == following.unit:
            return None
        self._unit, self._parts = following.unit, {}
        try:
            part = self._passes.frozen_part(rows)
        except ActivationCacheError:
            # An entry is missing: the step that needs it says so, and this one is not harmed.
            return None
        if part is None:
            return None
        self._parts[m] = part
        return m

    def take(self, work: UnitInput) -> dict[int, FrozenPart]:
        """What has run of a unit that begins now, by micro-batch; what was run of another one is forgotten."""
        unit, self._unit = self._unit, None
        parts, self._parts = self._parts, {}
        # Rows that were fed again count as others.
        return {m: part for m, part in parts.items() if unit == work.unit and work.rows[m] is part.rows}
