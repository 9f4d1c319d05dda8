"""Who is measured beside whom: job specs of one runtime, in the order in which they are run.

PAC as published stands for what its paper says (arXiv:2408.10746): fp32, reduction 8, its planner's number of stages, a
group's micro-batches of equal rows and in equal shares, a cache of raw hidden states. What differs: which blocks a
stage gets is our planner's choice (equal devices: the same), and entries go to the device that trains from them while
the first epoch runs, where PAC moves them behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.pac_shapes import Shape

OURS = "ours"
UNCACHED = "ours, no cache"
EQUAL_ROWS = "ours, micro-batches of equal rows"
"""As everybody cuts them, where ours have like numbers of tokens if devices share a stage."""
OWN_DTYPE = "ours, dtype as the devices like it"
"""bf16 where all of them are quicker with it, as a job gets it that names none; all others are in fp32."""
FP16_SUMS = "ours, sums in fp16"
"""Half the bytes of gradients travel, at the price of a rounding after each addition; all others' are fp32."""
SIXTEEN_BITS = "ours, 16 bits"
"""Both of these."""
LORA_SIXTEEN_BITS = "data-parallel: lora, 16 bits"
"""What the best baseline becomes by them."""
LEAVING = "ours, the blocks leave"
"""Later epochs are data-parallel without the backbone, whatever they take: what memory they need."""
LEAST = "ours, bf16 in stages"
"""What the smallest devices take: half of each frozen number, and a part of the blocks in every epoch."""
PAC = "PAC as published"
ALONE = "one device: parallel adapters"
ALONE_CACHED = "one device: parallel adapters, cached"
TOP_QUARTER = "LoRA on the top quarter"
TOP_QUARTER_CACHED = "LoRA on the top quarter, cached"
TRAINER = "transformers Trainer"
RAY_TRAIN = "Ray Train (DDP)"
"""Of the whole fleet, but over loopback; :mod:`benchmarks.peers.ray_train`."""
FULL_PIPELINE = "pipeline: full"
REDUCTION = 8

Kind = Literal["ours", "variant", "baseline", "one device", "trainer", "ray train"]
"""The last two are programs of others; every other contender is a job of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to fine-tune the same model on the same rows."""

    name: str
    kind: Kind
    method: Mapping[str, Any]
    stages: int | Literal["pac"] | None = None
    """pac: as many as PAC's planner chooses."""
    replicas: Literal["auto", "never"] = "auto"
    cache: str = "off"
    cached_epochs: str = "auto"
    """Where a method is cached whole; a frozen prefix's epochs go through the blocks above it."""
    dtype: str = "fp32"
    sums: str = "fp32"
    uses_one_device: bool = False
    rate: str | None = None
    """Of all links, in place of the fleet's."""
    threads: tuple[int, ...] | None = None
    """Processors of each agent, in place of the fleet's; :func:`scaling_contenders`."""
    training: Mapping[str, Any] = field(default_factory=dict)


