"""What a person sees of a job: numbered, stored, and sent to every watcher.

Entry points: the event classes, :func:`event_json` and :func:`parse_event`. An event's kind is the name of its class.
Events are for eyes and tables; decisions are taken from the store's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from plutino.errors import WireError


class _Value(BaseModel):
    # "strings": a loss may be inf or nan, which plain JSON cannot say and browsers refuse.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class JobEvent(_Value):
    """Something a person may want to see of a job."""

    @property
    def kind(self) -> str:
        """Name of the event's class."""
        return type(self).__name__


class WorkerName(_Value):
    """One worker as a person knows it."""

    stage_index: int
    replica_index: int = 0
    device_name: str


class JobStateChanged(JobEvent):
    """The job entered a state, or is in it for another reason."""

    state: str
    reason: str
    next_step: int
    total_steps: int


class DataRead(JobEvent):
    """The rows were read and tokenised."""

    num_train_rows: int
    num_eval_rows: int
    num_cut_rows: int = 0
    """Rows longer than max_tokens, cut at the end."""
    total_steps: int


class PlanMade(JobEvent):
    """A plan was made and its memory reserved."""

    plan_epoch: int
    plan_json: str
    """JSON of partitioner.plan.Plan."""
    search_s: float


class WorkerLoading(JobEvent):
    """How far a worker is with its stage's weights."""

    worker: WorkerName
    plan_epoch: int
    done_bytes: int
    total_bytes: int
    bytes_by_place: Mapping[str, int]
    """Where they came from: folder, cache, hub, coordinator, or a device's name."""


class WorkerLoaded(JobEvent):
    """A worker holds its stage."""

    worker: WorkerName
    plan_epoch: int
    start_block: int
    end_block: int
    bytes_read: int
    tensors_read: int
    seconds: float
    rss_bytes: int
    trainable_parameters: int
    bytes_by_place: Mapping[str, int] = {}
    """Where the weights came from: folder, cache, hub, coordinator, or a device's name."""


class WorkerStepTimes(_Value):
    """Where one worker's seconds of a step went."""

    worker: WorkerName
    total_s: float
    compute_s: float
    wait_s: float
    serialise_s: float
    commit_s: float
    sent_bytes: int
    rss_bytes: int
    peak_rss_bytes: int
    cached_rows: int = 0
    """Rows, since the worker started, whose hidden states came from the activation cache: its blocks did not run."""
    left_out_rows: int = 0
    """Rows that had no room in the activation cache."""
    damaged_entries: int = 0
    """Entries of the activation cache whose checksum was wrong; they were computed again."""


class StepCommitted(JobEvent):
    """An optimiser step became true on all workers."""

    step: int
    """Counted from 0."""
    plan_epoch: int
    loss: float
    """Mean over the step's label tokens, or its rows, as the objective has it."""
    grad_norm: float
    """Before clipping."""
    clip_scale: float
    lr: float
    tokens: int
    """Tokens fed, prompts included."""
    label_tokens: int
    seconds: float
    commit_s: float
    """From the last vote to the row on disk."""
    workers: tuple[WorkerStepTimes, ...] = ()
    counts: Mapping[str, float] = {}
    """Of sampled answers: mean reward and its deviation, tokens, KL from the base, share of clipped tokens."""


class StepSkipped(JobEvent):
    """All workers dropped a step's gradients."""

    step: int
    plan_epoch: int
    reason: str


class Evaluated(JobEvent):
    """The loss of the held-out rows was measured."""

    step: int
    """Number of steps done."""
    loss: float
    """Mean over the held-out rows' label tokens."""
    is_best: bool
    seconds: float


class ScoredRow(_Value):
    """One held-out row with the answer that the model gave."""

    prompt: str
    expected: str
    answer: str
    is_right: bool


class ScoringDone(JobEvent):
    """Generated answers were compared with the true ones."""

    when: Literal["before", "after"]
    """before: the base model alone. after: with the adapter."""
    num_rows: int
    metrics: Mapping[str, float]
    """Shares between 0 and 1, by name."""
    sample_rows: tuple[ScoredRow, ...]
    seconds: float


