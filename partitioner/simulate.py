"""A step, or a whole run, played event by event: jitter, shared network cards, failures and joins, all by seed.

Entry points: :func:`simulate_step`, whose trace :mod:`partitioner.gantt` draws, and :func:`simulate_run`. With neither
jitter nor shared links a step takes exactly what :func:`partitioner.replay.replay` says; both follow the executor's
order of actions, but here time runs from event to event, so that what contends for a card can be told.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from partitioner.replay import StageGroup, evaluation_order
from partitioner.trace import Span, SpanKind, Trace, WorkerName


@dataclass(frozen=True, slots=True)
class Noise:
    """How far things stray from their predicted seconds."""

    compute_sigma: float = 0.0
    """Standard deviation of the logarithm of a pass's seconds; its mean stays what was predicted."""
    link_sigma: float = 0.0
    is_card_shared: bool = False
    """A worker has one network card: its messages to all neighbours leave one after the other, and arrive so."""


@dataclass(slots=True)
class _Worker:
    actions: deque[tuple[bool, int]]
    is_busy: bool = False


@dataclass(order=True, slots=True)
class _Event:
    at_s: float
    number: int
    happen: Callable[[float], None] = field(compare=False)


def simulate_step(
    groups: Sequence[StageGroup],
    num_micro_batches: int,
    *,
    noise: Noise | None = None,
    seed: int = 0,
    measured: Mapping[tuple[WorkerName, bool, int], float] | None = None,
) -> Trace:
    """Play one optimiser step.

    Args:
        groups: the stages with their seconds.
        num_micro_batches: of the step.
        noise: jitter and contention; None: neither.
        seed: of the jitter.
        measured: seconds of passes that were measured (:meth:`Trace.durations`), which are taken as they are: so a
            run's trace is played again under other links or another schedule.
    """
    return _Simulation(groups, num_micro_batches, noise or Noise(), random.Random(seed), measured or {}).run()