def methods_of(shape: Shape) -> dict[str, dict[str, Any]]:
    """What PAC is compared with, in the sizes of its runs: LoRA of rank 32, adapters of a sixteenth of the width."""
    return {
        "lora": {"type": "lora", "rank": 32, "alpha": 64, "target_modules": list(shape.query_and_value)},
        "adapters": {"type": "adapters", "placement": "houlsby", "bottleneck": max(1, shape.hidden_size // 16)},
        "full": {"type": "full"},
    }


def contenders(shape: Shape, *, num_agents: int, codec: str = "int4") -> list[Contender]:
    """All of a shape; those that most ratios need come first."""
    side = {"type": "parallel_adapters", "reduction": REDUCTION}
    methods = methods_of(shape)
    top = {**methods["lora"], "blocks": f"last {max(1, shape.num_blocks // 4)}"}
    return [
        Contender(name=OURS, kind="ours", method=side, cache=codec),
        Contender(
            name=PAC,
            kind="variant",
            method=side,
            cache="raw",
            cached_epochs="data-parallel",
            stages="pac",
            training={"micro_batch_cut": "rows"},
        ),
        _data_parallel("lora", methods),
        _pipeline("lora", methods, num_agents),
        Contender(name=UNCACHED, kind="variant", method=side),
        Contender(name=EQUAL_ROWS, kind="variant", method=side, cache=codec, training={"micro_batch_cut": "rows"}),
        Contender(name=FP16_SUMS, kind="variant", method=side, cache=codec, sums="fp16"),
        Contender(name=ALONE, kind="one device", method=side, stages=1, uses_one_device=True),
        _pipeline("full", methods, num_agents),
        Contender(name=OWN_DTYPE, kind="variant", method=side, cache=codec, dtype="auto"),
        Contender(name=SIXTEEN_BITS, kind="variant", method=side, cache=codec, dtype="auto", sums="fp16"),
        Contender(name=LORA_SIXTEEN_BITS, kind="variant", method=methods["lora"], stages=1, dtype="auto", sums="fp16"),
        Contender(name=LEAVING, kind="variant", method=side, cache=codec, cached_epochs="data-parallel"),
        Contender(
            name=LEAST,
            kind="variant",
            method=side,
            cache=codec,
            dtype="bf16",
            stages=num_agents,
            replicas="never",
            cached_epochs="stages",
        ),
        Contender(name="ours, 100 Mbit", kind="variant", method=side, cache=codec, rate="100Mbit"),
        Contender(name=f"{TRAINER}: lora", kind="trainer", method=methods["lora"], uses_one_device=True),
        Contender(name=f"{RAY_TRAIN}: lora", kind="ray train", method=methods["lora"]),
        _data_parallel("adapters", methods),
        _pipeline("adapters", methods, num_agents),
        Contender(name=TOP_QUARTER_CACHED, kind="variant", method=top, cache=codec),
        Contender(name=TOP_QUARTER, kind="variant", method=top),
        _data_parallel("full", methods),
        Contender(name=ALONE_CACHED, kind="one device", method=side, stages=1, uses_one_device=True, cache=codec),
        _one_device("lora", methods),
        _one_device("adapters", methods),
        _one_device("full", methods),
        Contender(name=f"{TRAINER}: full", kind="trainer", method=methods["full"], uses_one_device=True),
    ]


def _data_parallel(method: str, methods: Mapping[str, Mapping[str, Any]]) -> Contender:
    """As EDDL does it: every device has the whole model."""
    return Contender(name=f"data-parallel: {method}", kind="baseline", method=methods[method], stages=1)


def _pipeline(method: str, methods: Mapping[str, Mapping[str, Any]], num_agents: int) -> Contender:
    """As Eco-FL does it: every device has a stage of its own."""
    return Contender(
        name=f"pipeline: {method}", kind="baseline", method=methods[method], stages=num_agents, replicas="never"
    )


def _one_device(method: str, methods: Mapping[str, Mapping[str, Any]]) -> Contender:
    return Contender(
        name=f"one device: {method}", kind="one device", method=methods[method], stages=1, uses_one_device=True
    )


def scaling_contenders(codec: str = "int4") -> list[Contender]:
    """Ours on fleets of 2 and 8 equal agents, of 4:2:1, and on each of those three alone."""
    fleets = {
        "2 equal agents": (1,) * 2,
        "8 equal agents": (1,) * 8,
        "agents of 4:2:1": (4, 2, 1),
        "alone 4": (4,),
        "alone 2": (2,),
        "alone 1": (1,),
    }
    side = {"type": "parallel_adapters", "reduction": REDUCTION}
    return [
        Contender(name=name, kind="variant", method=side, cache=codec, threads=threads)
        for name, threads in fleets.items()
    ]


def job_values(
    contender: Contender,
    shape: Shape,
    *,
    model_dir: Path,
    rows_path: Path,
    out_dir: Path,
    devices: Sequence[str],
    epochs: int,
    batch_size: int,
    micro_batch_size: int | None,
    num_stages: int | None,
) -> dict[str, Any]:
    """The contender's job file.

    Args:
        contender: who.
        shape: of the model.
        model_dir: the model.
        rows_path: what it learns from.
        out_dir: where the adapter is saved; must not exist.
        devices: the agents that it may use.
        epochs: passes over the rows.
        batch_size: rows of a step.
        micro_batch_size: rows of a micro-batch; None lets the plan choose.
        num_stages: see :attr:`Contender.stages`, with PAC's number in its place.
    """
    return {
        "name": contender.name,
        "model": {"path": str(model_dir), "dtype": contender.dtype},
        "method": dict(contender.method),
        "objective": {"type": "seq2seq" if shape.is_seq2seq else "sft"},
        "data": {"train": str(rows_path), "max_tokens": 128},
        "training": {
            "epochs": epochs,
            "batch_size": batch_size,
            "micro_batch_size": micro_batch_size,
            "lr": 3e-4,
            "activation_cache": contender.cache,
            "checkpointing": "off",
            **contender.training,
        },
        "placement": {
            "devices": list(devices[:1] if contender.uses_one_device else devices),
            "stages": num_stages,
            "replicas": contender.replicas,
            "sums": contender.sums,
            "replan": "never",
            "cached_epochs": contender.cached_epochs,
        },
        "output": {"dir": str(out_dir)},
    }
