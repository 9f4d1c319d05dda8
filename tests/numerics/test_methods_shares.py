"""The methods' papers name shares of parameters; models of their size, without weights, must come to the same."""

from __future__ import annotations

import pytest

from benchmarks.method_shares import CLAIMS, count

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize(
    "claim",
    [
        # Those of models that are quickly built always run.
        pytest.param(
            each,
            id=f"{each.paper}, {each.says}, {each.model}",
            marks=() if each.model == "GPT-2 medium" and each.method["type"] != "p_tuning_v2" else pytest.mark.slow,
        )
        for each in CLAIMS
    ],
)
def test_share_of_parameters_is_the_papers_and_stock_peft_counts_the_same(claim):
    found = count(claim)

    assert found.holds, found
