from __future__ import annotations

import pytest

from benchmarks.cores import one_after_other, physical_first
from benchmarks.peers.workload import Workload
from benchmarks.run_figures import Figures, Run, WorkerBytes
from benchmarks.scaling import TINY, goals_of, in_turns, runs_of, shares_of_cores

WORK = Workload(batch_size=10, seq_len_tokens=10, num_micro_batches=10)


def figures(name: str, threads: tuple[int, ...], each_s: float, **changes) -> Figures:
    values = {
        "run": Run(name=name, threads=threads, workload=WORK),
        "plan": "",
        "num_stages": len(threads),
        "num_workers": len(threads),
        "shares_cores": False,
        "predicted_step_s": each_s,
        "step_s": (each_s,) * 4,
        "workers": (),
        "compute_s": (),
        "predicted_compute_s": (),
    }
    return Figures(**(values | changes))


def missed(*found: Figures) -> set[str]:
    return {goal.name for goal in goals_of({each.run.name: each for each in found}) if not goal.is_met}


def test_agents_have_processors_of_their_own_where_there_are_enough():
    threads = {"fast": 4, "middle": 2, "slow": 1}

    pins, shares = one_after_other(threads, range(10, 20))
    tight, shares_few = one_after_other(threads, [0, 1])

    assert list(pins.values()) == [{10, 11, 12, 13}, {14, 15}, {16}]
    assert not shares
    assert all(cores <= {0, 1} for cores in tight.values())
    assert shares_few


def test_runs_of_all_parts_have_names_of_their_own():
    runs = [run for part in ("equal", "unequal") for run in runs_of(part, TINY, most_agents=8)]

    assert len({run.name for run in runs}) == len(runs) == 8


def test_agents_of_a_share_of_a_processor_differ_by_it():
    together, *alone = runs_of("unequal", TINY, most_agents=8, quota=0.2)

    assert together.threads == (1, 1, 1) and together.quotas == pytest.approx((0.8, 0.4, 0.2))
    assert [run.name for run in alone] == ["alone 4", "alone 2", "alone 1"]
    assert [quota for run in alone for quota in run.quotas] == pytest.approx([0.8, 0.4, 0.2])


def test_turns_reverse_the_order_and_have_agents_of_their_own():
    runs = in_turns(runs_of("equal", TINY, most_agents=2), 2)

    assert [run.name for run in runs] == ["equal 2", "equal 1", "equal 1", "equal 2"]
    assert len({run.label for run in runs}) == 4


def test_turns_of_a_run_are_counted_together_and_their_distance_is_the_noise():
    first = figures("equal 1", (1,), 2.0)

    found = first.with_turn(figures("equal 1", (1,), 2.5))

    assert found.median_step_s == 2.25
    assert found.a_a_noise == pytest.approx(0.25)


def test_one_thread_of_each_physical_core_comes_first(tmp_path):
    for core in range(4):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 2},{core % 2 + 2}\n")

    assert physical_first([3, 2, 1, 0], tmp_path) == [0, 1, 2, 3]
    assert physical_first([1, 3, 2], tmp_path) == [1, 2, 3]
    assert physical_first([5, 4], tmp_path) == [4, 5]


def test_parts_at_once_share_no_processor_and_are_refused_where_there_are_too_few():
    shares = shares_of_cores(range(32), ["equal", "unequal"], most_agents=8)

    assert [len(cores) for cores in shares.values()] == [10, 9]
    assert not set(shares["equal"]) & set(shares["unequal"])
    with pytest.raises(SystemExit, match="needs 19 processors, there are 18"):
        shares_of_cores(range(18), ["equal", "unequal"], most_agents=8)


def test_efficiency_of_eight_is_taken_beside_two_and_of_unequal_ones_beside_their_sum():
    two, good, bad = (1,) * 2, figures("equal 8", (1,) * 8, 1.05), figures("equal 8", (1,) * 8, 1.2)
    assert missed(figures("equal 2", two, 4.0), good) == set()
    assert missed(figures("equal 2", two, 4.0), bad) == {"8 equal agents beside 4 x those of 2"}

    alone = [figures(f"alone {n}", (n,), 12.0 / n) for n in (4, 2, 1)]
    assert missed(*alone, figures("unequal 4:2:1", (4, 2, 1), 12.0 / 7)) == set()
    assert missed(*alone, figures("unequal 4:2:1", (4, 2, 1), 12.0 / 5)) == {"unequal 4:2:1 beside the sum"}


@pytest.mark.parametrize(("step_s", "is_met"), [(1.1, True), (1.4, False), (0.6, False)])
def test_predicted_step_is_judged_with_the_noise_of_the_machine(step_s, is_met):
    # Even and odd steps differ by a tenth.
    noisy = (step_s * 1.05, step_s * 0.95) * 2
    found = figures("equal 1", (1,), step_s, predicted_step_s=1.0, step_s=noisy)

    assert found.a_a_noise == pytest.approx(0.105, abs=1e-3)
    assert (missed(found) == set()) is is_met


def test_runs_that_shared_processors_are_not_judged_by_speed_but_by_bytes():
    worker = WorkerBytes(device="a", predicted_bytes=400 << 20, measured_bytes=410 << 20, keeps_heap=False)
    found = figures("equal 2", (1, 1), 9.0, predicted_step_s=1.0, shares_cores=True, workers=(worker,))

    assert missed(found) == {"equal 2, a: bytes / predicted"}
