"""Structural pruning: which rows and columns of a block a narrow copy of it keeps, by how much its weights count.

As Ladder Side-Tuning starts its side network (Sung et al. 2022, arXiv:2206.06522 sec. 3.3), with magnitudes as
importance here, and with gradients in :mod:`edge_node.methods.gradient_pruning`: numbers of the hidden states, of every
head and of the MLP's inner tensor are kept whole or not at all, so that what one layer gives is what the next one
reads. All heads keep the same places: queries meet keys. Or heads are kept whole, key heads with all their queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_node.quantize.linear import QuantLinear
from plutino.families import ATTENTION_OUTPUT, MLP_INNER, Family


@dataclass(frozen=True, slots=True)
class Axes:
    """Sizes of the kinds of axes that a block's weights have; an axis may hold several runs of one kind."""

    hidden: int
    head: int
    """One head."""
    inner: int
    num_whole_heads: int = 0
    """Key heads, of which some are kept whole; 0: all heads are kept, with some of their places."""

    def num_places(self, kind: str) -> int:
        """What there is to choose from."""
        if kind == "head" and self.num_whole_heads:
            return self.num_whole_heads
        return {"hidden": self.hidden, "head": self.head, "inner": self.inner}[kind]

    def per_place(self, kind: str, of_axis: Tensor) -> Tensor:
        """Sums over the numbers of an axis that one place stands for."""
        num = self.num_places(kind)
        if kind == "head" and self.num_whole_heads:
            return of_axis.view(num, -1).sum(dim=1)
        return of_axis.view(-1, num).sum(dim=0)

    def indices(self, kind: str, places: Tensor, size: int) -> Tensor:
        """The numbers that places stand for on an axis of this size."""
        num = self.num_places(kind)
        if kind == "head" and self.num_whole_heads:
            per_head = size // num
            return (per_head * places[:, None] + torch.arange(per_head)).flatten()
        return torch.cat([places + start for start in range(0, size, num)])


STRIP_PLACES = 128
"""Rows or columns that are summed at once; the sums' bits on a CPU are those of all at once."""

Scores = dict[str, Tensor]
"""Kind of axis -> how much each place in a run counts, fp64 on the CPU, summed over all linear layers of a block."""


def no_scores(axes: Axes) -> Scores:
    """Every place counts nothing yet."""
    return {kind: torch.zeros(axes.num_places(kind), dtype=torch.float64) for kind in ("hidden", "head", "inner")}


def add_sums(scores: Scores, matrix: Tensor, family: Family, name: str, axes: Axes) -> None:
    """Add what a linear layer's weights count, [out_features, in_features], to the places of both axes."""
    for dim, kind in enumerate(_kinds(family, name)):
        # torch copies all that it sums in another dtype: of the whole matrix that would be twice its bytes.
        strips = matrix.split(STRIP_PLACES, dim=dim)
        sums = torch.cat([strip.sum(dim=1 - dim, dtype=torch.float64) for strip in strips]).cpu()
        scores[kind] += axes.per_place(kind, sums)


def magnitudes(block: nn.Module, family: Family, axes: Axes) -> Scores:
    """A weight counts as much as it is large."""
    scores = no_scores(axes)
    for name, linear in block_linears(block, family).items():
        add_sums(scores, _weight(linear).abs(), family, name, axes)
    return scores


def choose_places(scores: Scores, axes: Axes, reduction: int) -> dict[str, Tensor]:
    """Kind of axis -> the places in a run that count most.

    Heads keep places in pairs (j, j + head / 2), as rotation takes them, wherever the number allows.
    """
    num_head = axes.num_places("head") // reduction
    if axes.num_whole_heads:
        head = _largest(scores["head"], num_head)
    elif num_head % 2 == 0 and axes.head % 2 == 0:
        pairs = _largest(scores["head"].view(2, -1).sum(dim=0), num_head // 2)
        head = torch.cat([pairs, pairs + axes.head // 2])
    else:
        head = _largest(scores["head"], num_head)
    return {
        "hidden": _largest(scores["hidden"], axes.hidden // reduction),
        "head": head,
        "inner": _largest(scores["inner"], axes.inner // reduction),
    }


def pruned_parameters(block: nn.Module, family: Family, axes: Axes, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a narrow copy of a block, by the names of its parameters, in fp32 on the CPU."""
    kept: dict[str, Tensor] = {}

    def indices(kind: str, size: int) -> Tensor:
        return axes.indices(kind, places[kind], size)

    linears = block_linears(block, family)
    for name, module in block.named_modules():
        if isinstance(module, nn.Embedding):
            # Position biases, one for each of the heads, of which all stay.
            kept[f"{name}.weight"] = module.weight.detach().float().cpu()
        elif name not in linears:
            for key, parameter in module.named_parameters(recurse=False):
                value = parameter.detach().float().cpu()
                kind = "head" if name.endswith(("q_norm", "k_norm")) else "hidden"
                # A norm of single heads is the same for all.
                is_shared = kind == "head" and axes.num_whole_heads > 0 and len(value) == axes.head
                kept[f"{name}.{key}"] = value if is_shared else value[indices(kind, len(value))]
        else:
            weight = _weight(module).cpu()
            rows, columns = (indices(kind, size) for kind, size in zip(_kinds(family, name), weight.shape, strict=True))
            narrow = weight[rows][:, columns]
            kept[f"{name}.weight"] = narrow.T if family.has_conv1d else narrow
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                kept[f"{name}.bias"] = bias.detach().float().cpu()[rows]
    return {name: value.contiguous() for name, value in kept.items()}


def block_linears(block: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The linear layers that a block has of those that its family's blocks may have."""
    modules = dict(block.named_modules())
    return {name: modules[name] for name in family.all_linears if name in modules}


def _kinds(family: Family, linear: str) -> tuple[str, str]:
    """What the outputs and the inputs of a linear layer are places of."""
    kinds: Mapping[str, tuple[str, str]] = {
        ATTENTION_OUTPUT: ("hidden", "head"),
        "mlp input": ("inner", "hidden"),
        MLP_INNER: ("hidden", "inner"),
    }
    # What is left makes queries, keys and values, of a row's own tokens or of an encoder's output.
    return kinds.get(family.all_linears[linear].reads, ("head", "hidden"))


def _largest(scores: Tensor, num: int) -> Tensor:
    """Places of the largest scores, ascending; of equal ones the lower place."""
    # In fp32: what differs in the last bits of fp64, with the number of threads, is equal.
    return torch.argsort(scores.float(), descending=True, stable=True)[:num].sort().values


def _weight(linear: nn.Module) -> Tensor:
    """fp32 [out_features, in_features]."""
    if isinstance(linear, QuantLinear):
        return linear.dequantize()
    weight = linear.get_parameter("weight").detach().float()
    return weight if isinstance(linear, nn.Linear) else weight.T
