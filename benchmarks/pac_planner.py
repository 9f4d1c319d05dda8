"""PAC's planner as published (arXiv:2408.10746 sect. 5.1, equations 2 to 6), as a yardstick.

Written from the equations. The devices come in a given order; a stage's group is a run of them; a group splits every
micro-batch equally, each of its n devices computing B / n rows; memory is weights, gradients and the activations of one
micro-batch; the number of stages is chosen by the latency of equations 4 to 6, in which links count. Prices of plans
are ours: see :func:`pac_groups`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from partitioner.cost import StageCost
from partitioner.device import DeviceProfile, LinkTable
from partitioner.layout import Cuts, Layout
from partitioner.micro_batch import scaled_devices
from partitioner.model import ModelTable
from partitioner.place import ReplicaShare
from partitioner.pricing import Pricer
from partitioner.replay import StageGroup
from partitioner.shape import JobShape

_FP32_BYTES = 4
_LEAST_SHARE = 1e-9
"""Of a micro-batch's rows; less is rounding."""


@dataclass(frozen=True, slots=True)
class PacPlan:
    """Groups of neighbouring devices with their blocks."""

    layout: Layout
    cuts: Cuts
    predicted_s: float
    """By equations 4 to 6."""


class PacPlanner:
    """Plans for one job on one ordered fleet."""

    def __init__(self, table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable) -> None:
        self._table, self._shape, self._num_devices = table, shape, len(devices)
        self._pricer = Pricer(table, shape.model_copy(update={"checkpointing": "off"}), devices, links)
        # The same devices with a micro-batch cut into n equal parts.
        self._parts = [
            Pricer(table, self._pricer.shape, scaled_devices(devices, n, 1), links) for n in range(1, len(devices) + 1)
        ]
        self._group_s: dict[tuple[int, int, int, int], tuple[float, float]] = {}

    def plan(self) -> PacPlan | None:
        """The plan with the least latency over all numbers of stages; None if none fits PAC's own memory model."""
        num_blocks, num_devices = self._table.num_blocks, self._num_devices
        # best[s][n][y]: equation 2, with the choice that gave it.
        first = [[(math.inf, 0, 0)] * (num_blocks + 1) for _ in range(num_devices + 1)]
        for n in range(1, num_devices + 1):
            for y in range(1, num_blocks + 1):
                first[n][y] = (self._slowest_s(0, y, 0, n), 0, n)
        tables = [first]
        for _ in range(1, min(num_devices, num_blocks)):
            tables.append(self._one_stage_more(tables[-1]))
        found = [
            self._traced(tables, s) for s in range(len(tables)) if tables[s][num_devices][num_blocks][0] < math.inf
        ]
        return min(found, key=lambda plan: plan.predicted_s, default=None)

    def _one_stage_more(self, shorter: list[list[tuple[float, int, int]]]) -> list[list[tuple[float, int, int]]]:
        num_blocks, num_devices = self._table.num_blocks, self._num_devices
        longer = [[(math.inf, 0, 0)] * (num_blocks + 1) for _ in range(num_devices + 1)]
        for n in range(2, num_devices + 1):
            for y in range(2, num_blocks + 1):
                best = (math.inf, 0, 0)
                for m in range(1, n):
                    for q in range(1, y):
                        front = shorter[n - m][q][0]
                        if front >= best[0]:
                            continue
                        slowest_s = max(front, self._slowest_s(q, y, n - m, m))
                        if slowest_s < best[0]:
                            best = (slowest_s, q, m)
                longer[n][y] = best
        return longer

    def _traced(self, tables: list[list[list[tuple[float, int, int]]]], s: int) -> PacPlan:
        n, y = self._num_devices, self._table.num_blocks
        groups, cuts = [], [y]
        for of_stages in reversed(tables[: s + 1]):
            _, q, m = of_stages[n][y]
            groups.append(tuple(range(n - m, n)))
            cuts.append(q)
            n, y = n - m, q
        layout, borders = tuple(reversed(groups)), tuple(reversed(cuts))
        return PacPlan(layout, borders, self._latency_s(layout, borders))

    def _slowest_s(self, start: int, end: int, first: int, size: int) -> float:
        """Equation 3: the slowest device of the group, or infinite where one is over its budget."""
        return sum(self._seconds(start, end, first, size))

    def _seconds(self, start: int, end: int, first: int, size: int) -> tuple[float, float]:
        key = (start, end, first, size)
        if key not in self._group_s:
            group = range(first, first + size)
            if any(self._is_over(device, start, end) for device in group):
                self._group_s[key] = math.inf, math.inf
            else:
                part = self._parts[size - 1]
                costs = [part.cost(device, start, end, checkpointing=False) for device in group]
                slowest = max(costs, key=lambda cost: cost.compute_s)
                self._group_s[key] = slowest.forward_s, slowest.backward_s
        return self._group_s[key]

    def _is_over(self, device: int, start: int, end: int) -> bool:
        """PAC's memory: weights, gradients and activations, wherever the stage stands."""
        share = ReplicaShare(in_flight=1, gradient_copies=1, num_peers=2)
        num_stages = 1 if (start, end) == (0, self._table.num_blocks) else 3
        index = 0 if start == 0 else (2 if end == self._table.num_blocks else 1)
        job_bytes = self._pricer.memory.job_bytes(
            start, end, num_stages=num_stages, stage_index=index, checkpointing=False, share=share
        )
        return job_bytes > self._pricer.room_bytes[device]

    def _latency_s(self, layout: Layout, cuts: Cuts) -> float:
        """Equations 4 to 6: the beginning, M micro-batches on the last stage, and the end."""
        groups = self.groups(layout, cuts)
        num_stages = len(groups)
        forward_s = [group.replicas[0].forward_s for group in groups]
        backward_s = [group.replicas[0].backward_s for group in groups]
        link_s = [sum(group.links[0][0]) if group.links[0] else 0.0 for group in groups]
        begin_s = sum(forward_s[k] + link_s[k] for k in range(num_stages - 1))
        execute_s = self._shape.num_micro_batches * (forward_s[-1] + backward_s[-1])
        end_s = max(
            groups[i].sum_s + sum(backward_s[j] + link_s[j] for j in range(i, num_stages - 1))
            for i in range(num_stages)
        )
        return begin_s + execute_s + end_s

    def groups(self, layout: Layout, cuts: Cuts) -> tuple[StageGroup, ...]:
        """A plan as the simulator plays it: a group is one worker, as quick as its slowest device with B / n rows.

        Every row passes over the link between the two devices that compute it, all links side by side, and the last
        row counts; adapters are averaged by a ring, 2 (n - 1) / n of their bytes over its slowest link.
        """
        found = []
        for k, group in enumerate(layout):
            forward_s, backward_s = self._seconds(cuts[k], cuts[k + 1], group[0], len(group))
            cost = self._pricer.cost(group[0], cuts[k], cuts[k + 1], checkpointing=False)
            links: tuple[tuple[tuple[float, float], ...], ...] = ((),)
            if k + 1 < len(layout):
                below = layout[k + 1]
                # Of n devices the i-th has the rows from i / n to (i + 1) / n.
                n, m = len(group), len(below)
                shares = {
                    (device, other): min((i + 1) / n, (j + 1) / m) - max(i / n, j / m)
                    for i, device in enumerate(group)
                    for j, other in enumerate(below)
                }
                pairs = [pair for pair, share in shares.items() if share > _LEAST_SHARE]
                busy_s = max(shares[pair] * float(self._pricer.busy_s[pair]) for pair in pairs)
                links = (((busy_s, max(float(self._pricer.latency_s[pair]) for pair in pairs)),),)
            worker: StageCost = replace(cost, forward_s=forward_s, backward_s=backward_s)
            found.append(StageGroup((worker,), (), links, self._ring_s(layout, cuts, k)))
        return tuple(found)

    def _ring_s(self, layout: Layout, cuts: Cuts, k: int) -> float:
        group = layout[k]
        if len(group) == 1:
            return 0.0
        num_bytes = _FP32_BYTES * sum(self._shape.adapter_params[cuts[k] : cuts[k + 1]])
        ring = [(group[i], group[(i + 1) % len(group)]) for i in range(len(group))]
        slowest = min(float(self._pricer.bandwidth[pair]) for pair in ring)
        return 2 * (len(group) - 1) / len(group) * num_bytes / slowest

    def over_budget(self, plan: PacPlan) -> list[str]:
        """Devices whose budget the plan breaks, with 1F1B's micro-batches in flight and B / n rows a device."""
        over = []
        num_stages, num_micro_batches = len(plan.layout), self._shape.num_micro_batches
        for k, group in enumerate(plan.layout):
            rows = -(-self._shape.micro_batch_rows // len(group))
            part = self._pricer.shape.model_copy(
                update={"micro_batch_rows": rows, "batch_rows": rows * num_micro_batches}
            )
            pricer = self._pricer.of_shape(part)
            job_bytes = pricer.memory.job_bytes(
                plan.cuts[k], plan.cuts[k + 1], num_stages=num_stages, stage_index=k, checkpointing=False
            )
            over += [pricer.devices[device].name for device in group if job_bytes > pricer.room_bytes[device]]
        return over
