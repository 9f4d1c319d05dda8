"""A measurement that waits for the other devices of its host: without a process, and with a clock that is set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from edge_node.compute_device import CPU
from edge_node.meeting import HostMeeting
from edge_node.pass_timing import Passes, PassTimer


def test_meeting_computes_on_after_having_had_enough_until_the_coordinator_lets_it_go_on() -> None:
    told: list[int] = []
    meeting = HostMeeting(told.append)
    meeting.note(0, is_whole=True)

    meeting.begin()
    assert told == [0]
    assert not meeting.is_over() and not meeting.is_over()
    assert told == [0, 1]
    meeting.note(1, is_whole=True)

    assert meeting.is_over() and meeting.is_whole


def test_meeting_waits_idle_for_the_others_before_a_window() -> None:
    told = threading.Event()
    meeting = HostMeeting(lambda _: told.set())
    waiting = threading.Thread(target=meeting.begin)
    waiting.start()
    assert told.wait(30) and waiting.is_alive()

    meeting.note(0, is_whole=True)

    waiting.join(30)
    assert not waiting.is_alive()


def test_meeting_in_which_somebody_lacked_in_one_window_is_not_whole_to_the_end() -> None:
    meeting = HostMeeting(lambda milestone: meeting.note(milestone, is_whole=milestone != 1))

    for _ in range(2):
        meeting.begin()
        assert meeting.is_over()

    assert not meeting.is_whole


def test_meeting_of_which_nobody_says_anything_is_given_up_once_and_for_all() -> None:
    told: list[int] = []
    meeting = HostMeeting(told.append, patience_s=0.0)

    meeting.begin()
    assert meeting.is_over()
    meeting.begin()

    assert told == [0, 1, 2] and not meeting.is_whole


def test_meeting_window_that_lasts_beyond_patience_ends() -> None:
    now = [0.0]
    meeting = HostMeeting(lambda _: None, patience_s=10.0, clock=lambda: now[0])
    meeting.note(0, is_whole=True)
    meeting.begin()
    assert not meeting.is_over()

    now[0] = 10.5

    assert meeting.is_over() and not meeting.is_whole


class CountingMeeting:
    """Lets everybody begin at once and go on after a number of looks."""

    def __init__(self, num_looks: int) -> None:
        self.num_looks = num_looks

    def begin(self) -> None:
        """At once."""

    def is_over(self) -> bool:
        self.num_looks -= 1
        return self.num_looks < 0


def test_passes_are_timed_on_while_others_have_not_had_enough_and_all_of_them_count() -> None:
    calls: list[str] = []

    def forward() -> Tensor:
        calls.append("forward")
        return torch.zeros(())

    def num_forward(num_looks: int) -> int:
        calls.clear()
        PassTimer(CPU, CountingMeeting(num_looks), least_s=0.0).time(Passes(forward, lambda _: None))
        return len(calls)

    # One pass warms up and three are the least; each look but the last is followed by one pass more.
    assert [num_forward(0), num_forward(5)] == [1 + 3, 1 + 3 + 5]


def test_passes_of_blocks_that_recompute_are_timed_where_there_are_some() -> None:
    weight = torch.ones((), requires_grad=True)
    within: list[bool] = []

    @contextmanager
    def recomputing() -> Iterator[None]:
        within.append(True)
        yield
        within.append(False)

    plain = Passes(lambda: weight * 2, lambda output: output.backward())
    timer = PassTimer(CPU, least_s=0.0)

    assert timer.time(plain).recomputed_backward_s is None
    assert timer.time(replace(plain, recomputing=recomputing)).recomputed_backward_s is not None
    # Left again before the backward pass, in which the block recomputes of itself.
    assert within == [True, False] * (1 + 3)
