"""Generated code of matrix products: what a worker's library keeps of every shape of product, and how many it may keep.

On processors torch's bf16 products are oneDNN's, which generates code for each new product (rows, inner size, columns,
layouts) and keeps it, so that the next product of that shape begins at once. Rows are a micro-batch's tokens, so every
new length brings all of a block's products anew: 26 with LoRA on all linear layers of a Llama, attention's backward
pass included. By default 1,024 are kept: 0.6 MiB of resident and 1.9 MiB of mapped memory each, 600 MiB and more. A
worker keeps :data:`KEPT_PRODUCTS`, and generates what it meets again after so many others: 0.4 ms a product.

What is generated depends on the shape alone, so that no number of kept products changes a bit. Measured with torch 2.13
and oneDNN 3.12 on an AMD EPYC with bf16 units, over 300 shapes: 41 MiB resident and 115 MiB mapped with 64 kept
products, 199 and 566 MiB with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from plutino.sizes import KIB

KEPT_PRODUCTS = 64
"""More than a block's forward and backward passes have, an encoder-decoder's with sources and targets included: blocks
of a stage share them, so that what is generated for the first block of a pass serves the others."""

_KEPT_DESCRIPTORS = 4
"""torch keeps a description of each product beside oneDNN's, in every thread; finding one that it did not keep takes
3 us, because oneDNN has it. None at all is no valid number."""

_RESIDENT_BYTES = 480 * KIB
"""Of one kept product, constants and code. What is left of making it lies in the floor that any worker is billed
(:data:`partitioner.heap.FLOOR_BYTES`): whole workers of 20 lengths peak at 0.90 to 0.93 of their bills
(tests/unit/partitioner/test_memory.py)."""

_UNTOUCHED_BYTES = 1280 * KIB
"""Of one kept product: mapped for code that turned out shorter. A data segment's limit counts it."""


def product_code_environment() -> Mapping[str, str]:
    """Environment under which a process keeps so many products; read once, when its libraries first need it."""
    return {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KEPT_PRODUCTS), "LRU_CACHE_CAPACITY": str(_KEPT_DESCRIPTORS)}


def product_code_bytes(dtype: str, *, is_on_cards: bool) -> int:
    """Resident bytes of a worker's kept products: none in fp32, whose products are another library's, or on cards."""
    return KEPT_PRODUCTS * _RESIDENT_BYTES if dtype == "bf16" and not is_on_cards else 0


def untouched_code_bytes(dtype: str) -> int:
    """What a worker maps for them in that compute dtype and never touches."""
    return KEPT_PRODUCTS * _UNTOUCHED_BYTES if dtype == "bf16" else 0
