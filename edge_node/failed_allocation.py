"""Names what libraries only describe: an allocation that a worker's memory limit refused.

torch reports one on a processor as a RuntimeError, and so does oneDNN, which says no more than that something could not
be created when the memory for a product's code is refused.
"""

from __future__ import annotations

import errno
import re

import torch

from edge_node.compute_device import ComputeDevice
from plutino.errors import OutOfMemoryError
from plutino.job.assignment import WorkerAssignment
from plutino.sizes import format_size

_TORCH_SAYS = re.compile(r"can't allocate memory|not enough memory|std::bad_alloc")
"""Of tensors on Linux and on Windows; of what its own code allocates."""

_ONEDNN_SAYS = re.compile(r"could not (create a primitive|create a memory|execute a primitive)(?! descriptor)")
"""Of a product that it knows how to compute; a descriptor that it could not create is one that it does not."""


def as_plutino_error(error: Exception, assignment: WorkerAssignment, device: ComputeDevice) -> Exception:
    """The error itself, or an :class:`OutOfMemoryError` with numbers and ways out where it is a failed allocation.

    Args:
        error: what ended a worker's work.
        assignment: the worker's part of the job.
        device: where it computes; what it holds of the device's memory is still held.
    """
    is_of_products = _says(error, _ONEDNN_SAYS)
    if not is_of_products and not _is_failed_allocation(error):
        return error
    rows = assignment.numerics.micro_batch_size
    ways_out = [
        "give that agent more memory (--memory)",
        "lower data.max_tokens" if rows == 1 else f"lower training.micro_batch_size, which is {rows}",
    ]
    if is_of_products and assignment.numerics.dtype == "bf16":
        ways_out.append("set model.dtype: fp32, whose products need no generated code")
    return OutOfMemoryError(
        f"stage {assignment.stage_index} with blocks [{assignment.shape.start_block}, {assignment.shape.end_block}) "
        f"could not allocate memory on {device.torch} beside the {format_size(device.held_bytes())} that it holds; its "
        f"memory budget is {format_size(assignment.memory_budget_bytes)} ({type(error).__name__}: {error}); "
        f"{', or '.join(ways_out)}"
    )


def _is_failed_allocation(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(error, _TORCH_SAYS)


def _says(error: Exception, words: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError) and words.search(str(error)) is not None
