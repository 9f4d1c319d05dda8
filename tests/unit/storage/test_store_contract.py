"""What every store promises, run over each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.jobs.lineage import EvaluationRow, LedgerRow, LedgerStatus
from coordinator.jobs.record import JobRecord, JobState
from coordinator.jobs.recovery import Shadow
from coordinator.scheduling.scheduler import Reservation
from coordinator.storage.base import Change, Store
from coordinator.storage.memory import MemoryStore
from coordinator.storage.sqlite import SqliteStore
from plutino.errors import StoreError, UnknownJobError
from plutino.events import Notice
from plutino.types import AgentId, JobId

JOB = JobId("job-1")
WAIT_S = 20.0
RUNNING = JobRecord(
    job_id=JOB,
    name="täglich",
    spec_json='{"seed": 0}',
    submitted_at_s=1.5,
    state=JobState.RUNNING,
    plan_json="{}",
    numerics_json="{}",
    parameter_names=("a", "b"),
    total_steps=10,
)


def notice(text: str) -> Notice:
    return Notice(level="info", text=text)


def change(before: JobRecord, after: JobRecord, **more: Any) -> Change:
    return Change(before=before, after=after, event="Tested", at_s=2.0, **more)


def ledger_row(step: int, plan_epoch: int = 1, status: LedgerStatus = LedgerStatus.COMMITTED) -> LedgerRow:
    return LedgerRow(
        step=step,
        plan_epoch=plan_epoch,
        status=status,
        sample_indices=(2 * step, 2 * step + 1),
        loss=0.1 + 0.2,
        grad_norm=1e300,
        clip_scale=1e-300,
        lr=2e-4,
    )


def commit(store: Store, before: JobRecord, *steps: int) -> JobRecord:
    for step in steps:
        after = replace(before, next_step=step + 1)
        store.commit_step(ledger_row(step, before.plan_epoch), before, after, at_s=2.0).result(WAIT_S)
        before = after
    return before


def fenced(record: JobRecord, step: int) -> JobRecord:
    return replace(
        record,
        state=JobState.RECOVERING,
        plan_epoch=record.plan_epoch + 1,
        plan_json=None,
        next_step=step,
        reason="pi-3 left",
    )


def shadow(step: int, plan_epoch: int = 1, shadow_id: str = "s", **more: Any) -> Shadow:
    values = {"sha256": "ab", "bytes": 8, "parameter_names": ("a", "b"), **more}
    return Shadow(shadow_id=shadow_id, step=step, plan_epoch=plan_epoch, **values)


def reservation(agent_id: str, num_bytes: int = 5, job_id: JobId = JOB) -> Reservation:
    return Reservation(job_id=job_id, agent_id=AgentId(agent_id), bytes=num_bytes)


class StoreContract:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        raise NotImplementedError

    @pytest.fixture
    def running(self, store: Store) -> Store:
        store.submit(RUNNING).result(WAIT_S)
        return store

    def test_submit_gives_the_job_back_field_by_field(self, store: Store) -> None:
        full = replace(
            RUNNING, best_step=4, best_eval_loss=0.1, evaluations_since_best=2, ended_at_s=3.0, adapter_dir="/a"
        )

        assert store.submit(full).result(WAIT_S) == full
        assert store.job(JOB) == full

    def test_submit_with_used_key_gives_the_first_job(self, store: Store) -> None:
        store.submit(RUNNING, idempotency_key="k").result(WAIT_S)

        again = store.submit(replace(RUNNING, job_id=JobId("job-2")), idempotency_key="k").result(WAIT_S)

        assert again.job_id == JOB
        assert store.jobs() == (RUNNING,)

    def test_submit_with_used_id_is_refused(self, running: Store) -> None:
        with pytest.raises(StoreError, match="job-1 exists already"):
            running.submit(RUNNING).result(WAIT_S)

    def test_jobs_come_in_order_of_submission(self, store: Store) -> None:
        for name in ("z", "a", "m"):
            store.submit(replace(RUNNING, job_id=JobId(name))).result(WAIT_S)

        assert [record.job_id for record in store.jobs()] == ["z", "a", "m"]

    def test_unknown_job_is_an_error_in_every_read_and_write(self, store: Store) -> None:
        nobody = JobId("nobody")
        reads = (store.job, store.ledger, store.shadows, store.evaluations, store.scores, store.events)
        for read in (*reads, store.transitions):
            with pytest.raises(UnknownJobError, match="nobody"):
                read(nobody)
        writes = [
            store.save(change(replace(RUNNING, job_id=nobody), replace(RUNNING, job_id=nobody))),
            store.add_shadow(nobody, shadow(0)),
            store.remove_shadows(nobody, ["s"]),
            store.put_scores(nobody, "before", "{}"),
            store.append_events(nobody, [notice("a")], at_s=0.0),
            store.allocate_unit_serials(nobody, 1),
        ]
        assert {type(write.exception(WAIT_S)) for write in writes} == {UnknownJobError}

    def test_save_logs_changes_of_state_and_plan_epoch_only(self, running: Store) -> None:
        queued = replace(RUNNING, reason="other")
        lost = fenced(queued, 0)
        running.save(change(RUNNING, queued)).result(WAIT_S)
        running.save(change(queued, lost)).result(WAIT_S)

        assert running.job(JOB) == lost
        (row,) = running.transitions(JOB)
        assert (row.from_state, row.to_state, row.plan_epoch) == (JobState.RUNNING, JobState.RECOVERING, 2)
        assert (row.event, row.at_s, row.reason) == ("Tested", 2.0, "pi-3 left")

    @pytest.mark.parametrize(
        "stale",
        [{"state": JobState.PLANNING}, {"plan_epoch": 2}, {"next_step": 3}],
        ids=lambda stale: next(iter(stale)),
    )
    def test_save_decided_on_other_facts_is_refused(self, running: Store, stale: dict[str, Any]) -> None:
        before = replace(RUNNING, **stale)

        with pytest.raises(StoreError, match="but stored is running at step 0, epoch 1"):
            running.save(change(before, replace(before, reason="x"))).result(WAIT_S)

        assert running.job(JOB) == RUNNING

    def test_save_reserves_on_all_devices_or_none(self, running: Store) -> None:
        twice = (reservation("A"), reservation("B"), reservation("A"))

        assert running.save(change(RUNNING, RUNNING, reservations=twice)).exception(WAIT_S) is not None
        assert running.reservations() == ()
        running.save(change(RUNNING, RUNNING, reservations=twice[:2])).result(WAIT_S)
        assert running.reservations() == twice[:2]

    def test_save_second_reservation_of_a_job_changes_nothing(self, running: Store) -> None:
        running.save(change(RUNNING, RUNNING, reservations=(reservation("A"),))).result(WAIT_S)
        second = change(RUNNING, replace(RUNNING, reason="x"), reservations=(reservation("B"),), events=(notice("x"),))

        with pytest.raises(StoreError, match="holds memory already"):
            running.save(second).result(WAIT_S)

        assert running.job(JOB) == RUNNING
        assert running.events(JOB) == ()

    def test_save_reservation_of_another_job_is_refused(self, running: Store) -> None:
        foreign = (reservation("A", job_id=JobId("job-2")),)

        assert isinstance(running.save(change(RUNNING, RUNNING, reservations=foreign)).exception(WAIT_S), StoreError)

    def test_release_frees_a_job_and_is_harmless_twice(self, running: Store) -> None:
        running.save(change(RUNNING, RUNNING, reservations=(reservation("A"),))).result(WAIT_S)
        for _ in range(2):
            running.release(JOB).result(WAIT_S)

        assert running.reservations() == ()

    def test_commit_step_writes_row_next_step_and_events_together(self, running: Store) -> None:
        after = replace(RUNNING, next_step=1)
        running.commit_step(ledger_row(0), RUNNING, after, at_s=2.0, events=(notice("step 0"),)).result(WAIT_S)

        assert running.ledger(JOB) == (ledger_row(0),)
        assert running.job(JOB) == after
        assert [each.event for each in running.events(JOB)] == [notice("step 0")]

    @pytest.mark.parametrize(
        ("row", "next_step"),
        [
            (ledger_row(1), 2),
            (ledger_row(0), 2),
            (ledger_row(0, plan_epoch=2), 1),
            (ledger_row(0, status=LedgerStatus.UNDONE), 1),
        ],
        ids=["gap", "jump", "epoch", "undone"],
    )
    def test_commit_step_out_of_turn_is_refused(self, running: Store, row: LedgerRow, next_step: int) -> None:
        with pytest.raises(StoreError):
            running.commit_step(row, RUNNING, replace(RUNNING, next_step=next_step), at_s=2.0).result(WAIT_S)

        assert running.ledger(JOB) == ()

    def test_commit_step_twice_is_refused(self, running: Store) -> None:
        commit(running, RUNNING, 0)

        with pytest.raises(StoreError, match="stored is running at step 1"):
            commit(running, RUNNING, 0)

    def test_save_cannot_move_next_step_without_a_ledger_row(self, running: Store) -> None:
        with pytest.raises(StoreError, match="needs a ledger row"):
            running.save(change(RUNNING, replace(RUNNING, next_step=1))).result(WAIT_S)

    def test_save_return_to_step_undoes_rows_evaluations_and_shadows_above_it(self, running: Store) -> None:
        at_3 = commit(running, RUNNING, 0, 1, 2)
        for step in (1, 2):
            running.save(change(at_3, at_3, evaluation=EvaluationRow(step=step, loss=1.0))).result(WAIT_S)
            running.add_shadow(JOB, shadow(step, shadow_id=f"s{step}")).result(WAIT_S)

        running.save(change(at_3, fenced(at_3, 1))).result(WAIT_S)

        assert [row.status.value for row in running.ledger(JOB)] == ["committed", "undone", "undone"]
        assert running.ledger(JOB)[2].reason == "undone by Tested: pi-3 left"
        assert [row.step for row in running.evaluations(JOB)] == [1]
        assert [row.shadow_id for row in running.shadows(JOB)] == ["s1"]

    def test_commit_step_again_under_a_new_plan_epoch_keeps_both_rows(self, running: Store) -> None:
        at_2 = commit(running, RUNNING, 0, 1)
        lost = fenced(at_2, 1)
        back = replace(lost, state=JobState.RUNNING)
        running.save(change(at_2, lost)).result(WAIT_S)
        running.save(change(lost, back)).result(WAIT_S)
        commit(running, back, 1)

        assert [(row.plan_epoch, row.step, row.status.value) for row in running.ledger(JOB)] == [
            (1, 0, "committed"),
            (1, 1, "undone"),
            (2, 1, "committed"),
        ]

    @pytest.mark.parametrize("wrong", [{"next_step": 0}, {"plan_epoch": 0}], ids=["same epoch", "older epoch"])
    def test_save_return_without_a_new_plan_epoch_is_refused(self, running: Store, wrong: dict[str, int]) -> None:
        at_1 = commit(running, RUNNING, 0)

        assert isinstance(running.save(change(at_1, replace(at_1, **wrong))).exception(WAIT_S), StoreError)
        assert running.ledger(JOB)[0].status is LedgerStatus.COMMITTED

    def test_save_evaluation_replaces_one_of_the_same_step(self, running: Store) -> None:
        for loss in (2.0, 1.0):
            running.save(change(RUNNING, RUNNING, evaluation=EvaluationRow(step=0, loss=loss))).result(WAIT_S)

        assert running.evaluations(JOB) == (EvaluationRow(step=0, loss=1.0),)

    def test_save_evaluation_that_is_not_finite_is_refused(self, running: Store) -> None:
        with pytest.raises(StoreError, match="evaluation loss of step 0 is nan"):
            running.save(change(RUNNING, RUNNING, evaluation=EvaluationRow(step=0, loss=math.nan))).result(WAIT_S)

    def test_add_shadow_twice_is_harmless_and_comes_back_whole(self, running: Store) -> None:
        for _ in range(2):
            running.add_shadow(JOB, shadow(0)).result(WAIT_S)

        assert running.shadows(JOB) == (shadow(0),)

    @pytest.mark.parametrize(
        "bad", [shadow(0, plan_epoch=2), shadow(1), shadow(0, sha256="other")], ids=["epoch", "step", "content"]
    )
    def test_add_shadow_that_contradicts_the_job_is_refused(self, running: Store, bad: Shadow) -> None:
        running.add_shadow(JOB, shadow(0)).result(WAIT_S)

        assert isinstance(running.add_shadow(JOB, replace(bad)).exception(WAIT_S), StoreError)
        assert running.shadows(JOB) == (shadow(0),)

    def test_remove_shadows_forgets_known_and_ignores_unknown(self, running: Store) -> None:
        running.add_shadow(JOB, shadow(0)).result(WAIT_S)
        running.remove_shadows(JOB, ["s", "never seen"]).result(WAIT_S)

        assert running.shadows(JOB) == ()

    def test_put_scores_keeps_the_last_of_each_moment(self, running: Store) -> None:
        for moment, text in (("before", "1"), ("after", "2"), ("after", "3")):
            running.put_scores(JOB, moment, text).result(WAIT_S)

        assert running.scores(JOB) == {"before": "1", "after": "3"}

    def test_events_are_numbered_per_job_without_gaps(self, running: Store) -> None:
        running.submit(replace(RUNNING, job_id=JobId("job-2")), events=(notice("other"),)).result(WAIT_S)
        running.append_events(JOB, [notice("a"), notice("b")], at_s=3.0).result(WAIT_S)
        running.append_events(JOB, [notice("c")], at_s=4.0).result(WAIT_S)

        found = running.events(JOB)
        assert [(each.number, each.at_s, each.event) for each in found] == [
            (1, 3.0, notice("a")),
            (2, 3.0, notice("b")),
            (3, 4.0, notice("c")),
        ]
        assert running.events(JOB, after=1, limit=1) == found[1:2]

    def test_unit_serials_never_repeat(self, running: Store) -> None:
        blocks = [running.allocate_unit_serials(JOB, count).result(WAIT_S) for count in (3, 1, 2)]

        assert blocks == [range(1, 4), range(4, 5), range(5, 7)]

    def test_unit_serials_survive_changes_of_the_job(self, running: Store) -> None:
        running.allocate_unit_serials(JOB, 5).result(WAIT_S)
        commit(running, RUNNING, 0)

        assert running.allocate_unit_serials(JOB, 1).result(WAIT_S) == range(6, 7)

    def test_incarnations_rise(self, store: Store) -> None:
        assert [store.next_incarnation().result(WAIT_S) for _ in range(3)] == [1, 2, 3]

    def test_value_is_none_until_set_and_then_the_last(self, store: Store) -> None:
        assert store.value("endpoint") is None
        for value in ("a:1", "b:2"):
            store.put_value("endpoint", value).result(WAIT_S)

        assert store.value("endpoint") == "b:2"

    def test_many_writes_without_waiting_keep_their_order(self, running: Store) -> None:
        futures = [running.append_events(JOB, [notice(str(index))], at_s=0.0) for index in range(100)]
        for future in futures:
            future.result(WAIT_S)

        assert [each.event for each in running.events(JOB)] == [notice(str(index)) for index in range(100)]

    def test_refused_write_does_not_disturb_its_neighbours(self, running: Store) -> None:
        good = running.append_events(JOB, [notice("a")], at_s=0.0)
        bad = running.submit(RUNNING)
        also_good = running.append_events(JOB, [notice("b")], at_s=0.0)

        assert isinstance(bad.exception(WAIT_S), StoreError)
        assert (good.result(WAIT_S), also_good.result(WAIT_S)) == (None, None)
        assert len(running.events(JOB)) == 2

    def test_write_handed_in_cannot_be_cancelled(self, running: Store) -> None:
        future = running.append_events(JOB, [notice("a")], at_s=0.0)

        assert not future.cancel()
        future.result(WAIT_S)
        assert len(running.events(JOB)) == 1

    def test_close_is_harmless_twice_and_refuses_later_writes(self, store: Store) -> None:
        store.close()
        store.close()

        with pytest.raises(StoreError, match="closed"):
            store.next_incarnation()

    def test_problems_of_a_sound_store_are_none(self, running: Store) -> None:
        assert running.problems() == ()


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = MemoryStore()
        yield store
        store.close()


class TestSqliteStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = SqliteStore(tmp_path / "plutino.db")
        yield store
        store.close()
