from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edge_node.inbox import CommandTask, Inbox, UnitTask
from plutino.data.batches import MicroBatchRows
from plutino.errors import FrameError
from plutino.types import Unit, UnitKind
from plutino.wire.convert import micro_batch_from_proto, unit_to_proto
from protos import workers_pb2 as pb

WAIT_S = 10.0

TRAIN_0, TRAIN_1 = Unit(UnitKind.TRAIN, 0), Unit(UnitKind.TRAIN, 1)
EVALUATE_5, EVALUATE_6 = Unit(UnitKind.EVALUATE, 5), Unit(UnitKind.EVALUATE, 6)
GENERATE_7 = Unit(UnitKind.GENERATE, 7)
LINK = pb.WorkerCommand(link=pb.Link())


def decode(feed: pb.Feed) -> MicroBatchRows:
    return micro_batch_from_proto(feed.rows, max_rows=4, max_tokens=8, vocab_size=100)


def part(unit: Unit, micro_batch: int, num_micro_batches: int = 2, **fields) -> pb.Feed:
    rows = pb.MicroBatch(lengths=[1], input_ids=np.int32(micro_batch).tobytes(), label_mask=b"\0", padded_tokens=1)
    return pb.Feed(
        unit=unit_to_proto(unit),
        num_micro_batches=num_micro_batches,
        micro_batch=micro_batch,
        rows=rows,
        loss_weight=3.0,
        **fields,
    )


def header(unit: Unit, num_micro_batches: int = 2) -> pb.Feed:
    return part(unit, num_micro_batches, num_micro_batches)


def make_inbox(*feeds: pb.Feed, reads_tokens: bool = True, not_mine: Collection[int] = ()) -> Inbox:
    def reads_rows(kind: UnitKind, micro_batch: int) -> bool:
        return kind == UnitKind.GENERATE or (reads_tokens and micro_batch not in not_mine)

    inbox = Inbox(reads_rows=reads_rows, decode_rows=decode)
    for feed in feeds:
        inbox.feed(feed)
    return inbox


def take_all(inbox: Inbox) -> list[Unit | pb.WorkerCommand]:
    """What can be taken now: an end is put behind it, and take gives it only when nothing else is ready."""
    taken = []
    with ThreadPoolExecutor(1) as pool:
        while True:
            future = pool.submit(inbox.take)
            if not inbox_is_idle(inbox, future):
                task = future.result(WAIT_S)
                taken.append(task.work.unit if isinstance(task, UnitTask) else task.command)
                continue
            inbox.finish("test is over")
            assert future.result(WAIT_S) is None
            return taken


def inbox_is_idle(inbox: Inbox, future) -> bool:
    """Whether the taker waits for something to come: then it holds no lock and has no result."""
    while not future.done():
        with inbox._changed:
            if inbox._changed._waiters:
                return True
    return False


def test_inbox_gives_a_unit_once_all_its_parts_are_there():
    inbox = make_inbox(part(TRAIN_0, 1), part(TRAIN_0, 0))

    task = inbox.take()

    assert isinstance(task, UnitTask)
    assert (task.work.unit, task.work.num_micro_batches, task.work.loss_weight) == (TRAIN_0, 2, 3.0)
    assert [rows.input_ids.tolist() for rows in task.work.rows] == [[0], [1]]


def test_inbox_does_not_give_a_unit_that_lacks_a_part():
    assert take_all(make_inbox(part(TRAIN_0, 0), part(TRAIN_0, 0))) == []


def test_inbox_of_a_middle_stage_needs_only_the_header():
    inbox = make_inbox(header(TRAIN_0), reads_tokens=False)

    assert inbox.take().work.rows == (None, None)


def test_inbox_of_a_replica_waits_for_the_rows_of_its_own_micro_batches_only():
    inbox = make_inbox(part(TRAIN_0, 1), not_mine=(0,))

    assert [None if rows is None else rows.input_ids.tolist() for rows in inbox.take().work.rows] == [None, [1]]


def test_inbox_of_a_middle_stage_waits_for_the_options_of_generation():
    options = pb.GenerateOptions(max_new_tokens=4, sample_indices=[11])
    inbox = make_inbox(header(GENERATE_7, 1), part(GENERATE_7, 0, 1, generate=options), reads_tokens=False)

    task = inbox.take()

    assert task.generate.max_new_tokens == 4
    assert task.sample_indices == ((11,),)


