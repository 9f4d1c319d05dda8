from __future__ import annotations

import pytest

from benchmarks.peers.workload import Workload
from benchmarks.pipeline_peers import one_process, torch_pipelining

TINY = Workload(
    num_blocks=4, hidden_dim=64, intermediate_dim=128, num_heads=4, vocab_size=512, seq_len_tokens=32, lr=1e-2
)


def losses_of(contender, num_steps):
    try:
        contender.start()
        return [figures.loss for figures in contender.run_steps(num_steps)]
    finally:
        contender.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pipeline_peers_same_workload_train_the_same_adapters(tmp_path):
    """Peers that do not train the same thing must not be compared. bf16 rounds in different places: 1e-3."""
    whole = losses_of(one_process(TINY, 1), num_steps=4)
    micro_batches = losses_of(one_process(TINY, 8), num_steps=4)
    stages = losses_of(torch_pipelining(TINY, (1,), tmp_path), num_steps=4)

    assert micro_batches == pytest.approx(whole, abs=1e-3)
    assert stages == pytest.approx(whole, abs=1e-3)
