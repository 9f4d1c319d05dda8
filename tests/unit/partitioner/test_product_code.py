from __future__ import annotations

import pytest

from partitioner.heap import FLOOR_BYTES
from partitioner.memory import stage_memory
from partitioner.product_code import KEPT_PRODUCTS, product_code_bytes, product_code_environment, untouched_code_bytes
from plutino.sizes import MIB
from tests.unit.partitioner.fleet import job, llama


@pytest.mark.parametrize(
    ("changes", "is_billed"),
    [({"dtype": "bf16"}, True), ({"dtype": "fp32"}, False), ({"dtype": "bf16", "is_on_cards": True}, False)],
)
def test_product_code_is_billed_in_bf16_on_processors_alone(changes, is_billed):
    table = llama(4)
    items = stage_memory(
        table, job(table, **changes), start_block=0, end_block=4, num_stages=1, stage_index=0, checkpointing=False
    )

    assert ("product code" in {item.name for item in items}) == is_billed


def test_product_code_of_all_kept_products_is_what_was_measured_and_a_little():
    """41 MiB resident, 115 MiB mapped after 300 shapes on two settings of malloc."""
    resident_bytes = product_code_bytes("bf16", is_on_cards=False) + FLOOR_BYTES

    assert 41 * MIB <= resident_bytes <= 47 * MIB
    assert 115 * MIB <= resident_bytes + untouched_code_bytes("bf16") <= 127 * MIB
    assert untouched_code_bytes("fp32") == 0


def test_product_code_environment_bounds_both_libraries_that_keep_some():
    environment = product_code_environment()

    assert int(environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == KEPT_PRODUCTS
    # At 0 torch crashes.
    assert 1 <= int(environment["LRU_CACHE_CAPACITY"]) <= KEPT_PRODUCTS
