"""The parts of a job spec side by side, and what follows from several of them."""

from __future__ import annotations

from pydantic import Field

from plutino.job.auto_method import AutoMethod
from plutino.job.base import SpecPart
from plutino.job.data import DataConfig, ScoringConfig, TaskConfig
from plutino.job.evaluation import EvaluationConfig
from plutino.job.method import LoraConfig, MethodConfig
from plutino.job.model import ModelConfig
from plutino.job.objective import ObjectiveConfig, SftConfig
from plutino.job.objective_part import GENERATED_METRICS, MetricName
from plutino.job.output import OutputConfig
from plutino.job.placement import PlacementConfig
from plutino.job.training import TrainingConfig


class JobParts(SpecPart):
    """All parts of one job, each valid by itself; :class:`plutino.job.spec.JobSpec` has them go together."""

    name: str = Field("job", min_length=1, max_length=80)
    model: ModelConfig
    method: MethodConfig = LoraConfig()
    auto_method: AutoMethod | None = None
    """Set by ``method: auto``, and filled in with what decided; None: the method was named."""
    objective: ObjectiveConfig = SftConfig()
    data: DataConfig
    scoring: ScoringConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    training: TrainingConfig = TrainingConfig()
    placement: PlacementConfig = PlacementConfig()
    output: OutputConfig = OutputConfig()

    def metric_of(self, task: TaskConfig) -> MetricName:
        """How a task's held-out rows are scored."""
        if task.metric is not None:
            return task.metric
        if self.scoring is None or self.scoring.metric == "auto":
            return self.objective.own_metric
        return self.scoring.metric

    @property
    def generates(self) -> bool:
        """Whether scoring generates answers."""
        scored = [self.metric_of(task) for task in self.data.sources if task.eval is not None]
        return self.scoring is not None and any(metric in GENERATED_METRICS for metric in scored)

    @property
    def generated_rows(self) -> int:
        """Most sequences that are generated together, for scores or for steps; 0: nothing is generated."""
        of_scoring = self.scoring.batch_rows if self.scoring is not None and self.generates else 0
        return max(of_scoring, self.objective.generated_rows)

    @property
    def generated_tokens(self) -> int:
        """Most tokens of an answer that is generated."""
        of_scoring = self.scoring.max_new_tokens if self.scoring is not None and self.generates else 0
        return max(of_scoring, self.objective.generated_tokens)

    @property
    def rows_per_step(self) -> int:
        """Sequences of one optimiser step."""
        return self.training.batch_size * self.objective.sequences_per_row * self.objective.answers_per_row
