from __future__ import annotations

import signal

import pytest

from edge_node.supervision import MAX_REASON_BYTES, Ending, Exiting, describe_end, over_budget, refusal, spare_is_due

MIB = 1 << 20


def ending(**changes) -> Ending:
    values = {
        "exit_code": 1,
        "over_budget": None,
        "stop_reason": None,
        "exiting": None,
        "log_tail": "",
        "log_path": "L",
    }
    return Ending(**{**values, **changes})


def spare_due(**changes) -> bool:
    values = {
        "has_spare": False,
        "running_budgets_bytes": [100],
        "baseline_bytes": 50,
        "memory_budget_bytes": 150,
        "since_last_start_s": 10.0,
        "settle_s": 10.0,
    }
    return spare_is_due(**{**values, **changes})


@pytest.mark.parametrize(("budget", "fits"), [(50, True), (51, False)])
def test_refusal_counts_the_budgets_of_running_workers(budget, fits):
    assert (refusal(budget, [60, 40], 150) is None) is fits


def test_spare_is_due_where_budget_and_time_allow():
    assert spare_due()


@pytest.mark.parametrize("changes", [{"has_spare": True}, {"memory_budget_bytes": 149}, {"since_last_start_s": 9.9}])
def test_spare_is_not_due_with_one_present_no_room_or_a_worker_loading(changes):
    assert not spare_due(**changes)


def test_spare_is_due_at_once_when_no_worker_runs():
    assert spare_due(running_budgets_bytes=[], since_last_start_s=0.0)


def test_over_budget_names_both_numbers():
    assert over_budget(100, 100, "w") is None
    assert "101 bytes), its memory budget is 100 B" in str(over_budget(101, 100, "w"))


@pytest.mark.parametrize(
    ("changes", "reason", "is_out_of_memory"),
    [
        ({"over_budget": "too large", "stop_reason": "s"}, "too large", True),
        ({"exiting": Exiting(reason="r", out_of_memory=True, error="OutOfMemoryError")}, "OutOfMemoryError: r", True),
        ({"exiting": Exiting(reason="done", out_of_memory=False, error="")}, "done", False),
        ({"exiting": Exiting(reason="done", out_of_memory=False, error=""), "stop_reason": "s"}, "stopped: s", False),
        ({"exiting": Exiting(reason="r", out_of_memory=False, error="E"), "stop_reason": "s"}, "E: r", False),
        ({"stop_reason": "s"}, "stopped: s", False),
    ],
)
def test_describe_end_prefers_the_cause_to_its_consequences(changes, reason, is_out_of_memory):
    assert describe_end(ending(**changes)) == (reason, is_out_of_memory)


def test_describe_end_by_signal_names_it_and_gives_the_log():
    reason, _ = describe_end(ending(exit_code=-signal.SIGSEGV, log_tail="Fatal Python error"))

    assert "SIGSEGV" in reason
    assert reason.endswith("log L, which ends:\nFatal Python error")


def test_describe_end_keeps_a_control_message_small():
    reason, _ = describe_end(ending(exiting=Exiting(reason="é" * 10_000 + "end", out_of_memory=False, error="E")))

    assert len(reason.encode()) <= MAX_REASON_BYTES
    assert reason.startswith("E: é")
    assert reason.endswith("end")
