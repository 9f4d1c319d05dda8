"""What a watcher knows of a job: its events folded into one value that screens can draw.

Entry point: :class:`JobView`, whose :meth:`~JobView.take` is given the events in order. It knows neither rich nor the
wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.jobs.scoring import value_text
from partitioner.plan import Plan
from plutino import events
from plutino.client import ENDED_STATES, NumberedEvent
from plutino.sizes import format_size

_SPEED_STEPS = 20
"""Speed and busy shares are means over so many steps."""
_NUM_NOTES = 4


@dataclass(slots=True)
class WorkerView:
    """One worker, as far as its events have told."""

    name: str
    """The stage's number; with replicas also the replica's: 1.0."""
    stage_index: int
    device_name: str
    start_block: int
    end_block: int
    threads: int
    budget_bytes: int
    predicted_peak_bytes: int
    baseline_bytes: int
    rss_bytes: int = 0
    peak_rss_bytes: int = 0
    shares: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SPEED_STEPS))
    """Of the latest steps: seconds of computing, seconds altogether."""
    loading: str | None = None
    """How far it is with its weights, while it loads them."""

    @property
    def measured_job_bytes(self) -> int:
        """Peak beyond the worker's baseline; 0 before anything was measured."""
        return max(0, self.peak_rss_bytes - self.baseline_bytes)

    @property
    def busy_share(self) -> float | None:
        """Share of a step that the worker computes; None before the first step."""
        total_s = sum(total for _, total in self.shares)
        return sum(compute for compute, _ in self.shares) / total_s if total_s else None


