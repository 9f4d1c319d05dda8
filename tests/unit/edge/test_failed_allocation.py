from __future__ import annotations

import errno

import pytest
import torch

from edge_node.compute_device import CPU
from edge_node.failed_allocation import as_plutino_error
from plutino.errors import OutOfMemoryError
from plutino.job.assignment import StageShape, WorkerAssignment
from plutino.job.data import DataConfig
from plutino.job.model import ModelConfig
from plutino.job.numerics import NumericsRecord
from plutino.job.spec import JobSpec
from plutino.sizes import MIB

ONEDNN = RuntimeError("could not create a primitive")


def assignment(*, dtype: str = "bf16", micro_batch_size: int = 4) -> WorkerAssignment:
    numerics = {"dtype": dtype, "micro_batch_size": micro_batch_size, "attention": "sdpa", "codecs": "raw"}
    return WorkerAssignment(
        job_id="job",
        plan_epoch=1,
        stage_index=1,
        stages=(StageShape(start_block=0, end_block=8), StageShape(start_block=8, end_block=12)),
        spec=JobSpec(model=ModelConfig(path="model"), data=DataConfig(train="rows.jsonl")),
        numerics=NumericsRecord.model_validate(numerics | {"threads_per_worker": 1, "versions": {}}),
        checkpointing=False,
        base_hash="",
        manifest_sha256="",
        total_steps=1,
        max_micro_batches=1,
        threads=1,
        memory_budget_bytes=788 * MIB,
        coordinator_address="",
        bulk_address="",
    )


def refused_by_torch() -> Exception:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 24 << 30, dtype=torch.uint8)
    return refused.value


@pytest.mark.parametrize(
    "error",
    [
        refused_by_torch(),
        RuntimeError("std::bad_alloc"),
        ONEDNN,
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ENOMEM, "mmap"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failed_allocation_is_told_with_the_stage_the_numbers_and_the_way_out(error: Exception) -> None:
    told = as_plutino_error(error, assignment(), CPU)

    assert isinstance(told, OutOfMemoryError)
    for part in (
        r"stage 1 with blocks \[8, 12\) could not allocate memory on cpu beside the [\d.]+ [MG]iB that it holds",
        "its memory budget is 788 MiB",
        type(error).__name__,
        "--memory",
        "lower training.micro_batch_size, which is 4",
    ):
        assert told_in(part, told)


def told_in(part: str, error: Exception) -> bool:
    with pytest.raises(OutOfMemoryError, match=part):
        raise error
    return True


@pytest.mark.parametrize(
    ("error", "dtype", "names_fp32"), [(ONEDNN, "bf16", True), (ONEDNN, "fp32", False), (MemoryError(), "bf16", False)]
)
def test_failed_allocation_of_a_products_code_alone_names_fp32(error: Exception, dtype: str, names_fp32: bool) -> None:
    told = as_plutino_error(error, assignment(dtype=dtype), CPU)

    assert ("model.dtype: fp32" in str(told)) == names_fp32


def test_failed_allocation_of_single_rows_names_their_length_instead() -> None:
    told = as_plutino_error(MemoryError(), assignment(micro_batch_size=1), CPU)

    assert "lower data.max_tokens" in str(told) and "micro_batch_size" not in str(told)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        RuntimeError("could not create a primitive descriptor for the inner product forward propagation primitive"),
        OSError(errno.ENOENT, "gone"),
        OutOfMemoryError("x"),
    ],
)
def test_failure_that_is_no_allocation_stays_what_it_is(error: Exception) -> None:
    assert as_plutino_error(error, assignment(), CPU) is error
