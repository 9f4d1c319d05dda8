"""Model families by the names of their tensors: all that is known of a model without torch.

To add a family: one entry here, one in ``edge_node.stage.architecture`` (what its forward does to embeddings, how its
head is applied), one line in ``docs/ref-families.md``. The tests over this table pick it up.
"""

from __future__ import annotations

from dataclasses import dataclass

from plutino.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Names of a family's tensors, as its checkpoint and its transformers class have them."""

    model_type: str
    block_prefix: str
    """A block's tensors start with this and the block's index."""
    optional_prefix: str
    """Published checkpoints may lack this prefix (a base model's own save)."""
    embedding: tuple[str, ...]
    """Tensors of the first stage; the first one is the token embedding that a tied head shares."""
    final: tuple[str, ...]
    """Prefixes of the tensors between the last block and the head."""
    head: str
    """The output head's weight; absent from the checkpoint where it is tied."""
    ignored: tuple[str, ...] = ()
    """Endings of tensors that old checkpoints carry and the model recomputes."""


FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        block_prefix="model.layers.",
        optional_prefix="model.",
        embedding=("model.embed_tokens.weight",),
        final=("model.norm.",),
        head="lm_head.weight",
        ignored=("rotary_emb.inv_freq",),
    ),
    "gpt2": Family(
        model_type="gpt2",
        block_prefix="transformer.h.",
        optional_prefix="transformer.",
        embedding=("transformer.wte.weight", "transformer.wpe.weight"),
        final=("transformer.ln_f.",),
        head="lm_head.weight",
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
}


def family_of(model_type: str | None) -> Family:
    """Look a family up.

    Raises:
        ModelError: plutino does not know the family.
    """
    try:
        return FAMILIES[str(model_type)]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"model family {model_type!r} is not supported; plutino knows {known}. "
            "docs/ref-families.md tells how a family is added"
        ) from None
