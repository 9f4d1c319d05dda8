"""Where the seconds of a move go."""

from __future__ import annotations

from coordinator.job_view import told
from coordinator.jobs.move_times import LINK, LOAD, STOP, STORE, MoveTimes
from protos import workers_pb2 as pb


def test_move_times_add_up_to_the_whole_and_name_the_slowest_workers_loading():
    now_s = [10.0]
    times = MoveTimes(4, clock=lambda: now_s[0])
    for part, seconds in ((STORE, 1.0), (STOP, 0.5), (LOAD, 2.0), (STOP, 0.25), (LINK, 0.125)):
        now_s[0] += seconds
        times.end(part)

    moved = times.told(
        2,
        [
            pb.StageLoaded(
                seconds=1.5, went_on=True, seconds_by_part={"weights": 1.0, "state": 0.5}, state_by_place={"kept": 2048}
            ),
            pb.StageLoaded(
                seconds=0.5, seconds_by_part={"weights": 0.5}, state_by_place={"kept": 512, "device b": 1024}
            ),
        ],
    )

    assert moved.seconds_by_part == {"store": 1.0, "stop": 0.75, "load": 2.0, "link": 0.125}
    assert sum(moved.seconds_by_part.values()) == moved.seconds
    assert moved.loading_by_part == {"weights": 1.0, "state": 0.5}
    assert told(moved) == (
        "moved in 3.9 s (store 1.0, stop 0.8, load 2.0, link 0.1; of loading: weights 1.0, state 0.5); "
        "1 of 2 workers went on in their processes, state read (kept 2.5 KiB, device b 1 KiB)"
    )
