"""From trained stages to a published adapter: restore the best step, score, assemble, verify, publish."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import psutil

from coordinator.artifacts.card import CardFacts, DataFile, ScoreFacts, TrainingLosses
from coordinator.artifacts.card import Evaluation as EvaluationFacts
from coordinator.artifacts.loading import loading_code
from coordinator.artifacts.parts import AssembledAdapter, AssembleRequest
from coordinator.artifacts.publish import PublishedAdapter, PublishRequest
from coordinator.artifacts.verify_process import Check, Probe, ProbeRows
from coordinator.crash_points import crash_point
from coordinator.jobs import events as job_events
from coordinator.jobs.ability import ability_lines, ability_of, measure_general
from coordinator.jobs.context import JobContext
from coordinator.jobs.lineage import surviving
from coordinator.jobs.prepared import PreparedData, for_devices
from coordinator.jobs.restoring import restorable
from coordinator.jobs.scoring import ScoreReport
from coordinator.jobs.scoring_moments import score_once
from coordinator.jobs.trained import reward_lines, trained_share
from coordinator.jobs.units import PROBE_ROWS, Batch, Evaluation, evaluate, probe_batch
from partitioner.explain import explain
from plutino.errors import ExportError
from plutino.events import Exported, Verification
from plutino.hub_id import model_folder
from plutino.manifest import base_model_hash
from protos import runners_pb2 as runner_pb
from protos import workers_pb2 as pb

_RELOAD_SHARE = 0.5
"""The coordinator reloads the base to verify the adapter only if that takes at most this share of its free memory."""


async def export(context: JobContext, prepared: PreparedData, *, default_dir: Path) -> job_events.Exported:
    """Publish the adapter, whole and verified, if the job wants one; without, only the state is chosen and scored.

    Raises:
        ExportError: a check failed; nothing was published.
    """
    step = await _choose_state(context)
    if context.spec.scoring is not None and context.spec.scoring.after:
        await score_once(context, prepared, "after")
    await measure_general(context, prepared, "general_after")
    if not context.spec.output.publish:
        return job_events.Exported(adapter_dir=None)
    batch = await probe_batch(context, prepared)
    measured = await evaluate(context, num_rows=min(PROBE_ROWS, prepared.num_probe), source="training")
    output_dir = context.spec.output.dir or str(default_dir)
    assembled = await _assemble(context, step, output_dir, _probe(context, prepared, batch, measured))
    crash_point("adapter_assembled")
    worker_check = await _verify_on_workers(context, assembled)
    trained = await asyncio.to_thread(trained_share, context.spec)
    card = _card(context, prepared, step, assembled, worker_check, trained)
    request = PublishRequest(
        job_id=context.job_id,
        step=step,
        staging_dir=assembled.staging_dir,
        output_dir=output_dir,
        adapter_sha256=assembled.adapter_sha256,
        model_files=assembled.model_files,
        card=card,
    )
    command = runner_pb.RunnerCommand(publish=runner_pb.Publish(request_json=request.model_dump_json()))
    answer = await context.runner.ask(command)
    published = PublishedAdapter.model_validate_json(answer[-1].published.json)
    crash_point("adapter_published")
    checks = (*assembled.checks, worker_check)
    await context.tell(
        Exported(
            adapter_dir=published.output_dir,
            bytes=published.adapter_bytes,
            num_tensors=len(context.record.parameter_names),
            checks=tuple(Verification(name=name, result=outcome) for name, outcome in checks),
            loading_code=loading_code(card.method, card.objective, card.base_path, published.output_dir, card.dtype),
            measures=card.measures,
        )
    )
    return job_events.Exported(adapter_dir=published.output_dir)


async def _choose_state(context: JobContext) -> int:
    """Let the workers hold the state that is published, durable; gives its step."""
    last, best = context.record.next_step, context.record.best_step
    if not context.spec.training.keep_best or best is None or best == last:
        if context.spec.output.publish and last not in context.durable():
            context.workers.tell(pb.WorkerCommand(take_shadow=pb.TakeShadow(step=last)), key="take_shadow")
            await context.workers.wait(lambda: last in context.durable())
            context.workers.forget("take_shadow")
        return last
    restore = pb.Restore(step=best, shadows=restorable(context, best))
    context.workers.tell(pb.WorkerCommand(restore=restore), key="restore")
    await context.workers.wait(lambda: all(s.restored_step == best for s in context.workers.statuses))
    context.workers.forget("restore")
    return best


def _probe(context: JobContext, prepared: PreparedData, batch: Batch, measured: Evaluation) -> Probe:
    rows = tuple(
        ProbeRows(
            lengths=tuple(part.rows.lengths),
            input_ids=tuple(np.frombuffer(part.rows.input_ids, "<i4").tolist()),
            label_mask=tuple(part.rows.label_mask),
            padded_tokens=part.rows.padded_tokens,
            labels=tuple(part.rows.labels),
            second_starts=tuple(part.rows.second_starts),
            pair_ids=tuple(part.rows.pair_ids),
            reference_logps=tuple(part.rows.reference_logps),
        )
        for part in batch.parts
    )
    return Probe(
        micro_batches=rows,
        loss_sum=measured.loss_sum,
        num_counted=measured.loss_weight,
        objective=for_devices(context.spec, prepared).objective,
        dtype=context.numerics.dtype,
        packing=context.numerics.packing,
    )


async def _assemble(context: JobContext, step: int, output_dir: str, probe: Probe) -> AssembledAdapter:
    loaded = context.workers.statuses[0].loaded
    assert loaded is not None, "all workers are loaded while the job is finalising"
    request = AssembleRequest(
        job_id=context.job_id,
        step=step,
        shadows=restorable(context, step),
        parameter_names=context.record.parameter_names,
        adapter_config_json=loaded.adapter_config_json,
        output_dir=output_dir,
        base_hash=base_model_hash(model_folder(context.spec.model.path)),
        verify_reload_budget_bytes=int(psutil.virtual_memory().available * _RELOAD_SHARE),
        probe=probe,
    )
    command = runner_pb.RunnerCommand(assemble=runner_pb.Assemble(request_json=request.model_dump_json()))
    answer = await context.runner.ask(command)
    return AssembledAdapter.model_validate_json(answer[-1].assembled.json)


async def _verify_on_workers(context: JobContext, assembled: AssembledAdapter) -> Check:
    """Every worker's outputs with the published part must be those with its live part, to the bit."""
    if not assembled.shadow_id:
        return "workers", "not asked: the published weights are those that they sent, compared tensor by tensor"
    request_id = assembled.adapter_sha256
    verify = pb.VerifyPart(request_id=request_id, shadow_id=assembled.shadow_id, sha256=assembled.adapter_sha256)
    context.workers.tell(pb.WorkerCommand(verify_part=verify), key="verify_part")
    await context.workers.wait(lambda: all(request_id in s.verified for s in context.workers.statuses))
    context.workers.forget("verify_part")
    for status in context.workers.statuses:
        verified = status.verified[request_id]
        if verified.error or verified.largest_difference != 0.0:
            raise ExportError(
                f"stage {status.ref.stage_index} gives other outputs with the assembled adapter than with its live "
                f"parameters: largest difference {verified.largest_difference} {verified.error}; nothing was published"
            )
    return (
        "workers",
        f"all {len(context.workers.statuses)} workers give bit-equal outputs with the published part and with their "
        "live parameters",
    )


