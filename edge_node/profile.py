"""What this device can do, measured: seconds per block at a job's real shape, dtypes that are fast here.

Weights are random, because their values do not change the time. Entry points: :func:`measure`, :func:`probe_dtypes`,
:func:`warm_up`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_node.compute_device import CPU, ComputeDevice
from edge_node.guard import heap_kept
from edge_node.meeting import ALONE, Meeting
from edge_node.methods.registry import METHODS
from edge_node.methods.score_head import put_score_head
from edge_node.objectives.sft import SftObjective
from edge_node.pass_timing import LEAST_S, Passes, PassTimer
from edge_node.stage.architecture import parse_config
from edge_node.stage.build import COMPUTE_DTYPES, build_stage
from edge_node.stage.passes import StageInput
from edge_node.stage.random_source import RandomSource
from edge_node.stage.recomputing import recomputing
from edge_node.stage.stage import Stage
from partitioner.device import BlockTimings, ProfileRequest
from plutino.data.batches import MicroBatchRows
from plutino.families import family_of
from plutino.job.method import LoraConfig
from plutino.sizes import SMALLEST_MAPPING_BYTES

_SHORT_VOCABULARY = 8192
"""Rows of the head that are measured; its time grows linearly with them."""
_SCORES = 8
_ONE_ROW_SHARE = 0.15
"""Of a window, for passes with one row: they are short, so that it has enough of them."""
_MIDDLE_OF_HALVES = (1, 3)
"""Blocks of :func:`few_blocks`, one of the encoder and one of the decoder."""
_PROBE_TURNS = 6
"""Of each dtype. Where bf16 is 300 times slower than fp32, one of them takes 0.15 s."""
_Named = dict[str, float | None]
"""Seconds by the names of :class:`BlockTimings`, without what they are of; None: not timed."""
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


def measure(
    request: ProfileRequest, device: ComputeDevice = CPU, meeting: Meeting = ALONE, *, least_s: float = LEAST_S
) -> BlockTimings:
    """Seconds of one micro-batch through one block, the embedding and the head of the model asked about.

    Blocks and head are timed while the other devices of a meeting compute, for ``least_s`` each and three passes;
    blocks once more as malloc gives back what is freed, if that is asked for and makes a difference.

    Where a quota bounds this process's processor time, seconds are those that hold for long: a short burst may run at
    full speed until the quota's period is used up.
    """
    torch.set_num_threads(request.threads)
    full_vocabulary = int(json.loads(request.config_json)["vocab_size"])
    config = few_blocks(request.config_json, vocabulary=min(full_vocabulary, _SHORT_VOCABULARY))
    source, timer = RandomSource(config, device=device.torch), PassTimer(device, meeting, least_s=least_s)
    # One stage after the other, so that no more than a block is held on a small device.
    with heap_kept():
        embedding_s = _measure_embedding(source, request, timer)
        seconds = _measure_blocks(source, request, timer)
        head = _measure_head(source, config, request, timer)
    if request.is_tight and _has_mappings(config, request):
        again = _measure_blocks(source, request.model_copy(update={"scales": False}), timer)
        # A card has no such heap: it keeps the processors of its host company.
        seconds |= {} if device.is_cuda else {f"mapped_{name}": s for name, s in again.items()}
    wide = full_vocabulary / config["vocab_size"] if family_of(config["model_type"]).head else 1.0
    seconds |= {f"head_{name}": s * wide for name, s in head.items() if s is not None}
    return BlockTimings.model_validate({**seconds, "embedding_s": embedding_s})


def _has_mappings(config: dict[str, Any], request: ProfileRequest) -> bool:
    """Whether hidden states are large enough for mappings of their own, which a budget without room does not keep."""
    hidden_size = int(parse_config(config).hidden_size)
    num_elements = request.micro_batch_rows * request.row_tokens * hidden_size
    return num_elements * COMPUTE_DTYPES[request.dtype].itemsize >= SMALLEST_MAPPING_BYTES


def _measure_embedding(source: RandomSource, request: ProfileRequest, timer: PassTimer) -> float:
    first = _adapted_stage(source, 0, request, timer.device)
    embedding = first.model.get_submodule(first.embedding_name)
    ids = torch.zeros(request.micro_batch_rows, request.row_tokens, dtype=torch.int64, device=timer.device.torch)
    return timer.fastest_s(lambda: embedding(ids))


def _measure_blocks(source: RandomSource, request: ProfileRequest, timer: PassTimer) -> _Named:
    """A block, and of an encoder-decoder one of either half, by the names of :class:`BlockTimings`."""
    if family_of(json.loads(request.config_json)["model_type"]).halves is None:
        stage = _adapted_stage(source, 1, request, timer.device)
        return _timed(request, timer, partial(_passes_of_block, stage))
    of_encoder, of_decoder = (
        _timed(request, timer, partial(_passes_of_half, _adapted_stage(source, block, request, timer.device)))
        for block in _MIDDLE_OF_HALVES
    )
    return of_encoder | {f"decoder_{name}": seconds for name, seconds in of_decoder.items()}


def _timed(request: ProfileRequest, timer: PassTimer, passes_of: Callable[[ProfileRequest], Passes]) -> _Named:
    """Seconds of passes with the rows that are asked about, and with one where the plan may choose their number."""
    found: _Named = asdict(timer.time(passes_of(request)))
    if not request.scales or request.micro_batch_rows == 1:
        return found
    fields = {"micro_batch_rows": 1, "label_tokens": max(1, -(-request.label_tokens // request.micro_batch_rows))}
    one_row = timer.time(replace(passes_of(request.model_copy(update=fields)), recomputing=None), share=_ONE_ROW_SHARE)
    return found | {"one_row_forward_s": one_row.forward_s, "one_row_backward_s": one_row.backward_s}


def _passes_of_block(stage: Stage, request: ProfileRequest) -> Passes:
    rows, tokens = request.micro_batch_rows, request.row_tokens
    shape = (rows, tokens, int(stage.config.hidden_size))
    hidden = torch.randn(shape, dtype=COMPUTE_DTYPES[request.dtype], device=stage.device)
    side = None
    if stage.side is not None:
        side = torch.randn(rows, tokens, stage.side.layout.side_width, device=stage.device)
    trained = (hidden if side is None else side).requires_grad_(True)
    position_ids = torch.arange(tokens, device=stage.device).expand(rows, tokens)
    inputs = StageInput(position_ids=position_ids, hidden=hidden, side=side)
    gradient = torch.ones_like(trained)

    def forward() -> Tensor:
        (output,) = stage.run(inputs).trained.values()
        return output

    return _block_passes(stage, request, forward, lambda o: o.backward(gradient))


def _block_passes(
    stage: Stage, request: ProfileRequest, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any]
) -> Passes:
    """Passes through a stage's block; nothing of a side network is recomputed."""
    if not request.recomputes or stage.side is not None:
        return Passes(forward, backward)
    block = stage.model.get_submodule(stage.family.block_name(stage.start_block, stage.num_encoder_blocks))
    return Passes(forward, backward, lambda: recomputing(block))


