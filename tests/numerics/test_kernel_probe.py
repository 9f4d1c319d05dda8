from __future__ import annotations

import pytest
import torch

from edge_node.kernel_probe import _linear, _probes
from edge_node.profile import fast_dtypes
from plutino.doctor.child import ChildRun
from plutino.doctor.kernels import fast_dtypes as told_fast
from plutino.doctor.kernels import judge_kernels
from plutino.doctor.report import Verdict


def test_real_kernels_of_this_processor_are_right_and_the_doctor_says_what_the_agent_offers():
    results = dict(_probes(torch.get_num_threads()))

    findings = judge_kernels(ChildRun(results=results))

    assert [finding for finding in findings if finding.verdict is Verdict.FAIL] == []
    assert results["fp32"]["error"] < 1e-5
    assert 1e-5 < results["bf16"]["error"] < 2e-2
    # Which of two nearly equal dtypes is first may change from run to run; whether bf16 is among them may not.
    gap = results["bf16"]["backward_s"] / results["fp32"]["backward_s"]
    if not 0.8 < gap < 1.25:
        assert set(told_fast(results)) == set(fast_dtypes())


@pytest.mark.gpu
def test_real_kernels_of_a_cuda_card_are_right():
    for dtype, bound in (("fp32", 1e-2), ("bf16", 2e-2)):
        assert _linear("cuda", dtype)["error"] < bound
