"""Which task a training row is taken from: several data sets mixed by weights and temperature, without any state.

Entry point :func:`mixture_indices`. Shares follow Raffel et al. 2020 (T5, arXiv:1910.10683, sec. 3.5.2): a data set
of n rows is drawn from in proportion to ``weight * n ** (1 / temperature)``. An epoch has as many rows as all data sets
together; a task whose share is larger than its rows repeats them, each as often as any other before it comes again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plutino.data.batches import sample_order, steps_per_epoch


@dataclass(frozen=True, slots=True)
class Mixture:
    """Data sets, one after the other, and how many rows of each an epoch holds."""

    sizes: tuple[int, ...]
    """Rows of each data set."""
    rows_per_epoch: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Rows of an epoch: as many as there are."""
        return sum(self.sizes)


def make_mixture(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> Mixture:
    """Shares of an epoch, rounded to whole rows by largest remainders, at least one row of each data set."""
    rates = np.array(weights, np.float64) * np.array(sizes, np.float64) ** (1.0 / temperature)
    total = sum(sizes)
    exact = rates / rates.sum() * total
    rows = np.maximum(1, np.floor(exact)).astype(np.int64)
    for task in np.argsort(-(exact - np.floor(exact)), kind="stable")[: max(0, total - int(rows.sum()))]:
        rows[task] += 1
    while rows.sum() > total:  # a data set's one row was more than its share
        rows[int(rows.argmax())] -= 1
    return Mixture(tuple(int(n) for n in sizes), tuple(int(n) for n in rows))


def mixture_indices(step: int, batch_size: int, mixture: Mixture, seed: int) -> tuple[int, ...]:
    """Positions of a step's rows in the joined data sets.

    Within an epoch the tasks' turns are shuffled; each task goes through its own rows in its own order, and goes on
    where the epoch before left off.
    """
    epoch, batch = divmod(step, steps_per_epoch(mixture.num_samples, batch_size))
    tasks, turns = _turns(mixture, seed, epoch)
    starts = np.cumsum([0, *mixture.sizes], dtype=np.int64)
    indices = []
    for place in range(batch * batch_size, min((batch + 1) * batch_size, mixture.num_samples)):
        task = int(tasks[place])
        size = mixture.sizes[task]
        passes, at = divmod(epoch * mixture.rows_per_epoch[task] + int(turns[place]), size)
        indices.append(int(starts[task]) + int(sample_order(size, seed, passes)[at]))
    return tuple(indices)


@functools.lru_cache(maxsize=4)
def _turns(mixture: Mixture, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The task of each place of an epoch, and how often it had its turn there before; [num_samples] each."""
    borders = np.cumsum([0, *mixture.rows_per_epoch], dtype=np.int64)
    tasks = np.searchsorted(borders, sample_order(mixture.num_samples, seed, epoch), side="right") - 1
    by_task = np.argsort(tasks, kind="stable")
    turns = np.empty(len(tasks), np.int64)
    turns[by_task] = np.arange(len(tasks)) - borders[tasks[by_task]]
    return tasks, turns
