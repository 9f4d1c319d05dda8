from __future__ import annotations

import asyncio

import pytest

from coordinator.fleet.membership import Device
from coordinator.jobs.job_shape import shape_for
from coordinator.jobs.measuring import faster_products, measure_devices
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.profiler import Seconds
from partitioner.device import BlockTimings
from plutino.job.spec import parse_spec
from plutino.sizes import GIB
from plutino.types import AgentId
from tests.unit.partitioner.fleet import device, llama, t5

PREPARED = PreparedData(
    num_train=100,
    num_eval=0,
    num_truncated=0,
    total_steps=10,
    row_tokens=73,
    source_tokens=70,
    label_tokens_per_row=4,
    prompt_tokens=0,
    stop_token_ids=(3,),
    mean_row_tokens=40.0,
)


class ListeningProfiler:
    """Notes what is asked."""

    def __init__(self):
        self.asked = []

    async def measure(self, asked):
        self.asked += [one.request for one in asked]
        return [Seconds(device("d").timings) for _ in asked]


def spec_of(tmp_path, objective):
    values = {
        "model": {"path": str(tmp_path), "dtype": "fp32"},
        "objective": {"type": objective},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "training": {"steps": 10, "batch_size": 8, "micro_batch_size": 2},
    }
    if objective == "seq2seq":
        values["method"] = {"type": "parallel_adapters", "reduction": 4}
    return parse_spec(values, base_dir=tmp_path)


@pytest.mark.parametrize(("table", "objective", "source_tokens"), [(t5(4), "seq2seq", 70), (llama(4), "sft", 0)])
def test_devices_measure_an_encoders_block_at_the_longest_source_and_other_models_at_the_longest_row(
    tmp_path, table, objective, source_tokens
):
    spec = spec_of(tmp_path, objective)
    one = Device(
        agent_id=AgentId("d"), name="d", host_id="h", memory_budget_bytes=4 * GIB, baseline_bytes=GIB // 4, threads=1
    )
    shape, profiler = shape_for(spec, PREPARED, table, "fp32", 2), ListeningProfiler()

    asyncio.run(measure_devices([one], ("{}", table), shape, spec, profiler, None))

    (request,) = profiler.asked
    assert (request.source_tokens, request.row_tokens, request.label_tokens) == (source_tokens, 73, 8)


def test_integer_products_are_weighed_by_a_block_of_either_half():
    plain = device("d")
    slower = BlockTimings(**(plain.timings.known_s | {"decoder_forward_s": 0.1, "decoder_backward_s": 0.1}))
    faster = BlockTimings(**(slower.known_s | {"forward_s": 0.005}))
    found = [[plain.model_copy(update={"timings": timings})] for timings in (slower, faster)]

    # Twice as fast in the encoder, which is a tenth of the model's seconds.
    assert not faster_products(t5(12), *found)[0]
    assert faster_products(llama(12), *found)[0]