def _passes_of_half(stage: Stage, request: ProfileRequest) -> Passes:
    """A block beside a source of the longest one's length and a target of as many tokens as carry loss in a row."""
    rows = request.micro_batch_rows
    num_tokens = request.source_tokens or request.row_tokens, max(1, -(-request.label_tokens // rows))
    inputs = _halves_input(stage, rows, num_tokens, COMPUTE_DTYPES[request.dtype])
    of_encoder, of_decoder = ("source", "hidden") if stage.side is None else ("source side", "side")
    name = of_decoder if stage.has_decoder_blocks else of_encoder

    def forward() -> Tensor:
        return stage.run(inputs).trained[name]

    return _block_passes(stage, request, forward, lambda output: output.backward(torch.ones_like(output)))


def _halves_input(stage: Stage, rows: int, num_tokens: tuple[int, int], dtype: torch.dtype) -> StageInput:
    """A source and a target, and a gradient back for what a method wants one for."""

    def stream(tokens: int, width: int, of: torch.dtype, *, is_trained: bool) -> Tensor:
        return torch.randn(rows, tokens, width, dtype=of, device=stage.device).requires_grad_(is_trained)

    width, side = int(stage.config.hidden_size), stage.side
    source, hidden = (stream(tokens, width, dtype, is_trained=side is None) for tokens in num_tokens)
    source_side = target_side = None
    if side is not None:
        source_side, target_side = (
            stream(tokens, side.layout.side_width, torch.float32, is_trained=True) if is_read else None
            for tokens, is_read in zip(num_tokens, (side.reads_source, side.reads_side), strict=True)
        )
    positions = torch.arange(num_tokens[0], device=stage.device).expand(rows, num_tokens[0])
    return StageInput(position_ids=positions, source=source, hidden=hidden, source_side=source_side, side=target_side)


def _measure_head(source: RandomSource, config: dict[str, Any], request: ProfileRequest, timer: PassTimer) -> _Named:
    last_block = family_of(config["model_type"]).num_blocks(config) - 1
    last = _adapted_stage(source, last_block, request, timer.device)
    if last.head_name:
        return _timed(request, timer, partial(_passes_of_head, last))
    put_score_head(last, _SCORES, seed=0)
    return _timed(request, timer, partial(_passes_of_score_head, last))


def _passes_of_head(last: Stage, request: ProfileRequest) -> Passes:
    # Not the hidden size where the model projects before its head.
    width = int(last.model.get_submodule(last.head_name).in_features)  # type: ignore[arg-type]
    shape = (request.micro_batch_rows, request.row_tokens, width)
    normed = torch.randn(shape, dtype=COMPUTE_DTYPES[request.dtype], device=last.device).requires_grad_(True)
    labels, objective = _label_rows(request), SftObjective()

    def forward() -> Tensor:
        scaled = objective.loss(last, normed, labels, 1.0).scaled
        assert scaled is not None, "at least one label is asked for"
        return scaled

    return Passes(forward, lambda loss: loss.backward())


def _passes_of_score_head(last: Stage, request: ProfileRequest) -> Passes:
    """A few scores a row: what a vocabulary is to other heads costs nothing here."""
    first = torch.randn(request.micro_batch_rows, int(last.config.hidden_size), dtype=last.dtype, device=last.device)
    first.requires_grad_(True)
    return Passes(lambda: last.score(first).sum(), lambda loss: loss.backward())


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
    products = {name: partial(torch.mm, gradient, weight) for name, (gradient, weight) in pairs.items()}
    return PassTimer(device).fastest_in_turns(products, turns=_PROBE_TURNS)


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
    measure(request, device, least_s=0.0)


def few_blocks(config_json: str, *, vocabulary: int) -> dict[str, Any]:
    """The model's configuration with three blocks (a first, a middle and a last stage) and a short vocabulary.

    An encoder-decoder's has two blocks and three, such that :data:`_MIDDLE_OF_HALVES` are inside.
    """
    config: dict[str, Any] = json.loads(config_json)
    family = family_of(config.get("model_type"))
    if family.halves is not None:
        # The encoder's second block has no embedding with it, the decoder's second neither an entry nor the head.
        config |= dict.fromkeys(family.config_keys["blocks"], 2)
        config |= dict.fromkeys(family.config_keys["decoder_blocks"], 3)
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
