"""The sum of a group's gradients on its way from holder to holder: one flat tensor, which is what travels.

A sum in fp32 travels as it is. One that is rounded (:mod:`edge_node.engine.sum_rounding`) is held as it travels, in
float16: the numbers of all parameters one behind the other, then the exponent of each one's scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edge_node.engine.sum_rounding import narrow, widen
from plutino.types import SumDtype


def travelling_bytes(num_numbers: int, sums: SumDtype) -> int:
    """Bytes of one parameter's sum on the wire."""
    return 4 * num_numbers if sums == "fp32" else 2 * (num_numbers + 1)


class RunningSum:
    """Gradients of some parameters, added up so far; on the CPU.

    Args:
        shapes: of the parameters, by name, in the order in which they lie.
        sums: how they are held and travel.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], sums: SumDtype) -> None:
        self._shapes = dict(shapes)
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self._is_rounded = sums == "fp16"
        self._held: Tensor | None = None
        """As it travels; None: nothing was added yet."""
        self._present: set[str] = set()
        """Parameters that something was added to."""

    def receive(self, message: Mapping[str, Tensor]) -> None:
        """Hold what another holder's :meth:`message` said; its tensors are this one's to change from now on."""
        self._held = message.get("sums")
        names = list(self._shapes)
        if "present" in message:
            names = [name for name, is_present in zip(names, message["present"].tolist(), strict=True) if is_present]
        self._present = set(names)

    def message(self) -> dict[str, Tensor]:
        """What travels; nothing may be added here afterwards.

        It is one tensor where all parameters had a gradient, as almost always: a frame of one piece is copied once.
        """
        message = {} if self._held is None else {"sums": self._held}
        if len(self._present) < len(self._shapes):
            present = [name in self._present for name in self._shapes]
            message["present"] = torch.tensor(present, dtype=torch.uint8)
        return message

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add a gradient, or another sum, of some of the parameters, and round where sums are rounded."""
        if not gradients:
            return
        wide = self._wide()
        views = self._views(wide)
        held = [name for name in gradients if name in self._present]
        new = [name for name in gradients if name not in self._present]
        if held:
            torch._foreach_add_([views[name] for name in held], [gradients[name] for name in held])
        if new:
            torch._foreach_copy_([views[name] for name in new], [gradients[name] for name in new])
            self._present.update(new)
        # Those that got nothing are rounded a second time, which changes none of their bits.
        self._held = self._narrowed(wide) if self._is_rounded else wide

    def values(self) -> dict[str, Tensor]:
        """The sums of the parameters that something was added to; not to be changed."""
        views = self._views(self._wide())
        return {name: views[name] for name in self._shapes if name in self._present}

    def gradients(self) -> dict[str, Tensor]:
        """All sums, the caller's to change; zeros where no micro-batch had a label token."""
        wide = self._wide()
        return self._views(wide.clone() if wide is self._held else wide)

    def _wide(self) -> Tensor:
        """All numbers in fp32, flat; what is held itself, unless it is rounded."""
        if self._held is None:
            return torch.zeros(sum(self._sizes))
        if not self._is_rounded:
            return self._held
        *numbers, exponents = self._held.split([*self._sizes, len(self._sizes)])
        wide = torch.empty(sum(self._sizes))
        widen(numbers, [int(exponent) for exponent in exponents.tolist()], wide.split(self._sizes))
        return wide

    def _narrowed(self, wide: Tensor) -> Tensor:
        """What travels of fp32 numbers, which are used up; in the place of what was held."""
        travelling = self._held
        if travelling is None:
            travelling = torch.empty(wide.numel() + len(self._sizes), dtype=torch.float16)
        *numbers, exponents = travelling.split([*self._sizes, len(self._sizes)])
        exponents.copy_(torch.tensor(narrow(wide.split(self._sizes), numbers)))
        return travelling

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(self._sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
