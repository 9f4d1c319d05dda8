"""What a worker says of its work: a step's vote with its times, generated rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import get_args

from torch import Tensor

from edge_node.activation_cache.stage_cache import CacheCounts, StageCache
from edge_node.compute_device import ComputeDevice
from edge_node.engine.executor import StageExecutor
from edge_node.engine.generate import GenerateOptions, generate
from edge_node.engine.recorder import StepRecorder
from edge_node.engine.unit import StepOutcome
from edge_node.inbox import UnitTask
from edge_node.loading import LoadingClock
from edge_node.methods.base import AttachedMethod
from edge_node.stage.stage import Stage
from edge_node.stage.verify import part_difference
from edge_node.transport.peer import PeerTransport
from partitioner.trace import SpanKind
from protos import workers_pb2 as pb

_KINDS: tuple[SpanKind, ...] = get_args(SpanKind)


def stage_loaded(
    stage: Stage,
    method: AttachedMethod,
    clock: LoadingClock,
    *,
    is_resident: bool,
    went_on: bool,
    state_by_place: Mapping[str, int],
    rss_bytes: int,
    data_address: str,
    bytes_by_place: Mapping[str, int],
) -> pb.StageLoaded:
    """A worker holds its stage.

    Args:
        stage: with its method attached.
        method: what is trained.
        clock: where the seconds went.
        is_resident: an earlier job had loaded the stage.
        went_on: the worker's process has the job's plan before behind it.
        state_by_place: where the training state came from; empty for fresh values.
        rss_bytes: what the device's memory holds of it now.
        data_address: where peers reach the worker; empty without any.
        bytes_by_place: where the weights came from.
    """
    return pb.StageLoaded(
        bytes_read=0 if is_resident else stage.bytes_read,
        tensors_read=0 if is_resident else stage.tensors_read,
        seconds=clock.total_s,
        seconds_by_part=clock.seconds_by_part,
        went_on=went_on,
        state_by_place=state_by_place,
        rss_bytes=rss_bytes,
        parameter_names=[p.name for p in method.parameters],
        trainable_parameters=sum(p.uses[0][1].numel() for p in method.parameters),
        data_address=data_address,
        adapter_config_json=json.dumps(method.peft_config(), sort_keys=True),
        bytes_by_place=bytes_by_place,
    )


def part_verified(executor: StageExecutor, request_id: str, published: Mapping[str, Tensor]) -> pb.PartVerified:
    """How far a stage's outputs with the published part are from those with its live part."""
    difference = part_difference(executor.stage, executor.method, published)
    return pb.PartVerified(request_id=request_id, largest_difference=difference)


def step_vote(
    plan_epoch: int,
    step: int,
    outcome: StepOutcome,
    *,
    device: ComputeDevice,
    transport: PeerTransport | None,
    activations: StageCache | None,
    encode_s: float,
    commit_s: float,
) -> pb.StepReady:
    """The vote on a step.

    Args:
        plan_epoch: of the plan that the worker runs.
        step: the step.
        outcome: what came out of it.
        device: where it was computed.
        transport: has counted what was sent; None: the job has one worker.
        activations: has counted what was read; None: the job has no activation cache.
        encode_s: seconds of encoding messages since the last vote.
        commit_s: seconds from the last vote to its decision.
    """
    counts = CacheCounts() if activations is None else activations.counts
    return pb.StepReady(
        plan_epoch=plan_epoch,
        step=step,
        squared_norms=outcome.squared_norms,
        finite=outcome.is_finite,
        loss_sum=outcome.loss_sum,
        reason=outcome.reason,
        counts=outcome.counts,
        times=pb.StepTimes(
            total_s=outcome.times.total_s,
            compute_s=outcome.times.compute_s,
            wait_s=outcome.times.wait_s,
            serialise_s=outcome.times.send_s + encode_s,
            commit_s=commit_s,
            sent_bytes=0 if transport is None else transport.usage.sent_bytes,
            rss_bytes=device.held_bytes(),
            peak_rss_bytes=device.peak_bytes(),
            cached_rows=counts.rows_read,
            left_out_rows=counts.rows_left_out,
            damaged_entries=0 if activations is None else activations.num_damaged,
        ),
    )


def step_trace(step: int, recorder: StepRecorder) -> pb.StepTrace:
    """What a worker recorded of a step, from its first span on."""
    spans = recorder.spans
    zero_s = min((span.start_s for span in spans), default=0.0)
    return pb.StepTrace(
        step=step,
        kinds=[_KINDS.index(span.kind) for span in spans],
        micro_batches=[span.micro_batch for span in spans],
        start_us=[round((span.start_s - zero_s) * 1e6) for span in spans],
        duration_us=[round((span.end_s - span.start_s) * 1e6) for span in spans],
        num_left_out=recorder.num_left_out,
    )


def generated_rows(executor: StageExecutor, task: UnitTask, *, seed: int) -> list[pb.TokenRow]:
    """Run a unit of generation; its rows where they come out, nothing elsewhere."""
    if task.generate is None:
        return []  # the first replica of every stage generates; the others got a header alone
    options = GenerateOptions(
        max_new_tokens=task.generate.max_new_tokens,
        stop_tokens=tuple(task.generate.stop_tokens),
        temperature=task.generate.temperature,
        top_p=task.generate.top_p or 1.0,
        keep_stop=task.generate.keep_stop,
        use_adapter=task.generate.use_adapter,
        step=task.generate.step,
        sample_indices=task.sample_indices,
    )
    groups = generate(executor, task.work, options, seed=seed)
    return [
        pb.TokenRow(row=sample, tokens=tokens)
        for samples, rows in zip(task.sample_indices, groups, strict=False)
        for sample, tokens in zip(samples, rows, strict=True)
    ]
