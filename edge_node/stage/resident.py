"""A stage that outlives its job: put back as it was loaded, and given to the next job of the same blocks.

Loading and packing are most of what a short job costs. Methods change a stage by what they hang into it, never its
frozen weights, so :class:`ResidentStage` remembers every module's attributes from before and restores them, whatever
the method was. A weight that was changed in place all the same is noticed: torch counts such changes, except those by
fused optimisers, and what an optimiser changes requires a gradient.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from edge_node.stage.stage import Stage


class ResidentStage:
    """A stage without an adapter, and the way back to it. Make it before a method is attached.

    Args:
        stage: as :func:`edge_node.stage.build.build_stage` made it.
        key: what the stage is, see :func:`plutino.job.assignment.stage_key`.
    """

    def __init__(self, stage: Stage, key: str) -> None:
        self.stage = stage
        self.key = key
        self._stage_attributes = dict(vars(stage))
        self._attributes = {module: _copied(vars(module)) for module in stage.model.modules()}
        self._weights = {weight: _state(weight) for weight in stage.model.parameters()}

    def restore(self) -> bool:
        """Put the stage back; False if a frozen weight was changed, so that it must be loaded anew."""
        if any(_state(weight) != before for weight, before in self._weights.items()):
            return False
        vars(self.stage).clear()
        vars(self.stage).update(self._stage_attributes)
        for module, attributes in self._attributes.items():
            vars(module).clear()
            vars(module).update(_copied(attributes))
        return True


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a module with containers of their own: children, parameters and hooks are kept in such."""
    return {name: value.copy() if isinstance(value, (dict, list, set)) else value for name, value in attributes.items()}


def _state(weight: nn.Parameter) -> tuple[int, int, bool]:
    return weight._version, weight.data_ptr(), weight.requires_grad