def _card(
    context: JobContext,
    prepared: PreparedData,
    step: int,
    assembled: AssembledAdapter,
    worker_check: Check,
    trained: tuple[int, float],
) -> CardFacts:
    spec, record = context.spec, context.record
    num_trained, share = trained
    losses = [row.loss for row in surviving(context.store.ledger(context.job_id)) if row.loss is not None]
    data = [DataFile(use=one.use, name=one.name, sha256=one.sha256, num_rows=one.num_rows) for one in prepared.files]
    stored = context.store.scores(context.job_id)
    scores = {
        moment: ScoreReport.model_validate_json(text)
        for moment, text in stored.items()
        if moment in ("before", "after")
    }
    return CardFacts(
        job_name=spec.name,
        base_path=spec.model.path,
        base_hash=base_model_hash(model_folder(spec.model.path)),
        data=tuple(data),
        method=spec.method,
        objective=for_devices(spec, prepared).objective,
        training=spec.training,
        dtype=context.numerics.dtype,
        plan_text=explain(context.plan),
        num_steps=step,
        losses=TrainingLosses(first=losses[0], last=losses[-1], best=min(losses)),
        evaluations=tuple(
            EvaluationFacts(step=row.step, loss=row.loss) for row in context.store.evaluations(context.job_id)
        ),
        score_before=_score_facts(scores.get("before")),
        score_after=_score_facts(scores.get("after")),
        num_trained=num_trained,
        trained_share=share,
        measures=(
            *ability_lines(ability_of(stored, 0 if spec.scoring is None else spec.scoring.few_shot)),
            *reward_lines(context.store, context.job_id),
        ),
        checks=(*assembled.checks, worker_check),
        was_reloaded=assembled.was_reloaded,
        versions=context.numerics.versions,
        training_s=time.time() - record.submitted_at_s,
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def _score_facts(report: ScoreReport | None) -> ScoreFacts | None:
    return None if report is None else ScoreFacts(num_rows=report.num_rows, values=report.values)
