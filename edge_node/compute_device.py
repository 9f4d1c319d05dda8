"""Where a worker computes: the processor or one CUDA card, with the memory that its budget is about.

On a processor the budget bounds the process's resident memory. On a card it bounds what torch's allocator holds there;
the CUDA context, some 0.5 GiB a process, and the process's memory on the host come on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from edge_node.guard import keep_heap, limit_data_segment, peak_resident_bytes, release_free_memory, resident_bytes
from edge_node.hardware import describe_cpu, describe_cuda
from plutino.errors import AgentError, OutOfMemoryError
from plutino.sizes import MIB, format_size


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """A torch device and its memory."""

    torch: torch.device

    @property
    def is_cuda(self) -> bool:
        """Whether it is a card."""
        return self.torch.type == "cuda"

    def held_bytes(self) -> int:
        """What this process holds of the memory that the budget bounds."""
        return torch.cuda.memory_reserved(self.torch) if self.is_cuda else resident_bytes()

    def peak_bytes(self) -> int:
        """The most it ever held of that."""
        return torch.cuda.max_memory_reserved(self.torch) if self.is_cuda else peak_resident_bytes()

    def hold_to(self, budget_bytes: int, *, keeps_heap: bool, untouched_bytes: int = 0) -> None:
        """Make an allocation beyond the budget fail, from now on.

        Args:
            budget_bytes: what the process may hold.
            keeps_heap: malloc keeps what is freed.
            untouched_bytes: what the job will map of the host's memory and never touch.

        Raises:
            OutOfMemoryError: the budget is spent already, or is more than the card has.
        """
        if not self.is_cuda:
            keep_heap(is_kept=keeps_heap)
            limit_data_segment(budget_bytes, resident_bytes(), untouched_bytes)
            return
        # The host's memory is not what the budget is about. Without its heap every frame of a message is mapped and
        # faulted in anew, with the interpreter lock held: 0.9 ms a MiB for each copy instead of 0.07 (measured), taken
        # from the thread that launches kernels.
        keep_heap()
        total_bytes = torch.cuda.get_device_properties(self.torch).total_memory
        if budget_bytes > total_bytes:
            raise OutOfMemoryError(
                f"the budget is {format_size(budget_bytes)}, the card has {format_size(total_bytes)}; lower --memory"
            )
        torch.cuda.set_per_process_memory_fraction(budget_bytes / total_bytes, self.torch)

    def check(self, budget_bytes: int, who: str) -> None:
        """Refuse to go on beyond the budget.

        Raises:
            OutOfMemoryError: with the numbers.
        """
        if (used_bytes := self.held_bytes()) > budget_bytes:
            raise OutOfMemoryError(
                f"{who} uses {used_bytes / MIB:.0f} MiB, its budget is {budget_bytes / MIB:.0f} MiB; give the device "
                "more (--memory), or lower micro_batch_size"
            )

    def release(self) -> None:
        """Give back what is free inside this process."""
        release_free_memory()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until everything that was begun here is done: a card works on beside the program."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def describe(self) -> dict[str, Any]:
        """The hardware, as a JSON object."""
        if self.is_cuda:
            return asdict(describe_cuda(self.torch.index or 0))
        return asdict(describe_cpu(torch.backends.cpu.get_cpu_capability()))


CPU = ComputeDevice(torch.device("cpu"))


def open_device(name: str) -> ComputeDevice:
    """The device of this name: cpu, cuda or cuda:N.

    Raises:
        AgentError: torch cannot compute there.
    """
    if name == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise AgentError(
            f"--device {name} was asked for, but torch {torch.__version__} sees no CUDA card; install a build with "
            "CUDA and a driver, or leave --device out"
        )
    device = torch.device(name if ":" in name else f"{name}:0")
    if (device.index or 0) >= torch.cuda.device_count():
        raise AgentError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA cards, counted from 0")
    torch.cuda.set_device(device)
    return ComputeDevice(device)
