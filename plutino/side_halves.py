"""A side network beside an encoder-decoder: a ladder beside either half, the upper one looking at the lower one.

The source's side state [B, S, R] climbs beside the encoder. Behind its last block (and the model's own norm there) it
is what the decoder's side blocks look at, in place of the encoder's output, and goes along with the target's side state
[B, T, R] as the encoder's output goes along with the target's hidden states. Gradients of both come back, and nothing
else. Needs torch and transformers.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from plutino.side_network import BackboneStates, SideNetwork, product

# Shape suffixes: B rows, S source tokens, T target tokens of this pass, R side width.


def run_ladders(
    side: SideNetwork,
    states: BackboneStates,
    source_BSR: Tensor | None,
    target_BTR: Tensor | None,
    *,
    source_mask_BS: Tensor | None,
    cache: Cache | None,
    parts: Literal["source", "target", "both"] = "both",
) -> tuple[Tensor | None, Tensor | None]:
    """The side states of source and target behind the last of the blocks here; None before the first one.

    Args:
        side: the side network beside them.
        states: what the backbone's blocks gave.
        source_BSR: the source's side state from below; None where it starts here.
        target_BTR: the target's; None where it starts here or above.
        source_mask_BS: 1 for tokens of the source, 0 for padding; None: no padding.
        cache: the decoder's KV cache after this pass; the side blocks' layers stand behind its own.
        parts: whose side blocks run: the encoder's, the decoder's, or both. Without the encoder's the source has been
            through them.
    """
    encoder, decoder = side.stacks
    of_encoder = [block for block in side.own_blocks if block < side.layout.num_encoder_blocks]
    if parts != "target":
        if side.entry is not None:
            assert states.entry is not None, "the first chosen block is here"
            source_BSR = product(states.entry, side.entry)
        if of_encoder:
            with side.reading(states):
                source_BSR = encoder(inputs_embeds=source_BSR, attention_mask=source_mask_BS).last_hidden_state
        if side.encoder_norm is not None:
            source_BSR = cast(Tensor, side.encoder_norm(source_BSR))
    if parts == "source":
        return source_BSR, target_BTR
    if side.target_entry is not None:
        assert states.target_entry is not None, "the decoder's first chosen block is here"
        target_BTR = product(states.target_entry, side.target_entry)
    num_of_decoder = len(side.own_blocks) - len(of_encoder)
    if num_of_decoder:
        assert source_BSR is not None and target_BTR is not None, "both come from below"
        with side.reading(states):
            output = decoder(
                inputs_embeds=target_BTR,
                encoder_hidden_states=source_BSR,
                encoder_attention_mask=source_mask_BS,
                past_key_values=None if cache is None else _layers_behind(cache, side, num_of_decoder),
                use_cache=cache is not None,
            )
        target_BTR = cast(Tensor, output.last_hidden_state)
    return source_BSR, target_BTR


def _layers_behind(cache: Any, side: SideNetwork, num_layers: int) -> EncoderDecoderCache:
    """The side blocks' part of a KV cache, as a cache: what reorders or crops the whole moves them too."""
    parts = []
    for half in (cache.self_attention_cache, cache.cross_attention_cache):
        num_missing = side.num_cached_blocks + num_layers - len(half.layers)
        half.layers.extend(DynamicLayer() for _ in range(num_missing))
        part = DynamicCache()
        part.layers = half.layers[side.num_cached_blocks :]
        # Layers are there already; a cache that makes its own would make them anew.
        part.layer_class_to_replicate = None
        parts.append(part)
    return EncoderDecoderCache(*parts)
