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
