"""All stages of a job in one process, one thread each: the oracle that the distributed run is held against.

The same executors run here as in worker processes; only the transport differs. With one stage and one replica it is
plain single-process training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from edge_node.engine.executor import StageExecutor, StepOutcome, UnitInput
from edge_node.engine.generate import GenerateOptions, generate
from edge_node.engine.optimizer import StageOptimizer
from edge_node.methods.registry import METHODS
from edge_node.objectives.registry import OBJECTIVES
from edge_node.stage.build import build_stage
from edge_node.stage.weights import TensorSource
from edge_node.transport.base import Peer
from edge_node.transport.in_process import InProcessHub
from plutino.data.batches import MicroBatchRows
from plutino.job.assignment import StageShape
from plutino.job.spec import JobSpec
from plutino.types import Unit, UnitKind

Result = TypeVar("Result")


class InProcessPipeline:
    """Executors of all stages and replicas, driven in lock step."""

    def __init__(
        self,
        source: Callable[[], TensorSource],
        spec: JobSpec,
        stages: Sequence[StageShape],
        *,
        total_steps: int,
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
        attention: str = "sdpa",
        threads: int = 1,
    ) -> None:
        self._threads = threads
        self._spec = spec
        hub = InProcessHub()
        self.executors: dict[Peer, StageExecutor] = {}
        for stage_index, shape in enumerate(stages):
            for replica_index in range(shape.num_replicas):
                me = Peer(stage_index, replica_index)
                stage = build_stage(
                    source(),
                    shape.start_block,
                    shape.end_block,
                    dtype=dtype,
                    attention=attention,
                    checkpointing=checkpointing,
                )
                method = METHODS[spec.method.type](stage, spec.method, seed=spec.training.seed)
                self.executors[me] = StageExecutor(
                    stage=stage,
                    method=method,
                    objective=OBJECTIVES[spec.objective.type](),
                    optimizer=StageOptimizer(method.parameters, spec.training, total_steps),
                    transport=hub.transport(me),
                    stages=stages,
                    me=me,
                    seed=spec.training.seed,
                    codec=spec.placement.codec,
                )
        self._pool = ThreadPoolExecutor(len(self.executors), thread_name_prefix="stage")

    def train_step(self, step: int, rows: Sequence[MicroBatchRows], loss_weight: float) -> dict[Peer, StepOutcome]:
        """Run one step up to the vote."""
        work = UnitInput(Unit(UnitKind.TRAIN, step), len(rows), loss_weight, tuple(rows))
        return self._everywhere(lambda executor: executor.train_step(work))

    def commit(self, step: int, clip_scale: float) -> None:
        """Apply the step on every executor."""
        self._everywhere(lambda executor: executor.commit(step, clip_scale))

    def evaluate(self, serial: int, rows: Sequence[MicroBatchRows]) -> float:
        """Sum of token losses."""
        work = UnitInput(Unit(UnitKind.EVALUATE, serial), len(rows), 1.0, tuple(rows))
        return sum(self._everywhere(lambda executor: executor.evaluate(work)).values())

    def generate(self, serial: int, groups: Sequence[MicroBatchRows], options: GenerateOptions) -> list[list[list[int]]]:
        """New tokens per group and row."""
        work = UnitInput(Unit(UnitKind.GENERATE, serial), len(groups), 1.0, tuple(groups))
        seed = self._spec.training.seed
        results = self._everywhere(lambda executor: generate(executor, work, options, seed=seed))
        return next(rows for rows in results.values() if rows)

    def state(self) -> dict[str, torch.Tensor]:
        """The whole adapter by global name."""
        return {name: value for e in self.executors.values() for name, value in e.method.state().items()}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _everywhere(self, call: Callable[[StageExecutor], Result]) -> dict[Peer, Result]:
        def run(executor: StageExecutor) -> Result:
            # The thread count set in the main thread does not hold in others.
            torch.set_num_threads(self._threads)
            return call(executor)

        futures = {me: self._pool.submit(run, executor) for me, executor in self.executors.items()}
        return {me: future.result() for me, future in futures.items()}
