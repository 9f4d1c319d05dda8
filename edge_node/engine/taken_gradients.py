"""What the backward passes of a step have given so far, for whoever adds it up while they still run.

A parameter's gradient of a micro-batch is whole as soon as autograd has accumulated it, which for the upper blocks is
long before the pass ends: autograd says so by a hook on each use, and the gradient is taken there and then. What no
hook announced (a parameter that got none, or one whose gradient a method puts there itself) is known when its pass is
over. Taking is moving ``.grad`` away, so later or earlier makes no difference to its bits.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from edge_node.engine.sum_rounding import round_sums
from edge_node.methods.base import Role, TrainableParameter

Contributions = dict[tuple[Role, int], Tensor]
"""Gradients of one parameter by role and micro-batch; micro-batch -1 stands for the fold over all of them."""

FOLDED = -1

_Place = tuple[str, Role, int]
"""Parameter, use and micro-batch."""


class PassesAbandonedError(Exception):
    """The passes ended before they had given what somebody waits for; not a failure of its own."""


class TakenGradients:
    """Gradients of one step on one worker. Passes run on one thread, one other may wait for what they give.

    Args:
        parameters: all that the stage trains.
        announced: names of those that somebody waits for while passes run; the others are taken at the end of a pass.
        is_folded: the worker's micro-batches are added up as they come.
        is_rounded: what is added up is rounded after each addition.
    """

    def __init__(
        self,
        parameters: Sequence[TrainableParameter],
        announced: Collection[str] = (),
        *,
        is_folded: bool,
        is_rounded: bool,
    ) -> None:
        self._parameters = tuple(parameters)
        # Sums that are rounded are rounded together, after the pass.
        self._announced = frozenset() if is_rounded else frozenset(announced)
        self._is_folded = is_folded
        self._is_rounded = is_rounded
        self._changed = threading.Condition()
        self._held: dict[str, Contributions] = {p.name: {} for p in parameters}
        self._left: set[int] = set()
        """Micro-batches whose passes are not over."""
        self._taken_now: set[tuple[str, Role]] = set()
        """What the pass that runs has given already."""
        self._current: int | None = None
        self._awaited: set[_Place] = set()
        self._was_abandoned = False
        self._hooks: list[RemovableHandle] = []

    def start(self, micro_batches: Collection[int]) -> None:
        """The step's backward passes will be those of these micro-batches, in their order."""
        self._left = set(micro_batches)
        if self._announced and not self._hooks:
            self._hooks = [
                use.register_post_accumulate_grad_hook(_Announcement(self, parameter.name, role))
                for parameter in self._parameters
                if parameter.name in self._announced
                for role, use in parameter.uses
                # What is frozen in this step gets none.
                if use.requires_grad
            ]

    def begin_pass(self, m: int) -> None:
        """The backward pass of a micro-batch begins."""
        self._current = m

    def end_pass(self, m: int) -> None:
        """It is over: what is left of its gradients is taken."""
        added: list[Tensor] = []
        with self._changed:
            for parameter in self._parameters:
                for role, use in parameter.uses:
                    if use.grad is not None:
                        added.append(self._take(parameter.name, role, m, use))
            if self._is_rounded:
                round_sums(added)
            self._left.discard(m)
            self._current = None
            self._taken_now.clear()
            self._look()

    def end_passes(self) -> None:
        """No pass will come any more; idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        with self._changed:
            self._left.clear()
            self._look()

    def abandon(self) -> None:
        """End them before their time: whoever waits gets PassesAbandonedError."""
        with self._changed:
            self._was_abandoned = bool(self._left)
            self._changed.notify_all()
        self.end_passes()

    def wait_for(self, names: Collection[str], role: Role, micro_batches: Sequence[int]) -> None:
        """Wait until these parameters' gradients of one role are all there that will come.

        Raises:
            PassesAbandonedError: they will not come.
        """
        with self._changed:
            self._awaited = {(name, role, m) for name in names for m in micro_batches}
            self._awaited = {place for place in self._awaited if not self._is_there(place)}
            self._changed.wait_for(lambda: not self._awaited or self._was_abandoned)
            if self._was_abandoned:
                raise PassesAbandonedError("a backward pass of the step failed")

    def of(self, name: str) -> Contributions:
        """One parameter's gradients; who did not wait for them looks after :meth:`end_passes`."""
        return self._held[name]

    @property
    def all(self) -> Mapping[str, Contributions]:
        """As :meth:`of`, by name."""
        return self._held

    def take_announced(self, name: str, role: Role, use: Tensor) -> None:
        """Autograd has accumulated a use's gradient of the pass that runs."""
        m = self._current
        if m is None or use.grad is None:
            return
        with self._changed:
            self._take(name, role, m, use)
            self._taken_now.add((name, role))
            if self._awaited:
                self._awaited.discard((name, role, m))
                if self._left == {m}:
                    self._awaited.discard((name, role, FOLDED))
                if not self._awaited:
                    self._changed.notify_all()

    def _take(self, name: str, role: Role, m: int, use: Tensor) -> Tensor:
        """Move .grad into the step's contributions, separately only where replicas will need it."""
        gradient, use.grad = use.grad, None
        assert gradient is not None
        key = (role, FOLDED if self._is_folded else m)
        held = self._held[name]
        # Autograd would fold later micro-batches into .grad in place and in order, which is the same sum; taking it out
        # keeps the two cases alike.
        if key in held:
            held[key].add_(gradient)
        else:
            held[key] = gradient
        return held[key]

    def _look(self) -> None:
        """Let whoever waits go on, if all is there; with the lock held."""
        if not self._awaited:
            return
        self._awaited = {place for place in self._awaited if not self._is_there(place)}
        if not self._awaited:
            self._changed.notify_all()

    def _is_there(self, place: _Place) -> bool:
        name, role, m = place
        if m == FOLDED:
            is_last = self._current is not None and self._left == {self._current}
            return not self._left or (is_last and (name, role) in self._taken_now)
        return m not in self._left or (m == self._current and (name, role) in self._taken_now)


class _Announcement:
    """Autograd's call. It holds no gradients alive: a parameter may outlive the job that trains it."""

    def __init__(self, taken: TakenGradients, name: str, role: Role) -> None:
        self._taken = weakref.ref(taken)
        self._name, self._role = name, role

    def __call__(self, use: Tensor) -> None:
        taken = self._taken()
        if taken is not None:
            taken.take_announced(self._name, self._role, use)
