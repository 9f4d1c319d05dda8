from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import quantize
from benchmarks.quantize import Case, Quality, Timing, quantize_goals
from benchmarks.quantize_peers import REFERENCE, builders

CASE = Case(in_features=2048, out_features=2048, num_tokens=2048, num_threads=1)


def timing(contender: str, forward_s: tuple[float, ...], case: Case = CASE) -> Timing:
    ones = (1.0,) * len(forward_s)
    return Timing(
        case=case,
        contender=contender,
        forward_s=forward_s,
        backward_s=forward_s,
        reference_forward_s=ones,
        reference_backward_s=ones,
    )


def quality(contender: str, *, bits: float = 8.0, kept: float = 0.0) -> Quality:
    return Quality(
        contender=contender,
        bits_per_weight=bits,
        graph_bytes_per_weight=kept,
        output_error=0.0,
        gradient_cosine=1.0,
        weight_error=0.0,
    )


def test_ratio_is_the_median_over_turns_of_ratios_within_a_turn() -> None:
    drifting = Timing(
        case=CASE,
        contender="int8",
        forward_s=(1.1, 11.0, 1.2),
        backward_s=(1.1, 11.0, 1.2),
        reference_forward_s=(1.0, 10.0, 1.0),
        reference_backward_s=(1.0, 10.0, 1.0),
    )
    assert drifting.forward_ratio == pytest.approx(1.1)
    assert drifting.ratio == pytest.approx(1.1)


def test_goals_compare_with_libraries_that_keep_as_little_for_the_backward_pass() -> None:
    timings = [timing("int8", (1.2, 1.2)), timing("lean int8", (1.5, 1.5)), timing("greedy int8", (1.0, 1.0))]
    goals = {
        goal.name: goal for goal in quantize_goals([quality("lean int8"), quality("greedy int8", kept=2.0)], timings)
    }
    ratio = goals[f"int8, {CASE.name}: time / best peer's"]
    assert ratio.measured == pytest.approx(0.8)
    assert ratio.is_met


def test_goals_are_missed_by_what_is_too_slow_or_too_large() -> None:
    goals = quantize_goals([quality("int8", bits=8.5)], [timing("int8", (1.4, 1.4))])
    assert [goal.is_met for goal in goals] == [False, False]


def test_whole_benchmark_writes_ratios_of_every_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "SHAPES", ((128, 64),))
    monkeypatch.setattr(quantize, "QUALITY_SIZE", 128)
    before = torch.get_num_threads()
    out = tmp_path / "quantize.json"
    try:
        only = ["int8", "nf4, torch alone", "int4"]
        quantize.main(["--threads", "1", "--tokens", "8", "--turns", "7", "--only", *only, "--out", str(out)])
    finally:
        torch.set_num_threads(before)
    document = json.loads(out.read_text())
    assert [each["contender"] for each in document["timings"]] == [REFERENCE, *only]
    assert all(each["forward_and_backward_ratio"] > 0 for each in document["timings"])
    assert all(each["gradient_cosine"] > 0.99 for each in document["qualities"])


def test_libraries_that_are_not_installed_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("bitsandbytes", "torchao.quantization", "hqq.core.quantize", "optimum.quanto"):
        monkeypatch.setitem(sys.modules, library, None)
    found, missing = builders()
    assert {"bitsandbytes", "torchao", "hqq", "optimum-quanto"} <= missing.keys()
    assert next(iter(found)) == REFERENCE
