"""What this device can do, measured: seconds per block at a job's real shape, dtypes that are fast here.

Weights are random, because their values do not change the time. Entry points: :func:`measure`, :func:`probe_dtypes`,
:func:`warm_up`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_node.compute_device import CPU, ComputeDevice
from edge_node.methods.registry import METHODS
from edge_node.methods.score_head import put_score_head
from edge_node.objectives.sft import SftObjective
from edge_node.processors import processor_quota
from edge_node.stage.build import COMPUTE_DTYPES, build_stage
from edge_node.stage.passes import StageInput
from edge_node.stage.random_source import RandomSource
from edge_node.stage.stage import Stage
from partitioner.device import BlockTimings, ProfileRequest
from plutino.data.batches import MicroBatchRows
from plutino.families import family_of
from plutino.job.method import LoraConfig

_SHORT_VOCABULARY = 8192
"""Rows of the head that are measured; its time grows linearly with them."""
_SCORES = 8
_REPEATS = 3
_LEAST_S = 0.5
"""Each timing is repeated until it has taken this long, but at least _REPEATS times; the median counts. A step has
hundreds of passes, slow ones among them: the fastest of a few says how short one can be, not how long they are."""
_PROBE_TURNS = 6
"""Of each dtype. Where bf16 is 300 times slower than fp32, one of them takes 0.15 s."""
_EVICTED_BYTES = 32 << 20
"""Written before each timing on a processor. In a stage other blocks' weights pass through the caches between two
passes of one block; one that is timed alone, in a loop, finds its own there and looks faster than it will be."""
_TINY_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}


def measure(request: ProfileRequest, device: ComputeDevice = CPU) -> BlockTimings:
    """Seconds of one micro-batch through one block, the embedding and the head of the model asked about.

    Where a quota bounds this process's processor time, seconds are those that hold for long: a short burst may run at
    full speed until the quota's period is used up.
    """
    torch.set_num_threads(request.threads)
    full_vocabulary = int(json.loads(request.config_json)["vocab_size"])
    config = three_blocks(request.config_json, vocabulary=min(full_vocabulary, _SHORT_VOCABULARY))
    source = RandomSource(config, device=device.torch)
    # One stage after the other, so that no more than a block is held on a small device.
    embedding_s = _measure_embedding(source, request, device)
    forward_s, backward_s = _measure_block(source, request, device)
    head_forward_s, head_backward_s = _measure_head(source, request, device)
    wide = full_vocabulary / config["vocab_size"] if family_of(config["model_type"]).head else 1.0
    return BlockTimings(
        forward_s=forward_s,
        backward_s=backward_s,
        embedding_s=embedding_s,
        head_forward_s=head_forward_s * wide,
        head_backward_s=head_backward_s * wide,
    )


def _measure_embedding(source: RandomSource, request: ProfileRequest, device: ComputeDevice) -> float:
    first = _adapted_stage(source, 0, request, device)
    embedding = first.model.get_submodule(first.embedding_name)
    ids = torch.zeros(request.micro_batch_rows, request.row_tokens, dtype=torch.int64, device=device.torch)
    return _fastest_s(device, lambda: embedding(ids))


def _measure_block(source: RandomSource, request: ProfileRequest, device: ComputeDevice) -> tuple[float, float]:
    middle = _adapted_stage(source, 1, request, device)
    if middle.family.halves is not None:
        return _measure_halves(source, request, device)
    rows, tokens = request.micro_batch_rows, request.row_tokens
    shape = (rows, tokens, int(middle.config.hidden_size))
    hidden = torch.randn(shape, dtype=COMPUTE_DTYPES[request.dtype], device=device.torch)
    side = None
    if middle.side is not None:
        side = torch.randn(rows, tokens, middle.side.layout.side_width, device=device.torch)
    trained = (hidden if side is None else side).requires_grad_(True)
    position_ids = torch.arange(tokens, device=device.torch).expand(rows, tokens)
    inputs = StageInput(position_ids=position_ids, hidden=hidden, side=side)
    gradient = torch.ones_like(trained)

    def forward() -> Tensor:
        (output,) = middle.run(inputs).trained.values()
        return output

    return _median_passes_s(device, forward, lambda output: output.backward(gradient))


def _measure_halves(source: RandomSource, request: ProfileRequest, device: ComputeDevice) -> tuple[float, float]:
    """The mean of a block of either half: a source of a row's length, a target of as many tokens as carry loss."""
    whole = json.loads(request.config_json)
    num_encoder_blocks = family_of(whole["model_type"]).num_encoder_blocks(whole)
    num_blocks = family_of(whole["model_type"]).num_blocks(whole)
    dtype, rows = COMPUTE_DTYPES[request.dtype], request.micro_batch_rows
    target_tokens = max(1, -(-request.label_tokens // rows))
    forward_s = backward_s = 0.0
    for block, num_alike in ((1, num_encoder_blocks), (2, num_blocks - num_encoder_blocks)):
        stage = _adapted_stage(source, block, request, device)
        inputs = _halves_input(stage, rows, (request.row_tokens, target_tokens), dtype)
        name = "source" if stage.side is None else "source side"

        def run(stage: Stage = stage, inputs: StageInput = inputs, name: str = name) -> Tensor:
            output = stage.run(inputs)
            return output.hidden if stage.has_decoder_blocks else output.trained[name]

        own_forward_s, own_backward_s = _median_passes_s(
            device, run, lambda output: output.backward(torch.ones_like(output))
        )
        forward_s += own_forward_s * num_alike / num_blocks
        backward_s += own_backward_s * num_alike / num_blocks
    return forward_s, backward_s


def _halves_input(stage: Stage, rows: int, num_tokens: tuple[int, int], dtype: torch.dtype) -> StageInput:
    """A source and a target, and a gradient back for what a method wants one for."""

    def stream(tokens: int, width: int, of: torch.dtype, *, is_trained: bool) -> Tensor:
        return torch.randn(rows, tokens, width, dtype=of, device=stage.device).requires_grad_(is_trained)

    width, side = int(stage.config.hidden_size), stage.side
    source, hidden = (stream(tokens, width, dtype, is_trained=side is None) for tokens in num_tokens)
    source_side = None
    if side is not None and side.reads_source:
        source_side = stream(num_tokens[0], side.layout.side_width, torch.float32, is_trained=True)
    positions = torch.arange(num_tokens[0], device=stage.device).expand(rows, num_tokens[0])
    return StageInput(position_ids=positions, source=source, hidden=hidden, source_side=source_side)


def _measure_head(source: RandomSource, request: ProfileRequest, device: ComputeDevice) -> tuple[float, float]:
    last = _adapted_stage(source, 2, request, device)
    if not last.head_name:
        return _measure_score_head(last, request, device)
    # Not the hidden size where the model projects before its head.
    width = int(last.model.get_submodule(last.head_name).in_features)  # type: ignore[arg-type]
    shape = (request.micro_batch_rows, request.row_tokens, width)
    normed = torch.randn(shape, dtype=COMPUTE_DTYPES[request.dtype], device=device.torch).requires_grad_(True)
    labels, objective = _label_rows(request), SftObjective()

    def forward() -> Tensor:
        scaled = objective.loss(last, normed, labels, 1.0).scaled
        assert scaled is not None, "at least one label is asked for"
        return scaled

    return _median_passes_s(device, forward, lambda loss: loss.backward())


def _measure_score_head(last: Stage, request: ProfileRequest, device: ComputeDevice) -> tuple[float, float]:
    """A few scores a row: what a vocabulary is to other heads costs nothing here."""
    put_score_head(last, _SCORES, seed=0)
    first = torch.randn(request.micro_batch_rows, int(last.config.hidden_size), dtype=last.dtype, device=device.torch)
    first.requires_grad_(True)
    return _median_passes_s(device, lambda: last.score(first).sum(), lambda loss: loss.backward())


def probe_dtypes(device: ComputeDevice = CPU) -> dict[str, float]:
    """Seconds of a product like the backward pass's (g @ W) in each compute dtype; see :mod:`plutino.dtypes`.

    The dtypes take turns and the fastest turn of each counts, so that a machine that is busy meanwhile is busy for all.
    """
    # A card's time for less than this is that of starting a kernel.
    rows, width = (4096, 4096) if device.is_cuda else (128, 512)
    pairs = {
        name: [torch.randn(size, width, dtype=dtype, device=device.torch) for size in (rows, width)]
        for name, dtype in COMPUTE_DTYPES.items()
    }
    for gradient, weight in pairs.values():
        torch.mm(gradient, weight)  # first use of a shape builds the kernels for it
    seconds = dict.fromkeys(pairs, float("inf"))
    quota = _quota(device)
    for _ in range(_PROBE_TURNS):
        for name, (gradient, weight) in pairs.items():
            _, took_s = _timed(device, None, quota, lambda g=gradient, w=weight: torch.mm(g, w))  # type: ignore[misc]
            seconds[name] = min(seconds[name], took_s)
    return seconds


def warm_up(device: ComputeDevice = CPU) -> None:
    """Run every kernel and thread pool of a training step once, so that the baseline contains what they keep."""
    request = ProfileRequest(
        config_json=json.dumps(_TINY_CONFIG),
        dtype="fp32",
        micro_batch_rows=2,
        row_tokens=16,
        label_tokens=2,
        method=LoraConfig(rank=4),
        threads=torch.get_num_threads(),
    )
    measure(request, device)


def three_blocks(config_json: str, *, vocabulary: int) -> dict[str, Any]:
    """The model's configuration with three blocks (a first, a middle and a last stage) and a short vocabulary."""
    config: dict[str, Any] = json.loads(config_json)
    family = family_of(config.get("model_type"))
    if family.halves is not None:
        # Two of the encoder, so that the second is neither first nor last, and the decoder's with the head.
        config |= dict.fromkeys(family.config_keys["blocks"], 2) | dict.fromkeys(
            family.config_keys["decoder_blocks"], 1
        )
    for key in ("num_hidden_layers", "n_layer"):
        if key in config:
            config[key] = 3
    for key in family_of(config.get("model_type")).per_block_config:
        if config.get(key) is not None:
            config[key] = config[key][:3]
    config["vocab_size"] = vocabulary
    # Special tokens may lie beyond the shortened vocabulary, those that a family has by default too; nothing here looks
    # at them.
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return config


def _adapted_stage(source: RandomSource, block: int, request: ProfileRequest, device: ComputeDevice) -> Stage:
    stage = build_stage(
        source, block, block + 1, dtype=COMPUTE_DTYPES[request.dtype], packing=request.packing, device=device.torch
    )
    METHODS[request.method.type](stage, request.method, seed=0)
    return stage


def _label_rows(request: ProfileRequest) -> MicroBatchRows:
    rows, tokens = request.micro_batch_rows, request.row_tokens
    mask = np.zeros((rows, tokens), np.uint8)
    wanted = max(1, min(request.label_tokens, rows * (tokens - 1)))
    places = np.arange(wanted)
    mask[places % rows, 1 + places // rows] = 1
    return MicroBatchRows(
        lengths=np.full(rows, tokens, np.int32),
        input_ids=np.zeros(rows * tokens, np.int32),
        label_mask=mask.reshape(-1),
        padded_tokens=tokens,
        sample_indices=tuple(range(rows)),
    )


def _median_passes_s(
    device: ComputeDevice, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]
) -> tuple[float, float]:
    """Seconds of a forward pass and of its backward pass, each with cold caches, as in a stage."""
    backward(forward())
    evicted = None if device.is_cuda else torch.zeros(_EVICTED_BYTES // 4)
    took_s: list[tuple[float, float]] = []
    quota = _quota(device)
    while len(took_s) < _REPEATS or sum(map(sum, took_s)) < _LEAST_S:
        output, forward_s = _timed(device, evicted, quota, forward)
        _, backward_s = _timed(device, evicted, quota, lambda output=output: backward(output))  # type: ignore[misc]
        took_s.append((forward_s, backward_s))
    forwards_s, backwards_s = zip(*took_s, strict=True)
    return statistics.median(forwards_s), statistics.median(backwards_s)


def _quota(device: ComputeDevice) -> float | None:
    return None if device.is_cuda else processor_quota()


def _timed(
    device: ComputeDevice, evicted: Tensor | None, quota: float | None, call: Callable[[], Any]
) -> tuple[Any, float]:
    if evicted is not None:
        evicted.add_(1.0)
    device.wait()
    started_s, used_s = time.perf_counter(), time.process_time()
    result = call()
    device.wait()
    took_s, used_s = time.perf_counter() - started_s, time.process_time() - used_s
    # All threads' processor time at the rate that the quota gives; a quota is no limit to what is slower anyway.
    return result, took_s if quota is None else max(took_s, used_s / quota)


def _fastest_s(device: ComputeDevice, call: Callable[[], Any], *, least_s: float = 0.05) -> float:
    call()  # first use of a shape builds the kernels for it
    fastest_s = float("inf")
    spent_s = 0.0
    repeats = 0
    quota = _quota(device)
    while repeats < _REPEATS or spent_s < least_s:
        _, took_s = _timed(device, None, quota, call)
        fastest_s = min(fastest_s, took_s)
        spent_s += took_s
        repeats += 1
    return fastest_s
