"""The states that are kept, by their place in the model.

``h5`` is what block 4 gave and block 5 gets, ``final`` is behind the final norm. A job with other cuts finds what its
blocks need. In an encoder-decoder, whose blocks are counted through, the target's states are called ``t8``: what the
decoder's first block gets is not what the encoder's last one gave. ``source`` is the encoder's output, behind its final
norm, which every block of the decoder looks at.
"""

from __future__ import annotations

from torch import Tensor

from plutino.side_layout import SideLayout
from plutino.side_network import BackboneStates, SideNetwork

FINAL = "final"
SOURCE = "source"


def is_of_target(name: str, num_encoder_blocks: int) -> bool:
    """Whether a state has the tokens of an encoder-decoder's target, in place of its source's."""
    return num_encoder_blocks > 0 and name != SOURCE and not name.startswith("h")


def state_names_below(place: int, num_encoder_blocks: int) -> tuple[str, ...]:
    """The states from which a pass begins at a block: what it gets and, where it is a decoder's, the encoder's output.

    Args:
        place: the block.
        num_encoder_blocks: of an encoder-decoder; 0 for other models.
    """
    return (SOURCE, f"t{place}") if place >= num_encoder_blocks > 0 else (f"h{place}",)


def state_names_between(layout: SideLayout, start_block: int, end_block: int) -> tuple[str, ...]:
    """The states that the side network beside blocks ``[start_block, end_block)`` reads, lowest first."""
    if end_block <= layout.blocks[0]:
        return ()
    own_blocks = layout.own_blocks(start_block, end_block)
    places: set[tuple[bool, int]] = set()
    for block in own_blocks:
        is_decoders = block >= layout.num_encoder_blocks > 0
        places.add((is_decoders, block + 1))
        if block in (layout.blocks[0], layout.top_blocks[0]) and (is_decoders or block == layout.blocks[0]):
            places.add((is_decoders, block))
    names = [f"{'t' if is_decoders else 'h'}{place}" for is_decoders, place in sorted(places)]
    return (*names, *((FINAL,) if end_block == layout.num_blocks else ()))


def put_state(states: BackboneStates, side: SideNetwork | None, name: str, value: Tensor) -> None:
    """Let a side network read a state, or the lowest trained block."""
    if name == FINAL:
        states.final = value
        return
    if name == SOURCE:
        states.source = value
        return
    if side is None:
        if name.startswith("t"):
            states.target_entry = value
        else:
            states.entry = value
        return
    place, is_target = int(name[1:]), is_of_target(name, side.layout.num_encoder_blocks)
    if is_target and side.has_target_entry and place == side.layout.top_blocks[0]:
        states.target_entry = value
    if not is_target and side.has_entry and place == side.layout.blocks[0]:
        states.entry = value
    block = place - 1
    if block in side.own_blocks and is_target == (block >= side.layout.num_encoder_blocks > 0):
        states.outputs[block] = value


def get_state(states: BackboneStates, side: SideNetwork | None, name: str) -> Tensor:
    """A state that a pass gave."""
    if name == FINAL:
        value = states.final
    elif name == SOURCE:
        value = states.source
    else:
        block, is_target = int(name[1:]) - 1, name.startswith("t")
        entry = states.target_entry if is_target else states.entry
        is_other_half = side is not None and is_target != (block >= side.layout.num_encoder_blocks > 0)
        value = entry if is_other_half else states.outputs.get(block, entry)
    assert value is not None, f"the pass gave no {name}"
    return value