class ShadowDurable(JobEvent):
    """A step's whole state lies on the coordinator's disk: a lost worker costs no step before it."""

    step: int
    """Number of steps done."""
    bytes: int
    num_shadows: int


class WorkerLost(JobEvent):
    """A worker's memory is gone."""

    worker: WorkerName
    plan_epoch: int
    reason: str
    out_of_memory: bool = False


class Recovering(JobEvent):
    """What was decided after a loss."""

    decision: Literal["resume", "return", "restart", "park", "fail"]
    step: int
    """The step that is run next."""
    plan_epoch: int
    undone_steps: int
    reason: str


class PlanChanges(JobEvent):
    """The job moves to a better plan at this step; nothing is undone."""

    step: int
    """Steps done."""
    plan_epoch: int
    """Of the new plan."""
    reason: str
    """What goes from whom to whom, why, and what it gains."""


class Moved(JobEvent):
    """A job that changed its plan runs again."""

    step: int
    """Steps done."""
    plan_epoch: int
    """Of the new plan."""
    seconds: float
    """From the decision to the first step."""
    seconds_by_part: Mapping[str, float]
    """store (the state made durable), stop (workers give their stages back), plan, load, link."""
    loading_by_part: Mapping[str, float]
    """Of the worker that loaded longest: weights, adapter, cache, state."""
    state_by_place: Mapping[str, int] = {}
    """Bytes of training state that all workers read: kept (by the process), a device's name, coordinator."""
    num_went_on: int
    """Workers whose process had run the plan before; the others' were started."""
    num_workers: int


class Recovered(JobEvent):
    """Steps run again after a loss."""

    step: int
    plan_epoch: int
    seconds: float
    """From the loss to the first step."""


class Verification(_Value):
    """One check that the adapter passed before it was published."""

    name: str
    result: str


class Exported(JobEvent):
    """The adapter, or the whole model, was verified and published."""

    adapter_dir: str
    bytes: int
    num_tensors: int
    checks: tuple[Verification, ...]
    loading_code: str = ""
    """Python that loads it."""
    measures: tuple[tuple[str, str], ...] = ()
    """Beside losses and scores: general ability, the base model with examples, rewards; names with their values."""


class WorkerUsage(_Value):
    """Memory and processor time of one worker."""

    worker: WorkerName
    rss_bytes: int
    peak_rss_bytes: int
    cpu_s: float
    predicted_peak_bytes: int


class Usage(JobEvent):
    """What the job's workers use at the moment."""

    workers: tuple[WorkerUsage, ...]


class Notice(JobEvent):
    """A sentence for a person."""

    level: Literal["info", "warning"]
    text: str


EVENTS: dict[str, type[JobEvent]] = {
    "JobStateChanged": JobStateChanged,
    "DataRead": DataRead,
    "PlanMade": PlanMade,
    "WorkerLoading": WorkerLoading,
    "WorkerLoaded": WorkerLoaded,
    "StepCommitted": StepCommitted,
    "StepSkipped": StepSkipped,
    "Evaluated": Evaluated,
    "ScoringDone": ScoringDone,
    "ShadowDurable": ShadowDurable,
    "WorkerLost": WorkerLost,
    "Recovering": Recovering,
    "PlanChanges": PlanChanges,
    "Moved": Moved,
    "Recovered": Recovered,
    "Exported": Exported,
    "Usage": Usage,
    "Notice": Notice,
}


def event_json(event: JobEvent) -> str:
    """The event as :func:`parse_event` takes it; its kind travels beside it."""
    return event.model_dump_json()


def parse_event(kind: str, text: str) -> JobEvent:
    """The event of a kind from its JSON.

    Raises:
        WireError: the kind is unknown, or the JSON is not one of it.
    """
    event = EVENTS.get(kind)
    if event is None:
        raise WireError(f"the coordinator sent an event of unknown kind {kind!r}; upgrade plutino on this side")
    try:
        return event.model_validate_json(text)
    except ValidationError as error:
        raise WireError(
            f"an event of kind {kind} cannot be read ({error.error_count()} problems, the first: "
            f"{error.errors()[0]['msg']}); coordinator and client should be of one version"
        ) from error
