"""What is told of a training that has run: how much of the model it trained, its steps, what its answers were worth."""

from __future__ import annotations

import math
from collections.abc import Iterator

from coordinator.jobs.planning import read_model
from coordinator.storage.base import NumberedEvent, Store
from partitioner.adapter import adapter_params_of
from plutino.events import StepCommitted
from plutino.hub_id import index_folder, model_folder
from plutino.job.spec import JobSpec
from plutino.random_weights import read_random_weights
from plutino.safetensors_index import read_safetensors_headers
from plutino.types import JobId

_EVENTS_AT_ONCE = 1000


def trained_share(spec: JobSpec) -> tuple[int, float]:
    """Parameters that a job trains, and their share of the base model's.

    Raises:
        ModelError: the base model cannot be read.
        ConfigError: the method does not fit it.
    """
    _, table = read_model(spec)
    folder = model_folder(spec.model.path)
    tensors = read_random_weights(folder) or read_safetensors_headers(index_folder(folder))
    total = sum(math.prod(entry.shape) for entry in tensors.values())
    trained = adapter_params_of(table, spec.method).num_params
    return trained, trained / total


def committed_steps(store: Store, job_id: JobId) -> list[StepCommitted]:
    """All steps that were ever committed, those that a loss undid among them, in the order in which they came."""
    return [event for numbered in _events(store, job_id) if isinstance(event := numbered.event, StepCommitted)]


def reward_lines(store: Store, job_id: JobId) -> list[tuple[str, str]]:
    """What sampled answers were worth in the first and the last tenth of the steps; empty where none were sampled."""
    by_step = {
        step.step: step.counts for step in committed_steps(store, job_id)
    }  # a later commit replaces an undone one
    counts = [by_step[step] for step in sorted(by_step) if "reward" in by_step[step]]
    if not counts:
        return []
    num_mean = max(1, len(counts) // 10)
    num_flat = sum(one["reward_std"] == 0 for one in counts)
    flat = "steps of which all answers had one reward, which teaches nothing"
    lines = [(flat, f"{num_flat} of {len(counts)}")] if num_flat else []
    titles = {"reward": "mean reward", "kl": "KL from the base model", "answer_tokens": "tokens of an answer"}
    for name, title in titles.items():
        known = [one[name] for one in counts if name in one]
        if known:
            first, last = (sum(part) / len(part) for part in (known[:num_mean], known[-num_mean:]))
            lines.append((f"{title}, first and last {num_mean} of {len(counts)} steps", f"{first:.4g}, {last:.4g}"))
    return lines


def _events(store: Store, job_id: JobId) -> Iterator[NumberedEvent]:
    after = 0
    while more := store.events(job_id, after=after, limit=_EVENTS_AT_ONCE):
        yield from more
        after += len(more)
