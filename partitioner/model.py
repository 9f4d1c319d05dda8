"""What the planner knows of a model and of a job's shape: parameter counts, never parameters.

Entry point: :func:`describe_model`, which reads nothing but the values of config.json and the tensors' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from partitioner.values import PlanValue
from plutino.errors import ModelError
from plutino.families import Family
from plutino.gptq_index import GptqFormat
from plutino.job.model import PLAIN, Packing

TensorShape = tuple[int, ...]


class LinearShape(PlanValue):
    """One linear layer inside a block."""

    name: str
    """Dotted name inside the block: self_attn.q_proj, attn.c_attn, ..."""
    in_features: int
    out_features: int


class ModelTable(PlanValue):
    """Sizes of a decoder-only transformer."""

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
    """Parameters of the output head, also where it is tied to the embedding (the last stage holds a copy then)."""
    is_tied: bool
    largest_tensor_params: int
    """The biggest single tensor: it sets the loading peak."""
    gptq: GptqFormat | None = None
    """How the checkpoint's linears are packed; None: they are not."""


class JobShape(PlanValue):
    """What a job asks of a pipeline at its worst step."""

    dtype: Literal["fp32", "bf16"]
    packing: Packing = PLAIN
    """How the frozen weights are held."""
    batch_rows: int
    micro_batch_rows: int
    row_tokens: int
    """Padded length of the longest row."""
    label_tokens: int
    """Largest number of label tokens in one micro-batch: the head computes logits for these only."""
    adapter_params: tuple[int, ...]
    """Trainable parameters in each block."""
    first_trainable_params: int = 0
    """Trainable parameters of the first stage outside the blocks (embedding)."""
    last_trainable_params: int = 0
    """Trainable parameters of the last stage outside the blocks (head)."""
    adapter_rank_out: tuple[int, ...] = ()
    """Per block: sum over its adapted linears of (rank), for the LoRA activations kept for the backward pass."""
    adapted_linears: tuple[tuple[str, ...], ...] = ()
    """Per block: names of its adapted linears, whose inputs are kept for the backward pass; empty means all linears
    of every block that has adapter parameters."""
    use_dora: bool = False
    has_dropout: bool = False
    checkpointing: Literal["auto", "on", "off"] = "auto"
    codec: Literal["raw", "bf16"] = "raw"
    generate_rows: int = 0
    """Rows generated together (all groups in flight); 0 means the job never generates."""
    generate_tokens: int = 0
    """Prompt and new tokens of the longest generated row."""
    exact_stages: int | None = None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element in the compute dtype."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step; the last one may have fewer rows."""
        return -(-self.batch_rows // self.micro_batch_rows)

    @property
    def first_trainable_block(self) -> int:
        """Lowest block that takes part in the backward pass; the number of blocks if none does.

        Blocks below it run without autograd: they keep nothing and cost no backward seconds.
        """
        if self.first_trainable_params:
            return 0
        return next((b for b, params in enumerate(self.adapter_params) if params), len(self.adapter_params))


def describe_model(config: Mapping[str, Any], tensors: Mapping[str, TensorShape], family: Family) -> ModelTable:
    """Sizes of a model from its config.json and the shapes of its checkpoint's tensors.

    Checkpoints published without ``family.optional_prefix`` are understood. Every linear layer's shape is checked
    against the config, so that a config of another model is found here and not by a device.

    Args:
        config: values of config.json.
        tensors: shape of every tensor of the checkpoint, by its name there.
        family: names of the family's tensors.

    Raises:
        ModelError: a size is missing from the config, a block or tensor from the checkpoint, or they contradict.
    """
    sizes = _SIZES[family.model_type](config)
    shapes = _canonical(tensors, family)
    blocks = _blocks(shapes, family)
    if len(blocks) != sizes.num_blocks or sorted(blocks) != list(range(sizes.num_blocks)):
        gaps = sorted(set(range(sizes.num_blocks)) - blocks.keys())
        lacking = f"; block {gaps[0]} is missing" if gaps else ""
        raise ModelError(
            f"the config says {sizes.num_blocks} blocks, the checkpoint holds {len(blocks)}{lacking}; "
            "config.json and the safetensors files must belong together"
        )
    block_linears = tuple(_linears(index, blocks[index], sizes) for index in range(sizes.num_blocks))
    embedding = [_required(shapes, name) for name in family.embedding]
    _check_shape(family.embedding[0], embedding[0], (sizes.vocab_size, sizes.hidden_size))
    final = [shape for name, shape in shapes.items() if name.startswith(family.final)]
    if not final:
        raise ModelError(f"the checkpoint lacks the final norm ({', '.join(family.final)}*); download the model again")
    head = embedding[0] if sizes.is_tied else _required(shapes, family.head)
    _check_shape(family.head, head, (sizes.vocab_size, sizes.hidden_size))
    return ModelTable(
        family=family.model_type,
        num_blocks=sizes.num_blocks,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocab_size,
        max_positions=sizes.max_positions,
        block_params=tuple(sum(map(math.prod, blocks[index].values())) for index in range(sizes.num_blocks)),
        block_linears=block_linears,
        embedding_params=sum(map(math.prod, embedding)),
        final_params=sum(map(math.prod, final)),
        head_params=math.prod(head),
        is_tied=sizes.is_tied,
        largest_tensor_params=max(map(math.prod, shapes.values())),
    )


class _Sizes(PlanValue):
    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    is_tied: bool
    linears: dict[str, tuple[int, int]]
    """Dotted name in a block -> (in_features, out_features)."""
    is_conv1d: bool
    """Weights are stored [in, out], as transformers' Conv1D does."""


def _llama_sizes(config: Mapping[str, Any]) -> _Sizes:
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    num_heads = _size(config, "num_attention_heads")
    num_kv_heads = _size(config, "num_key_value_heads", num_heads)
    head_dim = _size(config, "head_dim", hidden // num_heads)
    query, key = num_heads * head_dim, num_kv_heads * head_dim
    return _Sizes(
        num_blocks=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size"),
        max_positions=_size(config, "max_position_embeddings"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        linears={
            "self_attn.q_proj": (hidden, query),
            "self_attn.k_proj": (hidden, key),
            "self_attn.v_proj": (hidden, key),
            "self_attn.o_proj": (query, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        },
        is_conv1d=False,
    )


def _gpt2_sizes(config: Mapping[str, Any]) -> _Sizes:
    hidden, num_heads = _size(config, "n_embd"), _size(config, "n_head")
    inner = _size(config, "n_inner", 4 * hidden)
    return _Sizes(
        num_blocks=_size(config, "n_layer"),
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        vocab_size=_size(config, "vocab_size"),
        max_positions=_size(config, "n_positions"),
        is_tied=bool(config.get("tie_word_embeddings", True)),
        linears={
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, inner),
            "mlp.c_proj": (inner, hidden),
        },
        is_conv1d=True,
    )


_SIZES = {"llama": _llama_sizes, "gpt2": _gpt2_sizes}


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json gives {key} = {value!r}, a whole number from 1 is needed; mend config.json")
    return value


def _canonical(tensors: Mapping[str, TensorShape], family: Family) -> dict[str, TensorShape]:
    """Tensors under the names of the transformers class, recomputed buffers left out."""
    prefix = family.optional_prefix
    is_bare = family.embedding[0] not in tensors and family.embedding[0].removeprefix(prefix) in tensors
    return {
        prefix + name if is_bare and name != family.head else name: tuple(shape)
        for name, shape in tensors.items()
        if not name.endswith(family.ignored)
    }


def _blocks(shapes: Mapping[str, TensorShape], family: Family) -> dict[int, dict[str, TensorShape]]:
    """Block index -> its tensors, by their names inside the block."""
    blocks: dict[int, dict[str, TensorShape]] = {}
    for name, shape in shapes.items():
        index, dot, rest = name.removeprefix(family.block_prefix).partition(".")
        if name.startswith(family.block_prefix) and dot and index.isdecimal():
            blocks.setdefault(int(index), {})[rest] = shape
    return blocks


def _linears(index: int, block: Mapping[str, TensorShape], sizes: _Sizes) -> tuple[LinearShape, ...]:
    for name, (in_features, out_features) in sizes.linears.items():
        expected = (in_features, out_features) if sizes.is_conv1d else (out_features, in_features)
        found = _required(block, f"{name}.weight", f"block {index}: ")
        _check_shape(f"block {index}: {name}.weight", found, expected)
    return tuple(
        LinearShape(name=name, in_features=in_features, out_features=out_features)
        for name, (in_features, out_features) in sorted(sizes.linears.items())
    )


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
