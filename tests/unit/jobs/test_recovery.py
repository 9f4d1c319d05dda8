from __future__ import annotations

from typing import Any

import pytest

from coordinator.jobs.events import Failed, Interrupted, WorkersLost
from coordinator.jobs.lineage import BestSoFar
from coordinator.jobs.recovery import (
    MAX_RESUMES_PER_STEP,
    Fail,
    Incident,
    Park,
    Restart,
    Resume,
    ReturnTo,
    Shadow,
    decide_recovery,
    durable_steps,
    obsolete_shadows,
    recovery_event,
)
from plutino.types import JobId, WorkerRef

NAMES = frozenset({"a", "b"})
LOST = (WorkerRef(JobId("job-1"), 1, 1),)


def shadow(step: int, *names: str, suffix: str = "") -> Shadow:
    shadow_id = f"{step}-{'+'.join(names)}{suffix}"
    return Shadow(
        shadow_id=shadow_id, step=step, plan_epoch=1, sha256=f"sha-{shadow_id}", bytes=8, parameter_names=names
    )


def incident(**changes: Any) -> Incident:
    values: dict[str, Any] = {
        "reason": "pi-3 left",
        "lost": LOST,
        "next_step": 9,
        "parameter_names": NAMES,
        "shadows": (),
        "recoveries": 0,
        "max_recoveries": 3,
    }
    return Incident(**{**values, **changes})


def test_decide_recovery_without_lost_state_resumes_the_current_step() -> None:
    decision = decide_recovery(incident(lost=(), recoveries=3))

    assert isinstance(decision, Resume)
    assert decision.step == 9


def test_decide_recovery_link_that_keeps_breaking_counts_as_a_loss() -> None:
    decision = decide_recovery(incident(lost=(), resumes_at_step=MAX_RESUMES_PER_STEP))

    assert isinstance(decision, Restart)


def test_decide_recovery_returns_to_newest_step_that_covers_all_parameters() -> None:
    shadows = (shadow(4, "a"), shadow(4, "b"), shadow(6, "a", "b"), shadow(8, "a"))

    decision = decide_recovery(incident(shadows=shadows))

    assert isinstance(decision, ReturnTo)
    assert (decision.step, decision.shadows) == (6, {"6-a+b": "sha-6-a+b"})
    assert decision.reason == ("pi-3 left (lost: stage 1.0); step 6 is the newest durable one, 3 steps are run again")


def test_decide_recovery_ignores_shadows_of_undecided_steps() -> None:
    assert isinstance(decide_recovery(incident(shadows=(shadow(10, "a", "b"),))), Restart)


def test_decide_recovery_before_the_first_load_restarts() -> None:
    decision = decide_recovery(incident(next_step=0, parameter_names=frozenset()))

    assert isinstance(decision, Restart)


def test_decide_recovery_beyond_the_limit_fails_naming_the_setting() -> None:
    decision = decide_recovery(incident(recoveries=3))

    assert isinstance(decision, Fail)
    assert "placement.max_recoveries" in decision.reason


def test_decide_recovery_without_devices_parks_at_the_durable_step() -> None:
    decision = decide_recovery(incident(shadows=(shadow(6, "a", "b"),), num_devices_left=0))

    assert isinstance(decision, Park)
    assert decision.step == 6


def test_durable_steps_takes_one_of_two_replicas_shadows() -> None:
    durable = durable_steps([shadow(4, "a", suffix="-r1"), shadow(4, "a", suffix="-r0"), shadow(4, "b")], NAMES)

    assert [each.shadow_id for each in durable[4]] == ["4-a-r0", "4-b"]


def test_obsolete_shadows_keeps_two_durable_steps_pins_and_newer_parts() -> None:
    whole = [shadow(step, "a", "b") for step in (2, 4, 6, 8)]
    old_part, new_part = shadow(7, "a"), shadow(9, "a")

    obsolete = obsolete_shadows([*whole, old_part, new_part], NAMES, pinned_steps=frozenset({2}))

    assert obsolete == (whole[1], old_part)


def test_obsolete_shadows_without_durable_step_keeps_all() -> None:
    assert obsolete_shadows([shadow(4, "a")], NAMES, pinned_steps=frozenset()) == ()


@pytest.mark.parametrize(
    ("decision", "event"),
    [
        (Resume(step=9, reason="r"), Interrupted(reason="r")),
        (Restart(reason="r"), WorkersLost(next_step=0, best=BestSoFar(), reason="r")),
        (ReturnTo(step=6, shadows={}, reason="r"), WorkersLost(next_step=6, best=BestSoFar(), reason="r")),
        (Park(step=6, reason="r"), WorkersLost(next_step=6, best=BestSoFar(), reason="r", is_parked=True)),
        (Fail(reason="r"), Failed(reason="r")),
    ],
)
def test_recovery_event_carries_the_decision(decision: Any, event: object) -> None:
    assert recovery_event(decision, BestSoFar()) == event
