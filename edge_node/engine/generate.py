"""Generation through the pipeline: groups of rows follow each other through the stages, with a KV cache per stage.

Each group is prefilled once; then the last stage samples a token per row and sends it straight to the first stage,
which runs the next round. As many groups as there are stages are under way at once, so that every stage always has one
to work on; further groups wait until these have ended, which bounds the caches and the messages that wait at a stage.
Prompts are padded on the left, finished rows are fed the pad token until their whole group has finished, as
transformers' generate does. An encoder-decoder's sources are padded on the right and pass the encoder once; stages of
its decoder keep what came of them, and its keys and values.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache

from edge_node.engine.executor import StageExecutor
from edge_node.engine.stage_input import pad_token_id, padded_ids, padding_mask
from edge_node.engine.unit import UnitInput
from edge_node.stage.architecture import make_position_ids
from edge_node.stage.halves import start_token_id
from edge_node.stage.passes import StageInput
from edge_node.transport.base import MessageKey, MessageKind, Peer
from plutino.data.batches import MicroBatchRows

# Shape suffixes: B rows of a group, T tokens, S tokens so far (padding included), D hidden size, V vocabulary.


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How tokens are chosen and when a row ends."""

    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that have this share together; 1 leaves nothing out."""
    keep_stop: bool = False
    """Give the stop token that ended a row, too."""
    use_adapter: bool = True
    step: int = 0
    """Optimiser steps applied so far, part of the sampling seed."""
    sample_indices: tuple[tuple[int, ...], ...] = ()
    """Per group: each row's position in the data set, part of the sampling seed."""


@dataclass(slots=True)
class _Group:
    """One group of rows on one stage."""

    attention_mask_BS: Tensor
    """Of the tokens so far, or of an encoder-decoder's source."""
    cache: Cache | None
    source: Tensor | None = None
    """[B, tokens of the source, D], an encoder's output, on stages with blocks of its decoder."""
    source_side: Tensor | None = None
    """[B, tokens of the source, R], the side state behind the encoder, on the same stages."""
    is_done: bool = False
    finished_B: Tensor | None = None
    new_tokens: list[Tensor] = field(default_factory=list)


def generate(executor: StageExecutor, work: UnitInput, options: GenerateOptions, *, seed: int) -> list[list[list[int]]]:
    """Run this stage's part of a generation unit.

    Args:
        executor: the stage.
        work: the unit; its micro-batches are the groups, prompts without padding.
        options: sampling and stopping.
        seed: the job's seed.

    Returns:
        On the last stage, per group and row, the new tokens, without the stop token unless it is kept; elsewhere
        nothing.
    """
    if executor.me.replica_index > 0:
        return []  # the first replica of every stage generates
    executor.method.set_enabled(options.use_adapter)
    try:
        with torch.no_grad():
            return _Generation(executor, work, options, seed).run()
    finally:
        executor.method.set_enabled(True)


