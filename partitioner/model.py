"""What the planner knows of a model: parameter counts, never parameters.

Entry point: :func:`describe_model`, which reads nothing but the values of config.json and the tensors' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from partitioner.model_sizes import Sizes, first_of
from partitioner.values import PlanValue
from plutino.errors import ModelError
from plutino.families import Family
from plutino.gptq_index import GptqFormat

TensorShape = tuple[int, ...]


class LinearShape(PlanValue):
    """One linear layer inside a block."""

    name: str
    """Dotted name inside the block: self_attn.q_proj, attn.c_attn, ..."""
    in_features: int
    out_features: int


class ModelTable(PlanValue):
    """Sizes of a transformer."""

    family: str
    """transformers' model_type."""
    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    block_params: tuple[int, ...]
    """Number of parameters of each block."""
    block_linears: tuple[tuple[LinearShape, ...], ...]
    """Linear layers of each block, in name order."""
    embedding_params: int
    """Parameters of token and learned position embeddings: all that only the first stage holds, if not tied."""
    final_params: int
    """Parameters of the final norm."""
    head_params: int
    """Parameters of the output head, also where it is tied to the embedding (the last stage holds a copy then); 0
    where the model has none."""
    is_tied: bool
    largest_tensor_params: int
    """The biggest single tensor: it sets the loading peak."""
    activation: str
    """Activation function of the MLPs, by transformers' name."""
    gptq: GptqFormat | None = None
    """How the checkpoint's linears are packed; None: they are not."""
    adds_alibi: bool = False
    """Attention adds biases of its own for every head."""
    merged_params: int = 0
    """The biggest tensor that is merged from stored pieces: it is held twice while the stage is built."""
    num_encoder_blocks: int = 0
    """Blocks of an encoder-decoder's encoder, the first ones; the others are its decoder's."""
    repeated_params: int = 0
    """Parameters of a table in the first block of either half that every stage's first block has."""
    expert_blocks: tuple[int, ...] = ()
    """Blocks whose MLP is a mixture of experts."""
    num_experts: int = 0
    """Experts of such a block."""
    experts_per_token: int = 0
    expert_inner: int = 0
    """Intermediate size of one expert."""

    @property
    def token_params(self) -> int:
        """Parameters of the token embedding alone."""
        return self.head_params or self.vocab_size * self.hidden_size


def describe_model(config: Mapping[str, Any], tensors: Mapping[str, TensorShape], family: Family) -> ModelTable:
    """Sizes of a model from its config.json and the shapes of its checkpoint's tensors.

    Checkpoints published without ``family.optional_prefix``, under older names or with experts stored one by one are
    understood. Every linear layer's shape is checked against the config, so that a config of another model is found
    here and not by a device.

    Args:
        config: values of config.json.
        tensors: shape of every tensor of the checkpoint, by its name there.
        family: names and rules of the family.

    Raises:
        ModelError: a size is missing from the config, a block or tensor from the checkpoint, or they contradict.
    """
    sizes = Sizes(config, family)
    shapes = _canonical(tensors, family)
    sizes.is_tied = sizes.is_tied and not family.has_own_head(config, shapes)
    blocks = _blocks(shapes, family, sizes.get("encoder_blocks", 0))
    num_blocks = sizes["blocks"]
    if len(blocks) != num_blocks or sorted(blocks) != list(range(num_blocks)):
        gaps = sorted(set(range(num_blocks)) - blocks.keys())
        lacking = f"; block {gaps[0]} is missing" if gaps else ""
        raise ModelError(
            f"the config says {num_blocks} blocks, the checkpoint holds {len(blocks)}{lacking}; "
            "config.json and the safetensors files must belong together"
        )
    num_encoder_blocks = sizes.get("encoder_blocks", 0)
    block_linears = tuple(
        _linears(index, blocks[index], sizes, family, is_decoder=index >= num_encoder_blocks > 0)
        for index in range(num_blocks)
    )
    token_embedding = family.embedding[0]
    if sizes.is_tied and token_embedding not in shapes and family.head in shapes:
        token_embedding = family.head
    embedding = [_required(shapes, token_embedding), *(_required(shapes, name) for name in family.embedding[1:])]
    embedding += [shapes[name] for name in family.optional_embedding if name in shapes]
    width = sizes.get("embedding", sizes["hidden"])
    _check_shape(token_embedding, embedding[0], (sizes["vocab"], width))
    final = [shape for name, shape in shapes.items() if name.startswith(family.final)]
    if family.final and not final:
        what = "final norm" if family.head else "pooler"
        raise ModelError(f"the checkpoint lacks the {what} ({', '.join(family.final)}*); use another checkpoint")
    head_params = _head_params(shapes, embedding[0], sizes, family)
    merged_params = _merged_params(blocks, family)
    return ModelTable(
        family=family.model_type,
        num_blocks=num_blocks,
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inner"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes.get("cached_heads", sizes["kv_heads"]),
        head_dim=sizes["head_dim"],
        vocab_size=sizes["vocab"],
        max_positions=sizes["positions"],
        block_params=_block_params(shapes, blocks, num_encoder_blocks, family),
        num_encoder_blocks=num_encoder_blocks,
        repeated_params=sum(
            math.prod(shape) for name, shape in blocks[0].items() if family.halves and name == family.halves.table
        ),
        block_linears=block_linears,
        embedding_params=sum(map(math.prod, embedding)),
        final_params=sum(map(math.prod, final)),
        head_params=head_params,
        is_tied=sizes.is_tied,
        largest_tensor_params=max(*map(math.prod, shapes.values()), *merged_params),
        merged_params=max(merged_params, default=0),
        activation=str(first_of(config, family.activation_keys, family.activation_default)),
        adds_alibi=family.adds_alibi is not None and family.adds_alibi(config),
        expert_blocks=tuple(index for index in range(num_blocks) if _has_experts(blocks[index], family)),
        num_experts=sizes.get("experts", 0),
        experts_per_token=sizes.get("experts_per_token", 0),
        expert_inner=sizes.get("expert_inner", 0),
    )


