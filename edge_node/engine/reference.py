"""All stages of a job in one process, one thread each: the oracle that the distributed run is held against.

The same executors run here as in worker processes; only the transport differs. With one stage and one replica it is
plain single-process training. Units are ended as a worker's session ends them; votes are counted by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

import torch

from edge_node.activation_cache.stage_cache import StageCache
from edge_node.engine.executor import StageExecutor
from edge_node.engine.generate import GenerateOptions, generate
from edge_node.engine.optimizer import StageOptimizer
from edge_node.engine.unit import StepOutcome, UnitInput
from edge_node.methods.base import AttachedMethod
from edge_node.methods.score_head import attach_method
from edge_node.objectives.registry import OBJECTIVES
from edge_node.stage.build import build_stage
from edge_node.stage.stage import Stage
from edge_node.stage.weights import TensorSource
from edge_node.transport.base import Peer, UnitCancelledError
from edge_node.transport.in_process import InProcessHub, InProcessTransport
from plutino.data.batches import MicroBatchRows
from plutino.errors import PeerLostError
from plutino.job.assignment import StageShape
from plutino.job.model import PLAIN, Packing
from plutino.job.spec import JobSpec
from plutino.types import Unit, UnitKind

Result = TypeVar("Result")


class InProcessPipeline:
    """Executors of all stages and replicas, driven in lock step.

    Args:
        source: opens the model; called once per executor.
        spec: the job.
        stages: the partition.
        total_steps: length of the learning-rate schedule.
        dtype: compute dtype of the frozen layers.
        checkpointing: recompute each block in the backward pass.
        attention: transformers' attention backend; None: the family's.
        threads: intra-op threads of every executor.
        packing: how frozen weights are held.
        device: where all stages compute.
        activation_cache: makes a stage's part of the activation cache; None: there is none.
        from_cache: without the backbone, on what the activation cache holds.
        entry_owners: who keeps the entries of a step's micro-batch m, see :mod:`edge_node.engine.entry_owners`.
    """

    def __init__(
        self,
        source: Callable[[], TensorSource],
        spec: JobSpec,
        stages: Sequence[StageShape],
        *,
        total_steps: int,
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
        attention: str | None = None,
        threads: int = 1,
        packing: Packing = PLAIN,
        device: torch.device | None = None,
        activation_cache: Callable[[Stage], StageCache] | None = None,
        from_cache: bool = False,
        entry_owners: Sequence[Peer] = (),
        bf16_borders: Sequence[int] = (),
    ) -> None:
        self._threads = threads
        self._spec = spec
        hub = InProcessHub()
        attached: dict[Peer, tuple[Stage, AttachedMethod]] = {}
        for stage_index, shape in enumerate(stages):
            for replica_index in range(shape.num_replicas):
                stage = build_stage(
                    source(),
                    shape.start_block,
                    shape.end_block,
                    dtype=dtype,
                    attention=attention,
                    checkpointing=checkpointing,
                    packing=packing,
                    device=device or torch.device("cpu"),
                    has_lm_head=not spec.objective.has_score_head,
                    has_backbone=not from_cache,
                )
                stage.round_at(bf16_borders)
                method = attach_method(stage, spec)
                attached[Peer(stage_index, replica_index)] = stage, method

        def codec_at(border: int) -> str:
            return "bf16" if spec.placement.codec == "bf16" or border in bf16_borders else "raw"

        first_trainable_stage = min(me.stage_index for me, (_, method) in attached.items() if method.parameters)
        self._transports: dict[Peer, InProcessTransport] = {me: hub.transport(me) for me in attached}
        self.executors: dict[Peer, StageExecutor] = {
            me: StageExecutor(
                stage=stage,
                method=method,
                objective=OBJECTIVES[spec.objective.type](spec.objective),
                optimizer=StageOptimizer(method.parameters, spec.training, total_steps),
                transport=self._transports[me],
                stages=stages,
                me=me,
                seed=spec.training.seed,
                codec_above=codec_at(stage.start_block),
                codec_below=codec_at(stage.end_block),
                first_trainable_stage=first_trainable_stage,
                unfreezing=spec.method.unfreezing,
                replicas_fold=spec.placement.numerics == "free",
                sums=spec.placement.sums,
                activation_cache=None if activation_cache is None else activation_cache(stage),
                entry_owners=entry_owners,
            )
            for me, (stage, method) in attached.items()
        }
        self._pool = ThreadPoolExecutor(len(self.executors), thread_name_prefix="stage")

    def __enter__(self) -> InProcessPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def train_step(self, step: int, rows: Sequence[MicroBatchRows], loss_weight: float) -> dict[Peer, StepOutcome]:
        """Run one step up to the vote."""
        work = UnitInput(Unit(UnitKind.TRAIN, step), len(rows), loss_weight, tuple(rows))
        return self._run_unit(work, lambda executor: executor.train_step(work))

    def commit(self, step: int, clip_scale: float) -> None:
        """Apply the step on every executor."""
        self._everywhere(lambda executor: executor.commit(step, clip_scale))

    def drop(self) -> None:
        """Forget the step that was voted on, on every executor."""
        self._everywhere(StageExecutor.drop)

    def evaluate(self, serial: int, rows: Sequence[MicroBatchRows], *, without_adapter: bool = False) -> float:
        """Sum of token losses, of the adapted model or of the base."""
        unit = Unit(UnitKind.EVALUATE, serial)
        work = UnitInput(unit, len(rows), 1.0, tuple(rows), without_adapter=without_adapter)
        return sum(self._run_unit(work, lambda executor: executor.evaluate(work)).values())

    def evaluate_rows(
        self,
        serial: int,
        rows: Sequence[MicroBatchRows],
        *,
        use_adapter: bool = True,
        by_reward_adapter: bool = False,
    ) -> tuple[float, list[torch.Tensor]]:
        """Sum of losses, and what the objective says of the rows of each micro-batch, [B, K] each."""
        unit = Unit(UnitKind.EVALUATE, serial)
        work = UnitInput(unit, len(rows), 1.0, tuple(rows), not use_adapter, by_reward_adapter=by_reward_adapter)
        results = self._run_unit(work, lambda executor: executor.evaluate_rows(work)).values()
        values = {m: of_m for _, of_worker in results for m, of_m in of_worker.items()}
        return sum(loss_sum for loss_sum, _ in results), [values[m] for m in sorted(values)]

    def generate(
        self, serial: int, groups: Sequence[MicroBatchRows], options: GenerateOptions
    ) -> list[list[list[int]]]:
        """New tokens per group and row."""
        work = UnitInput(Unit(UnitKind.GENERATE, serial), len(groups), 1.0, tuple(groups))
        seed = self._spec.training.seed
        results = self._run_unit(work, lambda executor: generate(executor, work, options, seed=seed))
        return next(rows for rows in results.values() if rows)

    def cancel(self, unit: Unit) -> None:
        """Abandon a unit, from any thread: whoever runs it gets UnitCancelledError."""
        for executor in self.executors.values():
            executor.cancel(unit)
        for transport in self._transports.values():
            transport.cancel(unit)

    def state(self) -> dict[str, torch.Tensor]:
        """The whole adapter by global name."""
        return {name: value for e in self.executors.values() for name, value in e.method.state().items()}

    def snapshot(self) -> dict[str, torch.Tensor]:
        """The whole training state by global name, as the stages' shadows hold it together."""
        parts = self._everywhere(lambda executor: executor.snapshot())
        return {name: value for part in parts.values() for name, value in part.items()}

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Load what :meth:`snapshot` gave, of this or of any other partition."""
        self._everywhere(lambda executor: executor.optimizer.restore(snapshot))

    def close(self) -> None:
        """End the transports and the threads."""
        for transport in self._transports.values():
            transport.close()
        self._pool.shutdown()

    def _run_unit(self, work: UnitInput, call: Callable[[StageExecutor], Result]) -> dict[Peer, Result]:
        def run(executor: StageExecutor) -> Result:
            try:
                return call(executor)
            finally:
                executor.transport.finish(work.unit)

        return self._everywhere(run)

    def _everywhere(self, call: Callable[[StageExecutor], Result]) -> dict[Peer, Result]:
        """Call on every executor at once.

        Raises:
            Exception: what one of them raised. Unless all were cancelled the pipeline is then at its end, because
                nobody can wait any more for the one that failed.
        """

        def run(me: Peer, executor: StageExecutor) -> Result:
            # The thread count set in the main thread does not hold in others.
            torch.set_num_threads(self._threads)
            try:
                return call(executor)
            except UnitCancelledError:
                raise
            except Exception:
                self._transports[me].close()
                raise

        futures = {me: self._pool.submit(run, me, executor) for me, executor in self.executors.items()}
        wait(futures.values())
        errors = [error for future in futures.values() if (error := future.exception()) is not None]
        if errors:
            # A lost peer is the consequence of another executor's failure.
            raise next((error for error in errors if not isinstance(error, PeerLostError)), errors[0])
        return {me: future.result() for me, future in futures.items()}