@dataclass(slots=True)
class JobView:
    """One job, as far as its events have told."""

    job_id: str
    state: str = ""
    reason: str = ""
    step: int = 0
    """Steps done."""
    total_steps: int = 0
    num_train_rows: int = 0
    num_eval_rows: int = 0
    num_cut_rows: int = 0
    plan: Plan | None = None
    workers: dict[tuple[int, int], WorkerView] = field(default_factory=dict)
    """By stage and replica."""
    losses: dict[int, float] = field(default_factory=dict)
    """Loss by step, of the steps that stand."""
    lr: float | None = None
    counts: Mapping[str, float] = field(default_factory=dict)
    """Of the last step on sampled answers."""
    evaluations: dict[int, float] = field(default_factory=dict)
    """Evaluation loss by number of steps done."""
    scores: dict[str, events.ScoringDone] = field(default_factory=dict)
    """By moment: before, after."""
    train_s: float = 0.0
    """Seconds of all committed steps."""
    train_tokens: int = 0
    durable_step: int | None = None
    exported: events.Exported | None = None
    started_at_s: float | None = None
    ended_at_s: float | None = None
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=_NUM_NOTES))
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_SPEED_STEPS))

    @property
    def has_ended(self) -> bool:
        """No further events will come."""
        return self.state in ENDED_STATES

    @property
    def loss(self) -> float | None:
        """Loss of the latest step; None before the first."""
        return self.losses[max(self.losses)] if self.losses else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens fed a second over the latest steps; None before the first step."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else None

    @property
    def step_s(self) -> float | None:
        """Mean seconds of the latest steps; None before the first."""
        return sum(seconds for _, seconds in self._recent) / len(self._recent) if self._recent else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the present speed; None while that is unknown."""
        return None if self.step_s is None else max(0, self.total_steps - self.step) * self.step_s

    @property
    def bubble_share(self) -> float | None:
        """Share of a step in which the busiest worker does not compute; None before the first step."""
        busy = [worker.busy_share for worker in self.workers.values() if worker.busy_share is not None]
        return 1.0 - max(busy) if busy else None

    def metrics(self, moment: str) -> Mapping[str, float]:
        """Scores of a moment by name; empty if there was no scoring."""
        return self.scores[moment].metrics if moment in self.scores else {}

    def take(self, numbered: NumberedEvent) -> None:
        """Fold the next event in."""
        event = numbered.event
        if self.started_at_s is None:
            self.started_at_s = numbered.at_s
        match event:
            case events.JobStateChanged():
                self._enter_state(event, numbered.at_s)
            case events.DataRead():
                self.num_train_rows, self.num_eval_rows = event.num_train_rows, event.num_eval_rows
                self.num_cut_rows, self.total_steps = event.num_cut_rows, event.total_steps
            case events.PlanMade():
                self._begin_plan(Plan.model_validate_json(event.plan_json))
            case events.StepCommitted():
                self._commit(event)
            case events.Evaluated():
                self.evaluations[event.step] = event.loss
            case events.ScoringDone():
                self.scores[event.when] = event
            case events.ShadowDurable():
                self.durable_step = event.step
            case events.Usage():
                for usage in event.workers:
                    self._use(usage.worker, usage.rss_bytes, usage.peak_rss_bytes)
            case events.WorkerLoading():
                self._load(event.worker, told(event))
            case events.WorkerLoaded():
                self._load(event.worker, None)
                self._use(event.worker, event.rss_bytes, event.rss_bytes)
            case events.Exported():
                self.exported = event
            case _:
                pass  # told as a line (see told), not kept
        if isinstance(event, _NOTED) and (line := told(event)) is not None:
            self.notes.append(line)

    def _enter_state(self, event: events.JobStateChanged, at_s: float) -> None:
        self.state, self.reason, self.step = event.state, event.reason, event.next_step
        self.total_steps = event.total_steps or self.total_steps
        # A job that went back to an earlier step runs the later ones again.
        self.losses = {step: loss for step, loss in self.losses.items() if step < self.step}
        if self.has_ended:
            self.ended_at_s = at_s

    def _begin_plan(self, plan: Plan) -> None:
        self.plan = plan
        self._recent.clear()
        self.workers = {
            (stage.stage_index, index): WorkerView(
                name=f"{stage.stage_index}.{index}" if stage.further_replicas else str(stage.stage_index),
                stage_index=stage.stage_index,
                device_name=replica.device_name,
                start_block=stage.start_block,
                end_block=stage.end_block,
                threads=replica.threads,
                budget_bytes=replica.budget_bytes,
                predicted_peak_bytes=replica.peak_bytes,
                baseline_bytes=replica.baseline_bytes,
            )
            for stage in plan.stages
            for index, replica in enumerate(stage.replicas)
        }

    def _commit(self, event: events.StepCommitted) -> None:
        self.step = event.step + 1
        self.losses[event.step] = event.loss
        self.lr = event.lr
        self.counts = event.counts
        self.train_s += event.seconds
        self.train_tokens += event.tokens
        self._recent.append((event.tokens, event.seconds))
        for times in event.workers:
            self._use(times.worker, times.rss_bytes, times.peak_rss_bytes)
            if (worker := self._worker(times.worker)) is not None:
                worker.shares.append((times.compute_s, times.total_s))

    def _worker(self, name: events.WorkerName) -> WorkerView | None:
        return self.workers.get((name.stage_index, name.replica_index))

    def _load(self, name: events.WorkerName, loading: str | None) -> None:
        if (worker := self._worker(name)) is not None:
            worker.loading = loading

    def _use(self, name: events.WorkerName, rss_bytes: int, peak_rss_bytes: int) -> None:
        if (worker := self._worker(name)) is not None:
            worker.rss_bytes = rss_bytes
            worker.peak_rss_bytes = max(worker.peak_rss_bytes, peak_rss_bytes)


_NOTED = (
    events.StepSkipped,
    events.WorkerLost,
    events.Recovering,
    events.PlanChanges,
    events.Moved,
    events.Recovered,
    events.Notice,
)
"""Events that a person must not overlook while the screen changes."""


def counts_text(counts: Mapping[str, float]) -> list[str]:
    """What people want to see of a step on sampled answers; empty of other steps."""
    forms = {"reward": "reward {:.3f}", "kl": "KL {:.4f}", "clipped_share": "clipped {:.1%}"}
    return [form.format(counts[name]) for name, form in forms.items() if name in counts]


def told(event: events.JobEvent) -> str | None:
    """The event as one line for a person; None for those that only feed numbers on the screen."""
    match event:
        case events.JobStateChanged():
            return event.state + (f": {event.reason}" if event.reason else "")
        case events.DataRead():
            cut = f", {event.num_cut_rows} of them cut at max_tokens" if event.num_cut_rows else ""
            return (
                f"data: {event.num_train_rows} training rows, {event.num_eval_rows} held-out rows{cut}; "
                f"{event.total_steps} steps"
            )
        case events.PlanMade():
            return f"plan of epoch {event.plan_epoch} made in {event.search_s:.2f} s"
        case events.WorkerLoading():
            return (
                f"{event.worker.device_name} loads stage {event.worker.stage_index}: "
                f"{format_size(event.done_bytes)} of {format_size(event.total_bytes)}{_places(event.bytes_by_place)}"
            )
        case events.WorkerLoaded():
            return (
                f"{event.worker.device_name} holds blocks [{event.start_block}, {event.end_block}): "
                f"{event.tensors_read} tensors read in {event.seconds:.1f} s"
                f"{_places(event.bytes_by_place)}, "
                f"{event.trainable_parameters} parameters to train"
            )
        case events.StepCommitted():
            parts = [
                f"loss {event.loss:.4f}",
                f"{event.tokens / event.seconds:.0f} tokens/s",
                *counts_text(event.counts),
            ]
            return f"step {event.step + 1}: {', '.join(parts)}"
        case events.StepSkipped():
            return f"step {event.step + 1} skipped: {event.reason}"
        case events.Evaluated():
            best = ", the lowest so far" if event.is_best else ""
            return f"evaluation after {event.step} steps: loss {event.loss:.4f}{best}"
        case events.ScoringDone():
            values = ", ".join(f"{name} {value_text(name, value)}" for name, value in event.metrics.items())
            whose = "of the base model alone" if event.when == "before" else "after training"
            return f"score {whose}: {values} ({event.num_rows} rows in {event.seconds:.1f} s)"
        case events.WorkerLost():
            why = f"out of memory: {event.reason}" if event.out_of_memory else event.reason
            return f"lost the worker of stage {event.worker.stage_index} on {event.worker.device_name}: {why}"
        case events.Recovering():
            return f"recovery: {event.decision} at step {event.step}, {event.undone_steps} steps undone: {event.reason}"
        case events.PlanChanges():
            return f"after {event.step} steps the plan changes: {event.reason}"
        case events.Moved():
            return (
                f"moved in {event.seconds:.1f} s ({_seconds(event.seconds_by_part)}; of loading: "
                f"{_seconds(event.loading_by_part)}); {event.num_went_on} of {event.num_workers} workers went on in "
                f"their processes, state read{_places(event.state_by_place) or ': none'}"
            )
        case events.Recovered():
            return f"steps run again after {event.seconds:.1f} s"
        case events.Exported():
            return f"adapter verified and published: {event.adapter_dir}"
        case events.Notice():
            return f"{event.level}: {event.text}" if event.level == "warning" else event.text
        case _:
            return None


def _seconds(by_part: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {seconds:.1f}" for part, seconds in by_part.items())


def _places(bytes_by_place: Mapping[str, int]) -> str:
    """Where weights came from, the most first: `` (coordinator 1.2 GiB, cache 300 MiB)``."""
    ranked = sorted(bytes_by_place.items(), key=lambda item: (-item[1], item[0]))
    return f" ({', '.join(f'{place} {format_size(num_bytes)}' for place, num_bytes in ranked)})" if ranked else ""