def test_inbox_keeps_the_order_in_which_units_and_commands_were_first_heard_of():
    inbox = make_inbox(part(EVALUATE_5, 0))
    inbox.command(LINK)
    inbox.feed(header(TRAIN_0, 0))
    inbox.feed(part(EVALUATE_5, 1))

    assert take_all(inbox) == [EVALUATE_5, LINK, TRAIN_0]


def test_inbox_gives_the_next_step_only_after_the_decision_on_this_one():
    inbox = make_inbox(header(TRAIN_0, 0), header(TRAIN_1, 0))
    assert inbox.take().work.unit == TRAIN_0

    inbox.start_at(1)

    assert take_all(inbox) == [TRAIN_1]


def test_inbox_ignores_feeds_of_steps_that_are_done():
    inbox = make_inbox()
    inbox.start_at(1)

    inbox.feed(header(TRAIN_0, 0))

    assert inbox.units == ()


@pytest.mark.parametrize("is_taken", [False, True], ids=["gathering", "running"])
def test_inbox_ignores_repeated_feeds(is_taken):
    inbox = make_inbox(*[part(EVALUATE_5, 0), part(EVALUATE_5, 1)] * 2)
    if is_taken:
        assert inbox.take().work.unit == EVALUATE_5
        inbox.feed(part(EVALUATE_5, 0))

    assert inbox.units == (EVALUATE_5,)


def test_inbox_gives_an_evaluation_that_is_fed_again_after_its_end_no_second_time():
    """A coordinator repeats its feeds to a worker that re-attaches; run alone, the unit would never end."""
    inbox = make_inbox(header(EVALUATE_5, 0))
    assert inbox.take().work.unit == EVALUATE_5
    inbox.command(LINK)
    assert isinstance(inbox.take(), CommandTask)

    inbox.feed(header(EVALUATE_5, 0))
    inbox.feed(header(EVALUATE_6, 0))

    assert take_all(inbox) == [EVALUATE_6]


def test_inbox_forgets_a_cancelled_unit_and_ignores_its_late_parts():
    inbox = make_inbox(part(EVALUATE_5, 0), header(TRAIN_0, 0))

    assert not inbox.cancel(EVALUATE_5)
    inbox.feed(part(EVALUATE_5, 1))

    assert take_all(inbox) == [TRAIN_0]


def test_inbox_cancel_of_the_running_unit_says_so():
    inbox = make_inbox(header(EVALUATE_5, 0))
    inbox.take()

    assert inbox.cancel(EVALUATE_5)


def test_inbox_cancel_of_the_first_unit_wakes_who_waits_for_it():
    inbox = make_inbox(part(EVALUATE_5, 0), header(TRAIN_0, 0))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(inbox.take)
        assert inbox_is_idle(inbox, future)

        inbox.cancel(EVALUATE_5)

        assert future.result(WAIT_S).work.unit == TRAIN_0


def test_inbox_units_are_the_running_one_and_those_heard_of():
    inbox = make_inbox(header(EVALUATE_5, 0), part(TRAIN_0, 0))
    inbox.take()

    assert inbox.units == (EVALUATE_5, TRAIN_0)


def test_inbox_decision_before_the_vote_is_kept_and_a_late_one_ignored():
    inbox = make_inbox()
    inbox.decide(0, pb.Commit(step=0, clip_scale=0.5))
    assert inbox.wait_decision(0).clip_scale == 0.5
    inbox.start_at(1)

    inbox.decide(0, pb.Commit(step=0, clip_scale=0.25))
    inbox.decide(1, pb.Abort(step=1, reason="not finite"))

    assert inbox.wait_decision(1).reason == "not finite"


def test_inbox_finish_wakes_whoever_waits():
    with ThreadPoolExecutor(2) as pool:
        for wait in (lambda inbox: inbox.take(), lambda inbox: inbox.wait_decision(0)):
            inbox = make_inbox()
            future = pool.submit(wait, inbox)
            assert inbox_is_idle(inbox, future)

            inbox.finish("over")

            assert future.result(WAIT_S) is None


def test_inbox_rows_out_of_bounds_reach_the_compute_thread_and_not_the_control_stream():
    """Raised while feeding, the error ended the control stream's thread, and the worker waited for ever."""
    inbox = make_inbox(part(TRAIN_0, 0, 1))
    bad = part(TRAIN_1, 0, 1)
    bad.rows.padded_tokens = 9

    inbox.feed(bad)

    with pytest.raises(FrameError, match="rows of 9 tokens where 1 to 8 are allowed"):
        inbox.take()