class _Generation:
    def __init__(self, executor: StageExecutor, work: UnitInput, options: GenerateOptions, seed: int) -> None:
        self._executor = executor
        self._stage = executor.stage
        self._work = work
        self._options = options
        self._seed = seed
        last = len(executor.stages) - 1
        self._next = None if self._stage.is_last else Peer(executor.me.stage_index + 1)
        self._previous = None if self._stage.is_first else Peer(executor.me.stage_index - 1)
        self._first_peer, self._last_peer = Peer(0), Peer(last)
        self._is_alone = last == 0
        self._groups: dict[int, _Group] = {}
        self._sampled: dict[int, Tensor] = {}

    def run(self) -> list[list[list[int]]]:
        num_groups, num_at_once = self._work.num_micro_batches, len(self._executor.stages)
        for first in range(0, num_groups, num_at_once):
            self._run_together(range(first, min(first + num_at_once, num_groups)))
        if not self._stage.is_last:
            return []
        return [self._rows(self._groups[g]) for g in range(num_groups)]

    def _run_together(self, together: range) -> None:
        for position in range(self._options.max_new_tokens):
            for g in together:
                if position == 0 or not self._groups[g].is_done:
                    self._round(g, position)
            if all(self._groups[g].is_done for g in together):
                break
        for g in together:
            self._groups[g].cache = self._groups[g].source = self._groups[g].source_side = None

    def _round(self, g: int, position: int) -> None:
        self._executor.check_cancelled(self._work.unit)
        inputs = self._input(g, position)
        if inputs is None:  # the group has ended: tell the next stage, unless that is the last, which ended it
            self._groups[g].is_done = True
            self._groups[g].cache = None
            if self._next is not None and self._next != self._last_peer:
                self._send_forward(g, position, {"done": torch.ones(1, dtype=torch.uint8)})
            return
        output = self._stage.run(inputs)
        if self._stage.has_decoder_blocks:
            self._groups[g].source, self._groups[g].source_side = output.source, output.source_side
        if self._next is not None:
            tensors = {**output.tensors, "position_ids": inputs.position_ids}
            if position > 0:
                for name in ("source", "source side"):
                    tensors.pop(name, None)  # later stages kept it
            if position == 0:
                tensors["mask"] = self._groups[g].attention_mask_BS.to(torch.uint8)
            self._send_forward(g, position, tensors)
            return
        self._sample(g, position, self._stage.head(output.hidden[:, -1]).float().cpu())

    def _input(self, g: int, position: int) -> StageInput | None:
        if self._stage.is_first:
            return self._first_input(g, position)
        assert self._previous is not None
        received = self._executor.transport.receive(self._previous, self._key(MessageKind.FORWARD, g, position))
        if "done" in received:
            return None
        if position == 0:
            self._groups[g] = _Group(received["mask"].long(), self._stage.new_cache())
        else:
            self._grow(g)
        return self._stage_input(
            g,
            received["position_ids"],
            hidden=received["hidden"],
            side=received.get("side"),
            source=received.get("source"),
            source_side=received.get("source side"),
        )

    def _first_input(self, g: int, position: int) -> StageInput | None:
        if position == 0:
            rows = self._work.rows[g]
            assert rows is not None, "the first stage reads prompts"
            if self._stage.family.halves is not None:
                return self._source_input(g, rows)
            lengths_B = torch.as_tensor(rows.lengths, dtype=torch.int32)
            mask_BS = padding_mask(lengths_B, rows.padded_tokens, side="left")
            shape = (len(rows.lengths), rows.padded_tokens)
            mask_BS = torch.ones(shape, dtype=torch.int64) if mask_BS is None else mask_BS
            # Before the padding, which positions pass over: the row's own tokens follow the prompt's.
            num_prompt_tokens = self._executor.method.num_prompt_tokens
            mask_BS = torch.cat([mask_BS.new_ones(shape[0], num_prompt_tokens), mask_BS], dim=1)
            shape = (shape[0], shape[1] + num_prompt_tokens)
            self._groups[g] = _Group(mask_BS, self._stage.new_cache())
            position_ids = make_position_ids(self._stage.family, attention_mask=mask_BS, segment_ids=None, shape=shape)
            ids_BT = padded_ids(rows, side="left", pad_id=pad_token_id(self._stage))
            return self._stage_input(g, position_ids, input_ids=ids_BT, num_prompt_tokens=num_prompt_tokens)
        if self._is_alone:
            ids_B = self._sampled.pop(g, None)
        else:
            received = self._executor.transport.receive(self._last_peer, self._key(MessageKind.TOKENS, g, position))
            ids_B = received.get("ids")
        if ids_B is None:
            return None
        self._grow(g)
        position_ids_B1 = self._groups[g].attention_mask_BS.sum(dim=1, keepdim=True) - 1
        if self._stage.family.halves is not None:
            return self._stage_input(g, position_ids_B1, target_ids=ids_B[:, None])
        return self._stage_input(g, position_ids_B1, input_ids=ids_B[:, None])

    def _source_input(self, g: int, rows: MicroBatchRows) -> StageInput:
        """A group's sources, and the token that every target follows."""
        lengths_B = torch.as_tensor(rows.lengths, dtype=torch.int32)
        shape = (len(rows.lengths), rows.padded_tokens)
        mask_BS = padding_mask(lengths_B, rows.padded_tokens, side="right")
        mask_BS = torch.ones(shape, dtype=torch.int64) if mask_BS is None else mask_BS
        self._groups[g] = _Group(mask_BS, self._stage.new_cache())
        return self._stage_input(
            g,
            torch.arange(rows.padded_tokens).expand(shape),
            input_ids=padded_ids(rows, side="right", pad_id=pad_token_id(self._stage)),
            target_ids=torch.full((shape[0], 1), start_token_id(self._stage.config)),
        )

    def _grow(self, g: int) -> None:
        if self._stage.family.halves is not None:
            return  # the mask is the source's
        mask_BS = self._groups[g].attention_mask_BS
        self._groups[g].attention_mask_BS = torch.cat([mask_BS, mask_BS.new_ones(mask_BS.shape[0], 1)], dim=1)

    def _stage_input(
        self,
        g: int,
        position_ids: Tensor,
        *,
        input_ids: Tensor | None = None,
        hidden: Tensor | None = None,
        side: Tensor | None = None,
        source: Tensor | None = None,
        source_side: Tensor | None = None,
        target_ids: Tensor | None = None,
        num_prompt_tokens: int = 0,
    ) -> StageInput:
        group = self._groups[g]
        return StageInput(
            target_ids=target_ids,
            source=group.source if source is None else source,
            source_side=group.source_side if source_side is None else source_side,
            has_new_source=source is not None or input_ids is not None,
            position_ids=position_ids,
            input_ids=input_ids,
            hidden=hidden,
            side=side,
            attention_mask=group.attention_mask_BS,
            num_prompt_tokens=num_prompt_tokens,
            cache=group.cache,
        )

    def _send_forward(self, g: int, position: int, tensors: dict[str, Tensor]) -> None:
        assert self._next is not None
        key = self._key(MessageKind.FORWARD, g, position)
        self._executor.transport.send(self._next, key, tensors, codec=self._executor.codec_below)

    def _sample(self, g: int, position: int, logits_BV: Tensor) -> None:
        group = self._groups[g]
        tokens_B = self._choose(g, position, logits_BV)
        if group.finished_B is None:
            group.finished_B = torch.zeros(len(tokens_B), dtype=torch.bool)
        tokens_B = torch.where(group.finished_B, torch.tensor(pad_token_id(self._stage)), tokens_B)
        group.new_tokens.append(tokens_B)
        stops = torch.tensor(self._options.stop_tokens, dtype=torch.int64)
        group.finished_B = group.finished_B | torch.isin(tokens_B, stops)
        group.is_done = bool(group.finished_B.all())
        if position + 1 == self._options.max_new_tokens:
            return
        if group.is_done:
            group.cache = None
        if self._is_alone:
            if not group.is_done:
                self._sampled[g] = tokens_B
            return
        tensors = {"done": torch.ones(1, dtype=torch.uint8)} if group.is_done else {"ids": tokens_B}
        self._executor.transport.send(self._first_peer, self._key(MessageKind.TOKENS, g, position + 1), tensors)

    def _choose(self, g: int, position: int, logits_BV: Tensor) -> Tensor:
        if self._options.temperature == 0:
            return logits_BV.argmax(dim=-1)
        shares_BV = torch.softmax(logits_BV.double() / self._options.temperature, dim=-1)
        tokens_BV = None
        if self._options.top_p < 1:
            shares_BV, tokens_BV = shares_BV.sort(dim=-1, descending=True, stable=True)
            # Kept is what the likelier ones leave short of top_p, thus at least the first.
            shares_BV[shares_BV.cumsum(dim=-1) - shares_BV >= self._options.top_p] = 0
        shares_BV = shares_BV.cumsum(dim=-1)
        samples = self._options.sample_indices[g]
        step = self._options.step
        draws = [[uniform(self._seed, step, sample, position)] for sample in samples]
        drawn_B1 = torch.tensor(draws, dtype=torch.float64) * shares_BV[:, -1:]
        # The first token whose cumulative share lies above the draw: one of share 0 is never chosen.
        chosen_B1 = torch.searchsorted(shares_BV, drawn_B1, right=True)
        return (chosen_B1 if tokens_BV is None else tokens_BV.gather(1, chosen_B1)).squeeze(1)

    def _rows(self, group: _Group) -> list[list[int]]:
        stops = set(self._options.stop_tokens)
        rows: list[list[int]] = []
        for tokens in torch.stack(group.new_tokens, dim=1).tolist():
            end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
            rows.append(tokens[: end + self._options.keep_stop])
        return rows

    def _key(self, kind: MessageKind, g: int, position: int) -> MessageKey:
        return MessageKey(kind, self._work.unit, g, position)


def uniform(*parts: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    # As many bits as a double holds: with more, the largest would round up to 1.
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53
