from __future__ import annotations

import re

import pytest

from partitioner.device import LinkTable
from partitioner.fitting import fits
from partitioner.micro_batch import with_rows
from partitioner.search import search
from plutino.errors import InfeasiblePlanError
from plutino.job.method import LoraConfig
from tests.unit.partitioner.fleet import TIGHT, device, job, llama, tight_device


def refusal(table, shape, devices):
    with pytest.raises(InfeasiblePlanError) as caught:
        search(table, shape, devices)
    return str(caught.value)


def test_refusal_names_need_offers_and_a_micro_batch_that_really_fits():
    table = llama(4)
    shape, devices = job(table, **TIGHT), [device("a", available_mib=380), device("b", available_mib=360)]

    message = refusal(table, shape, devices)

    assert re.search(r"needs at least [\d.]+ MiB", message)
    assert "a 380 MiB (80 MiB beyond its baseline); b 360 MiB (60 MiB beyond its baseline)" in message
    rows = int(re.search(r"micro_batch_size: (\d+) \(now 16\)", message)[1])
    assert search(table, with_rows(shape, rows), devices)
    assert not fits(table, with_rows(shape, rows * 2), devices, LinkTable())


def test_refusal_names_a_length_that_really_fits():
    table = llama(4)
    shape, devices = job(table, **TIGHT), [device("a", available_mib=380)]

    tokens = int(re.search(r"max_tokens: (\d+) \(now 512\)", refusal(table, shape, devices))[1])

    assert fits(table, shape.model_copy(update={"row_tokens": tokens}), devices, LinkTable())
    assert not fits(table, shape.model_copy(update={"row_tokens": tokens + 16}), devices, LinkTable())


def test_refusal_names_one_more_device_that_really_helps():
    table = llama(4)
    shape, devices = job(table, **TIGHT), [device("a", available_mib=380)]

    more_mib = int(re.search(r"one more device of (\d+) MiB", refusal(table, shape, devices))[1])

    assert fits(table, shape, [*devices, device("b", available_mib=more_mib)], LinkTable())
    assert not fits(table, shape, [*devices, device("b", available_mib=more_mib - 32)], LinkTable())


def test_refusal_names_checkpointing_where_the_job_turned_it_off():
    table = llama(4)
    shape = job(table, row_tokens=256, checkpointing="off")

    assert "training.checkpointing: on" in refusal(table, shape, [tight_device(table, shape, checkpointing=True)])


def test_refusal_names_bf16_where_halved_weights_fit():
    table = llama(4, vocab_size=400_000)
    tight = tight_device(table, job(table, dtype="bf16"), checkpointing=True)

    assert "model.dtype: bf16" in refusal(table, job(table), [tight])


def test_refusal_names_a_rank_that_fits():
    table = llama(4)
    few_tokens = {"row_tokens": 8, "micro_batch_rows": 1, "label_tokens": 4}
    tight = tight_device(table, job(table, LoraConfig(rank=512), **few_tokens), checkpointing=True)

    message = refusal(table, job(table, LoraConfig(rank=2048), **few_tokens), [tight])

    assert "method.rank divided by 4" in message


def test_refusal_without_devices_says_how_to_start_one():
    assert "plutino-node run" in refusal(llama(2), job(llama(2)), [])


def test_refusal_of_more_stages_than_devices_names_both_numbers():
    message = refusal(llama(4), job(llama(4), exact_stages=3), [device("a"), device("b")])

    assert "exactly 3 stages, but 2 devices" in message