def _head_params(shapes: Mapping[str, TensorShape], embedding: TensorShape, sizes: Sizes, family: Family) -> int:
    if not family.head:
        return 0
    head = embedding if sizes.is_tied else _required(shapes, family.head)
    _check_shape(family.head, head, (sizes["vocab"], sizes.get("embedding", sizes["hidden"])))
    return math.prod(head)


def _canonical(tensors: Mapping[str, TensorShape], family: Family) -> dict[str, TensorShape]:
    """Tensors under the names of the transformers class, recomputed buffers left out."""
    prefix = family.optional_prefix
    is_bare = not any(name.startswith(family.block_prefix) for name in tensors)
    shapes = {}
    for stored_name, shape in tensors.items():
        name = stored_name
        for old, new in (family.renamed or {}).items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if name.endswith(family.ignored):
            continue
        shapes[prefix + name if is_bare and name != family.head else name] = tuple(shape)
    return shapes


def _has_experts(block: Mapping[str, TensorShape], family: Family) -> bool:
    prefixes = tuple(target.rpartition(".")[0] for target in family.merged or ())
    return any(name.startswith(prefixes) for name in block)


def _merged_params(blocks: Mapping[int, Mapping[str, TensorShape]], family: Family) -> list[int]:
    """Sizes of the tensors that transformers merges from those of single experts."""
    merged = (family.merged or {}).items()
    return [
        sum(
            math.prod(shape)
            for name, shape in block.items()
            if name.startswith(target.rpartition(".")[0]) and name.endswith(endings)
        )
        for block in blocks.values()
        for target, endings in merged
    ]


def _blocks(
    shapes: Mapping[str, TensorShape], family: Family, num_encoder_blocks: int
) -> dict[int, dict[str, TensorShape]]:
    """Block index -> its tensors, by their names inside the block; a decoder's come after its encoder's."""
    prefixes = {family.block_prefix: 0}
    if family.halves is not None:
        prefixes[family.halves.decoder_prefix] = num_encoder_blocks
    blocks: dict[int, dict[str, TensorShape]] = {}
    for name, shape in shapes.items():
        for prefix, first in prefixes.items():
            index, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and dot and index.isdecimal():
                blocks.setdefault(first + int(index), {})[rest] = shape
    return blocks


def _block_params(
    shapes: Mapping[str, TensorShape],
    blocks: Mapping[int, Mapping[str, TensorShape]],
    num_encoder_blocks: int,
    family: Family,
) -> tuple[int, ...]:
    """Parameters of each block, with what of an encoder-decoder stands between its halves: it goes with a block."""
    params = [sum(map(math.prod, blocks[index].values())) for index in range(len(blocks))]
    if family.halves is not None:
        ends = {num_encoder_blocks - 1: family.halves.encoder_final, num_encoder_blocks: family.halves.decoder_entry}
        for block, names in ends.items():
            params[block] += sum(math.prod(shape) for name, shape in shapes.items() if names and name.startswith(names))
    return tuple(params)


def _linears(
    index: int, block: Mapping[str, TensorShape], sizes: Sizes, family: Family, *, is_decoder: bool
) -> tuple[LinearShape, ...]:
    linears = []
    rules = family.halves.decoder_linears if is_decoder and family.halves is not None else family.linears
    for name, rule in rules.items():
        if name in family.optional_linears and f"{name}.weight" not in block:
            continue
        in_features, out_features = sizes.total(rule.in_features), sizes.total(rule.out_features)
        expected = (in_features, out_features) if family.has_conv1d else (out_features, in_features)
        found = _required(block, f"{name}.weight", f"block {index}: ")
        _check_shape(f"block {index}: {name}.weight", found, expected)
        linears.append(LinearShape(name=name, in_features=in_features, out_features=out_features))
    return tuple(sorted(linears, key=lambda linear: linear.name))


def _required(shapes: Mapping[str, TensorShape], name: str, where: str = "") -> TensorShape:
    if name not in shapes:
        raise ModelError(f"{where}the checkpoint lacks {name}; finish the download or use another checkpoint")
    return shapes[name]


def _check_shape(name: str, found: TensorShape, expected: TensorShape) -> None:
    if found != expected:
        raise ModelError(
            f"{name} has shape {list(found)}, the config implies {list(expected)}; "
            "config.json and the safetensors files must belong together"
        )
