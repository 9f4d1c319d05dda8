"""Between the store's values and SQLite's rows: one pair of functions a table."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from coordinator.jobs.lineage import EvaluationRow, LedgerRow, LedgerStatus
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.recovery import Shadow
from coordinator.scheduling.scheduler import Reservation
from coordinator.storage.base import NumberedEvent, TransitionRow
from plutino.events import parse_event
from plutino.types import AgentId, JobId

Parameters = dict[str, Any]

_JOB_COLUMNS = (
    "state",
    "reason",
    "plan_epoch",
    "recoveries",
    "start_step",
    "next_step",
    "total_steps",
    "final_step",
    "best_step",
    "best_eval_loss",
    "evaluations_since_best",
    "ended_at_s",
    "adapter_dir",
)
"""The columns that a change may touch."""

_DOCUMENTS = ("spec_json", "plan_json", "numerics_json", "parameter_names")
"""Fields of a job that are long and seldom change."""

INSERT_JOB = (
    f"INSERT INTO jobs (job_id, name, submitted_at_s, {', '.join(_JOB_COLUMNS)}) "
    f"VALUES (:job_id, :name, :submitted_at_s, {', '.join(':' + column for column in _JOB_COLUMNS)})"
)
UPDATE_JOB = f"UPDATE jobs SET {', '.join(f'{column} = :{column}' for column in _JOB_COLUMNS)} WHERE job_id = :job_id"
INSERT_LEDGER_ROW = (
    "INSERT INTO ledger (job_id, plan_epoch, step, status, sample_indices, loss, grad_norm, clip_scale, lr, reason) "
    "VALUES (:job_id, :plan_epoch, :step, :status, :sample_indices, :loss, :grad_norm, :clip_scale, :lr, :reason)"
)
INSERT_SHADOW = (
    "INSERT INTO shadows (job_id, shadow_id, step, plan_epoch, sha256, bytes, parameter_names) "
    "VALUES (:job_id, :shadow_id, :step, :plan_epoch, :sha256, :bytes, :parameter_names)"
)


def job_parameters(record: JobRecord) -> Parameters:
    """Named parameters for INSERT_JOB and UPDATE_JOB."""
    values = {column: getattr(record, column) for column in _JOB_COLUMNS}
    return {
        **values,
        "state": record.state.value,
        "job_id": record.job_id,
        "name": record.name,
        "submitted_at_s": record.submitted_at_s,
    }


def job_documents(record: JobRecord) -> dict[str, str | None]:
    """The job's long texts by name; None for one that it does not have."""
    return {
        "spec_json": record.spec_json,
        "plan_json": record.plan_json,
        "numerics_json": record.numerics_json,
        "parameter_names": json.dumps(record.parameter_names),
    }


def changed_documents(before: JobRecord, after: JobRecord) -> dict[str, str | None]:
    """The long texts that differ; a step changes none of them, and compares only references."""
    if all(getattr(before, name) is getattr(after, name) for name in _DOCUMENTS):
        return {}
    old = job_documents(before)
    return {name: text for name, text in job_documents(after).items() if text != old[name]}


def job_record(row: sqlite3.Row, documents: dict[str, str]) -> JobRecord:
    """A job from its row and its documents."""
    values = {column: row[column] for column in _JOB_COLUMNS}
    values["state"] = JobState(row["state"])
    return JobRecord(
        job_id=JobId(row["job_id"]),
        name=row["name"],
        submitted_at_s=row["submitted_at_s"],
        spec_json=documents["spec_json"],
        plan_json=documents.get("plan_json"),
        numerics_json=documents.get("numerics_json"),
        parameter_names=tuple(json.loads(documents["parameter_names"])),
        **values,
    )


def ledger_parameters(job_id: JobId, row: LedgerRow) -> Parameters:
    """Named parameters for INSERT_LEDGER_ROW."""
    return {
        "job_id": job_id,
        "plan_epoch": row.plan_epoch,
        "step": row.step,
        "status": row.status.value,
        "sample_indices": json.dumps(row.sample_indices, separators=(",", ":")),
        "loss": row.loss,
        "grad_norm": row.grad_norm,
        "clip_scale": row.clip_scale,
        "lr": row.lr,
        "reason": row.reason,
    }


def ledger_row(row: sqlite3.Row) -> LedgerRow:
    """A row of the ledger."""
    return LedgerRow(
        step=row["step"],
        plan_epoch=row["plan_epoch"],
        status=LedgerStatus(row["status"]),
        sample_indices=tuple(json.loads(row["sample_indices"])),
        loss=row["loss"],
        grad_norm=row["grad_norm"],
        clip_scale=row["clip_scale"],
        lr=row["lr"],
        reason=row["reason"],
    )


def shadow_parameters(job_id: JobId, shadow: Shadow) -> Parameters:
    """Named parameters for INSERT_SHADOW."""
    return {
        "job_id": job_id,
        "shadow_id": shadow.shadow_id,
        "step": shadow.step,
        "plan_epoch": shadow.plan_epoch,
        "sha256": shadow.sha256,
        "bytes": shadow.bytes,
        "parameter_names": json.dumps(shadow.parameter_names),
    }


def shadow(row: sqlite3.Row) -> Shadow:
    """A shadow."""
    return Shadow(
        shadow_id=row["shadow_id"],
        step=row["step"],
        plan_epoch=row["plan_epoch"],
        sha256=row["sha256"],
        bytes=row["bytes"],
        parameter_names=tuple(json.loads(row["parameter_names"])),
    )


def transition_row(row: sqlite3.Row) -> TransitionRow:
    """A row of the transitions' log."""
    return TransitionRow(
        at_s=row["at_s"],
        event=row["event"],
        from_state=JobState(row["from_state"]),
        to_state=JobState(row["to_state"]),
        plan_epoch=row["plan_epoch"],
        reason=row["reason"],
    )


def evaluation_row(row: sqlite3.Row) -> EvaluationRow:
    """An evaluation."""
    return EvaluationRow(step=row["step"], loss=row["loss"])


def reservation(row: sqlite3.Row) -> Reservation:
    """A reservation."""
    return Reservation(job_id=JobId(row["job_id"]), agent_id=AgentId(row["agent_id"]), bytes=row["bytes"])


def numbered_event(row: sqlite3.Row) -> NumberedEvent:
    """An event.

    Raises:
        WireError: a newer plutino wrote it.
    """
    return NumberedEvent(number=row["number"], at_s=row["at_s"], event=parse_event(row["kind"], row["json"]))
