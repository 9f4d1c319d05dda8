"""Hidden states in bf16 at the borders that a numerics record names: bits follow from the record, not the cuts."""

from __future__ import annotations

import pytest

from plutino.job.numerics import NumericsRecord
from tests.numerics.pipelines import assert_same_tensors, make_batches, make_spec, pipeline_of, stages_of, train

BORDERS = (1, 3)


def run(spec, num_stages, borders=BORDERS, **options):
    with pipeline_of(spec, stages_of(num_stages), bf16_borders=borders, **options) as pipeline:
        decisions = train(pipeline, make_batches())
        loss = pipeline.evaluate(0, make_batches(1)[0].rows)
        return [repr(decision) for decision in decisions], loss, pipeline.snapshot()


@pytest.mark.parametrize(("model", "num_stages"), [("llama", 2), ("llama", 3), ("llama", 4), ("gpt2", 3)])
def test_rounded_borders_give_the_same_bits_inside_a_stage_and_between_two(model_dirs, model, num_stages):
    spec = make_spec(model_dirs[model], dropout=0.1)
    whole, split = run(spec, 1), run(spec, num_stages)

    assert split[:2] == whole[:2]
    assert_same_tensors(split[2], whole[2])


def test_rounded_borders_keep_their_bits_under_checkpointing_and_change_those_of_raw_ones(model_dirs):
    spec = make_spec(model_dirs["llama"])

    rounded, again, raw = run(spec, 1), run(spec, 2, checkpointing=True), run(spec, 2, borders=())

    assert again[:2] == rounded[:2]
    assert rounded[1] != raw[1] == run(spec, 1, borders=())[1]


def test_rounded_border_is_that_of_the_codec(model_dirs):
    """At a cut the record says what ``codec: bf16`` did."""
    spec = make_spec(model_dirs["llama"])
    coded = spec.model_copy(update={"placement": spec.placement.model_copy(update={"codec": "bf16"})})

    assert run(coded, 3, borders=())[:2] == run(spec, 3)[:2] == run(spec, 1)[:2]


def test_record_names_the_codec_of_each_border():
    record = NumericsRecord(
        dtype="fp32",
        attention="sdpa",
        micro_batch_size=2,
        threads_per_worker=1,
        codecs="raw",
        bf16_borders=(4,),
        versions={},
    )

    assert [record.codec_at(border) for border in (3, 4, 5)] == ["raw", "bf16", "raw"]
