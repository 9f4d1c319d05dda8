"""Connects a :class:`JobRunner` to the coordinator: one outbound stream, one answer per question.

Fenced by the coordinator's incarnation: a runner of an earlier one is refused and ends, so that two runners of a job
never serve the same coordinator.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc

from coordinator.artifacts.parts import AssembleRequest
from coordinator.artifacts.publish import PublishRequest
from coordinator.artifacts.verify_process import VerifyProcess
from coordinator.jobs.near_end import NearEnd
from coordinator.jobs.rollouts import Rollouts
from coordinator.jobs.runner import JobRunner, Verify, rows_from_json
from plutino.data.batches import MicroBatchRows, StepBatch
from plutino.data.tokenisation import Spread
from plutino.errors import PlutinoError
from plutino.hub_id import model_folder
from plutino.job.spec import JobSpec
from plutino.security.tls import Credentials
from plutino.types import MicroBatchCut
from plutino.wire.channel import Lane, sync_channel
from plutino.wire.convert import micro_batch_to_proto
from protos import runners_pb2 as pb
from protos import runners_pb2_grpc

logger = logging.getLogger(__name__)


def run_job_runner(
    address: str,
    bulk_address: str,
    job_id: str,
    incarnation: int,
    verify: Verify | None = None,
    identity: Path | None = None,
    spread: Callable[[Path], Spread] | None = None,
) -> None:
    """Serve one job until the coordinator ends the stream or goes away.

    ``verify`` stands in the place of a process of its own, which is begun when the last step is near. ``spread`` makes,
    of a model folder, what tokenises large files elsewhere; None: nothing does.

    Raises:
        SecurityError: the runners' identity cannot be read here.
    """
    credentials = None if identity is None else Credentials(identity)
    outgoing: queue.SimpleQueue[pb.RunnerEvent | None] = queue.SimpleQueue()
    outgoing.put(pb.RunnerEvent(hello=pb.RunnerHello(job_id=job_id, incarnation=incarnation)))
    channel = sync_channel(address, Lane.REPORT, credentials)
    process = VerifyProcess()
    server = _Answers(bulk_address, verify or process, credentials, spread, None if verify else process.begin)
    try:
        for command in runners_pb2_grpc.RunnerServiceStub(channel).Run(_drain(outgoing), wait_for_ready=True):
            if command.HasField("finish"):
                break
            for event in server.answer(command):
                event.request_id = command.request_id
                outgoing.put(event)
    except grpc.RpcError as error:
        # A coordinator that comes back starts a fresh runner under its new incarnation.
        logger.info("runner of %s ends, the coordinator's stream broke: %s", job_id, error)
    finally:
        outgoing.put(None)
        channel.close()
        process.close()


def _drain(outgoing: queue.SimpleQueue[pb.RunnerEvent | None]) -> Iterator[pb.RunnerEvent]:
    while (event := outgoing.get()) is not None:
        yield event


class _Answers:
    """Turns commands into calls and results into events."""

    def __init__(
        self,
        bulk_address: str,
        verify: Verify,
        credentials: Credentials | None,
        spread: Callable[[Path], Spread] | None,
        begin_verifying: Callable[[Path], None] | None,
    ) -> None:
        self._begin_verifying = begin_verifying
        self._near_end: NearEnd | None = None
        self._spread = spread
        self._bulk_address = bulk_address
        self._credentials = credentials
        self._verify = verify
        self._runner: JobRunner | None = None
        self._base_dir: Path | None = None

    def answer(self, command: pb.RunnerCommand) -> Iterator[pb.RunnerEvent]:
        try:
            yield from self._call(command)
        except PlutinoError as error:
            yield pb.RunnerEvent(failed=pb.RunnerFailed(error=type(error).__name__, reason=str(error)))
        except Exception as error:
            logger.exception("the runner failed at %s", command.WhichOneof("command"))
            reason = f"the job's runner failed at {command.WhichOneof('command')}: {type(error).__name__}: {error}"
            yield pb.RunnerEvent(failed=pb.RunnerFailed(error="JobError", reason=reason))

    def _call(self, command: pb.RunnerCommand) -> Iterator[pb.RunnerEvent]:
        kind = command.WhichOneof("command")
        if kind == "prepare":
            spec = JobSpec.model_validate_json(command.prepare.spec_json)
            self._runner = JobRunner(spec, self._bulk_address, self._verify, self._credentials, self._spread)
            prepared = self._runner.prepare()
            self._base_dir = model_folder(spec.model.path)
            self._near_end = NearEnd(prepared.total_steps - 1)
            yield pb.RunnerEvent(prepared=pb.Prepared(json=prepared.model_dump_json()))
            return
        assert self._runner and self._near_end and self._base_dir, "the coordinator prepares a runner before it asks"
        if kind == "get_train_batch":
            ask = command.get_train_batch
            if self._begin_verifying is not None and self._near_end.is_reached(ask.step):
                self._begin_verifying(self._base_dir)
            cut: MicroBatchCut = "tokens" if ask.micro_batch_cut == "tokens" else "rows"
            yield from _batch_parts(self._runner.train_batch(ask.step, ask.micro_batch_size, cut))
        elif kind == "get_eval_batch":
            rows = command.get_eval_batch
            yield from _batch_parts(
                self._runner.eval_batch(
                    rows.start_row,
                    rows.num_rows,
                    rows.micro_batch_size,
                    from_training=rows.from_training,
                    general=rows.general,
                    by_token=rows.by_token,
                )
            )
        elif kind == "get_prompts":
            prompts = command.get_prompts
            groups = self._runner.prompts(
                prompts.start_row, prompts.num_groups, prompts.group_rows, prompts.end_row, few_shot=prompts.few_shot
            )
            yield from _parts(groups, loss_weight=1.0)
        elif kind == "get_rollout_prompts":
            yield from _parts(self._runner.rollout_prompts(command.get_rollout_prompts.step), loss_weight=1.0)
        elif kind == "reward":
            rewarded = self._runner.reward(Rollouts.model_validate_json(command.reward.rollouts_json))
            yield pb.RunnerEvent(rewarded=pb.Rewarded(json=rewarded.model_dump_json()))
        elif kind == "get_rollout_batch":
            asked = command.get_rollout_batch
            rollouts = Rollouts.model_validate_json(asked.rollouts_json)
            yield from _batch_parts(self._runner.rollout_batch(rollouts, asked.micro_batch_size))
        elif kind == "score":
            report = self._runner.score(rows_from_json(command.score.rows_json), command.score.perplexities)
            yield pb.RunnerEvent(scored=pb.Scored(json=report.model_dump_json()))
        elif kind == "assemble":
            assembled = self._runner.assemble(AssembleRequest.model_validate_json(command.assemble.request_json))
            yield pb.RunnerEvent(assembled=pb.Assembled(json=assembled.model_dump_json()))
        elif kind == "publish":
            published = self._runner.publish(PublishRequest.model_validate_json(command.publish.request_json))
            yield pb.RunnerEvent(published=pb.Published(json=published.model_dump_json()))
        else:
            raise AssertionError(f"unknown command {kind}")


def _batch_parts(batch: StepBatch) -> Iterator[pb.RunnerEvent]:
    return _parts(batch.micro_batches, loss_weight=float(batch.loss_weight))


def _parts(micro_batches: Sequence[MicroBatchRows], loss_weight: float) -> Iterator[pb.RunnerEvent]:
    for m, rows in enumerate(micro_batches):
        part = pb.BatchPart(
            num_micro_batches=len(micro_batches),
            micro_batch=m,
            loss_weight=loss_weight,
            rows=micro_batch_to_proto(rows),
            sample_indices=rows.sample_indices,
            last=m == len(micro_batches) - 1,
        )
        yield pb.RunnerEvent(batch_part=part)