class _Simulation:
    def __init__(
        self,
        groups: Sequence[StageGroup],
        num_micro_batches: int,
        noise: Noise,
        generator: random.Random,
        measured: Mapping[tuple[WorkerName, bool, int], float],
    ) -> None:
        self._groups, self._noise, self._random, self._measured = groups, noise, generator, measured
        self._owners = [group.owners or (0,) * num_micro_batches for group in groups]
        sizes = [len(group.replicas) for group in groups]
        has_backward = tuple(group.replicas[0].has_backward for group in groups)
        ahead = tuple(sum(sizes[k:]) + group.ahead for k, group in enumerate(groups))
        self._workers = {(k, r): _Worker(deque()) for k, size in enumerate(sizes) for r in range(size)}
        for k, is_forward, m in evaluation_order(ahead, num_micro_batches, has_backward):
            self._workers[k, self._owners[k][m]].actions.append((is_forward, m))
        self._inputs = {(0, True, m) for m in range(num_micro_batches)}
        self._events: list[_Event] = []
        self._num_events = 0
        self._free_at: dict[tuple[object, ...], float] = {}
        self._spans: list[Span] = []

    def run(self) -> Trace:
        for name in self._workers:
            self._begin(name, 0.0)
        while self._events:
            event = heapq.heappop(self._events)
            event.happen(event.at_s)
        left = [name for name, worker in self._workers.items() if worker.actions]
        assert not left, f"the schedule ended with actions left on {left}"
        self._sum_replicas()
        return Trace(spans=tuple(sorted(self._spans, key=lambda span: (span.start_s, span.stage, span.replica))))

    def _at(self, at_s: float, happen: Callable[[float], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, _Event(at_s, self._num_events, happen))

    def _jittered(self, seconds: float, sigma: float) -> float:
        # exp(N(-sigma^2 / 2, sigma)) has mean 1.
        return seconds * self._random.lognormvariate(-sigma * sigma / 2, sigma) if sigma else seconds

    def _begin(self, name: WorkerName, now_s: float) -> None:
        """Start the worker's next action if its input is there."""
        worker = self._workers[name]
        if worker.is_busy or not worker.actions:
            return
        is_forward, m = worker.actions[0]
        if (name[0], is_forward, m) not in self._inputs:
            return
        worker.actions.popleft()
        worker.is_busy = True
        cost = self._groups[name[0]].replicas[name[1]]
        seconds = self._measured.get((name, is_forward, m))
        if seconds is None:
            predicted_s = cost.forward_s if is_forward else cost.backward_s
            seconds = self._jittered(predicted_s, self._noise.compute_sigma)

        def end(at_s: float) -> None:
            kind: SpanKind = "forward" if is_forward else "backward"
            self._note(name, kind, m, now_s, at_s)
            worker.is_busy = False
            self._hand_on(name, is_forward, m, at_s)
            self._begin(name, at_s)

        self._at(now_s + seconds, end)

    def _hand_on(self, name: WorkerName, is_forward: bool, m: int, now_s: float) -> None:
        k, replica = name
        if is_forward and k + 1 < len(self._groups):
            below = self._owners[k + 1][m]
            self._send(name, (k + 1, below), self._groups[k].links[replica][below], is_forward, m, now_s)
        elif is_forward:
            self._inputs.add((k, False, m))
        elif k > 0 and self._groups[k - 1].replicas[0].gets_gradient:
            above = self._owners[k - 1][m]
            self._send(name, (k - 1, above), self._groups[k - 1].links[above][replica], is_forward, m, now_s)

    def _send(
        self, sender: WorkerName, to: WorkerName, link: tuple[float, float], is_forward: bool, m: int, now_s: float
    ) -> None:
        busy_s, latency_s = link
        busy_s = self._jittered(busy_s, self._noise.link_sigma)
        cards: list[tuple[object, ...]] = [("link", sender, to)]
        if self._noise.is_card_shared:
            cards = [("out", sender), ("in", to)]
        start_s = max([now_s, *(self._free_at.get(card, 0.0) for card in cards)])
        end_s = start_s + busy_s
        for card in cards:
            self._free_at[card] = end_s
        kind: SpanKind = "send down" if is_forward else "send up"
        self._note(sender, kind, m, start_s, end_s)

        def arrive(at_s: float) -> None:
            self._inputs.add((to[0], is_forward, m))
            self._begin(to, at_s)

        self._at(end_s + latency_s, arrive)

    def _sum_replicas(self) -> None:
        for k, group in enumerate(self._groups):
            if group.sum_s <= 0:
                continue
            computed = [s for s in self._spans if s.stage == k and s.kind in ("forward", "backward")]
            start_s = max(span.end_s for span in computed)
            for replica in range(len(group.replicas)):
                self._note((k, replica), "sum", -1, start_s, start_s + group.sum_s)

    def _note(
        self,
        name: WorkerName,
        kind: SpanKind,
        m: int,
        start_s: float,
        end_s: float,
    ) -> None:
        self._spans.append(Span(stage=name[0], replica=name[1], kind=kind, micro_batch=m, start_s=start_s, end_s=end_s))


@dataclass(frozen=True, slots=True)
class Churn:
    """How devices come and go. All times are exponentially distributed."""

    mean_up_s: float
    """Mean seconds until a device that is in fails or leaves."""
    mean_down_s: float
    """Mean seconds until it comes back."""
    recovery_s: float
    """Seconds from a loss until the new plan's workers compute: detection, planning, loading."""
    durable_every: int = 1
    """Steps between copies of the training state; steps since the last one are done again."""


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened to a simulated run."""

    at_s: float
    what: str


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """A run from its first to its last step, or to the horizon."""

    seconds: float
    steps: int
    repeated_steps: int
    waited_s: float
    """Seconds in which the devices that were left could not hold the job."""
    events: tuple[RunEvent, ...]


def simulate_run(
    devices: Sequence[str],
    step_s_of: Callable[[frozenset[str]], float | None],
    used_by: Callable[[frozenset[str]], frozenset[str]],
    *,
    num_steps: int,
    churn: Churn,
    seed: int = 0,
    horizon_s: float = 1e9,
) -> SimulatedRun:
    """Play a job over devices that fail and come back; a loss costs its recovery and the steps not yet durable.

    A device that comes back causes a new plan where the seconds saved over the rest of the job exceed a recovery's.

    Args:
        devices: names of the fleet.
        step_s_of: devices that are in -> seconds of a step of the best plan over them; None: the job does not fit.
        used_by: devices that are in -> those that this plan uses.
        num_steps: steps of the job.
        churn: how devices come and go.
        seed: of all times.
        horizon_s: the run ends here at the latest.
    """
    return _Run(devices, step_s_of, used_by, num_steps, churn, random.Random(seed)).play(horizon_s)


class _Run:
    def __init__(
        self,
        devices: Sequence[str],
        step_s_of: Callable[[frozenset[str]], float | None],
        used_by: Callable[[frozenset[str]], frozenset[str]],
        num_steps: int,
        churn: Churn,
        generator: random.Random,
    ) -> None:
        self._step_s_of, self._used_by, self._num_steps = step_s_of, used_by, num_steps
        self._churn, self._random = churn, generator
        self._up = frozenset(devices)
        self._changes = [(self._after(churn.mean_up_s), name, False) for name in devices]
        heapq.heapify(self._changes)
        self._now_s = self._waited_s = 0.0
        self._done = self._durable = self._repeated = 0
        self._planned = self._up if step_s_of(self._up) is not None else None
        self._has_joined = False
        self._events: list[RunEvent] = []

    def play(self, horizon_s: float) -> SimulatedRun:
        while self._done < self._num_steps and self._now_s < horizon_s:
            step_s = None if self._planned is None else self._step_s_of(self._planned)
            if step_s is None or self._changes[0][0] < self._now_s + step_s:
                self._change()
                continue
            self._now_s += step_s
            self._done += 1
            if self._done % self._churn.durable_every == 0:
                self._durable = self._done
            if self._has_joined:
                self._consider(step_s)
        return SimulatedRun(self._now_s, self._done, self._repeated, self._waited_s, tuple(self._events))

    def _after(self, mean_s: float) -> float:
        return self._random.expovariate(1 / mean_s)

    def _change(self) -> None:
        """A device is lost or comes back; what happened during a recovery is looked at after it."""
        at_s, name, comes = heapq.heappop(self._changes)
        heapq.heappush(
            self._changes,
            (at_s + self._after(self._churn.mean_up_s if comes else self._churn.mean_down_s), name, not comes),
        )
        self._events.append(RunEvent(at_s, f"{name} {'joins' if comes else 'is lost'}"))
        self._up = self._up | {name} if comes else self._up - {name}
        if self._planned is None:
            self._waited_s += max(0.0, at_s - self._now_s)
            self._now_s = max(self._now_s, at_s)
            if self._step_s_of(self._up) is not None:
                self._plan_anew()
        elif comes:
            # A job moves between two steps only.
            self._has_joined = True
        elif name in self._used_by(self._planned):
            self._now_s = max(self._now_s, at_s)
            self._repeated += self._done - self._durable
            self._done = self._durable
            self._plan_anew()
        else:
            self._planned = self._planned - {name}

    def _consider(self, step_s: float) -> None:
        """Take in who has joined, if the rest of the job gets shorter by more than moving costs."""
        self._has_joined = False
        better_s = self._step_s_of(self._up)
        if better_s is not None and (step_s - better_s) * (self._num_steps - self._done) > self._churn.recovery_s:
            self._plan_anew()

    def _plan_anew(self) -> None:
        self._has_joined = False
        if self._step_s_of(self._up) is None:
            self._planned = None
            self._events.append(RunEvent(self._now_s, f"waits: the job does not fit {len(self._up)} devices"))
            return
        self._planned = self._up
        self._now_s += self._churn.recovery_s
        used = len(self._used_by(self._up))
        self._events.append(
            RunEvent(self._now_s, f"goes on with {used} of {len(self._up)} devices from step {self._done}")
        )
