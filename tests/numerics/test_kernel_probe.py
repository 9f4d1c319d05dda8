from __future__ import annotations

import pytest
import torch

from edge_node.kernel_probe import _linear, _probes
from edge_node.profile import probe_dtypes
from plutino.doctor.child import ChildRun
from plutino.doctor.kernels import fast_dtypes as told_fast
from plutino.doctor.kernels import judge_kernels
from plutino.doctor.report import Verdict
from plutino.dtypes import MOST_SLOWER, offered_dtypes


def test_real_kernels_of_this_processor_are_right_and_the_doctor_says_what_the_agent_offers():
    results = dict(_probes(torch.get_num_threads()))

    findings = judge_kernels(ChildRun(results=results))

    assert [finding for finding in findings if finding.verdict is Verdict.FAIL] == []
    assert results["fp32"]["error"] < 1e-5
    assert 1e-5 < results["bf16"]["error"] < 2e-2
    # What lies near the bound may change from run to run.
    gap = results["bf16"]["backward_s"] / results["fp32"]["backward_s"]
    if not 0.7 < gap / MOST_SLOWER < 1.4:
        assert set(told_fast(results)) == set(offered_dtypes(probe_dtypes()))


@pytest.mark.gpu
def test_real_kernels_of_a_cuda_card_are_right():
    for dtype, bound in (("fp32", 1e-2), ("bf16", 2e-2)):
        assert _linear("cuda", dtype)["error"] < bound
