from __future__ import annotations

import torch

from edge_node.engine.pass_clock import PassClock


def test_pass_clock_adds_up_passes_and_leaves_out_what_lies_between(monkeypatch):
    ticks = iter([1.0, 1.5, 10.0, 12.0])
    monkeypatch.setattr("edge_node.engine.pass_clock.time.perf_counter", lambda: next(ticks))
    clock = PassClock(torch.device("cpu"))

    for _ in range(2):
        clock.start()
        clock.end()

    assert clock.seconds() == 2.5


def test_pass_clock_counts_what_passes_under_a_quota_would_take_without_a_pause(monkeypatch):
    ticks, used = iter([0.0, 1.0, 5.0, 6.0] * 2), iter([0.0, 0.9, 0.9, 1.8] * 2)
    monkeypatch.setattr("edge_node.engine.pass_clock.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr("edge_node.engine.pass_clock.time.process_time", lambda: next(used))
    saved_up, throttled = PassClock(torch.device("cpu"), 0.5), PassClock(torch.device("cpu"), 1.0)

    for clock in (saved_up, throttled):
        for _ in range(2):
            clock.start()
            clock.end()

    assert saved_up.seconds() == 1.8 / 0.5
    assert throttled.seconds() == 2.0
