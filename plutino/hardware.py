"""What a device computes with, as its agent tells it and as people and the planner see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WIRE_VERSION = 3
"""Number of the agents' and workers' protocol. It rises when one side would misunderstand the other, and a coordinator
refuses agents of another number in words."""

FIXED_LIBRARIES = ("torch", "transformers", "peft")
"""Libraries whose versions decide the bits of a job; all its workers have the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Where a device's workers compute."""

    kind: str = "cpu"
    """cpu, cuda or mps."""
    name: str = ""
    """What people call it: the processor's or the card's model."""
    machine: str = ""
    """Instruction set as the kernel names it: x86_64, aarch64, arm64."""
    capability: str = ""
    """What its kernels are chosen by: AVX512, NEON; for CUDA the compute capability, such as 9.0."""
    arithmetic: str = ""
    """Two devices whose text is the same round alike, given the same libraries and threads."""
    memory_bytes: int = 0
    """Memory of the card; 0 where workers use the machine's own."""
    idle_accelerators: tuple[str, ...] = ()
    """Accelerators of the machine that its workers do not use."""

    @classmethod
    def from_values(cls, values: Mapping[str, object]) -> Hardware:
        """The same from a JSON object.

        Raises:
            ValueError: a value is missing or of another type.
        """
        try:
            texts = {name: values[name] for name in ("kind", "name", "machine", "capability", "arithmetic")}
            memory_bytes, idle = values["memory_bytes"], values["idle_accelerators"]
        except KeyError as error:
            raise ValueError(f"hardware without {error}") from error
        if not (all(isinstance(text, str) for text in texts.values()) and isinstance(memory_bytes, int)):
            raise ValueError(f"malformed hardware {str(values)[:200]}")
        if not isinstance(idle, (list, tuple)):
            raise ValueError(f"malformed idle accelerators {str(idle)[:200]}")
        return cls(
            kind=str(texts["kind"]),
            name=str(texts["name"]),
            machine=str(texts["machine"]),
            capability=str(texts["capability"]),
            arithmetic=str(texts["arithmetic"]),
            memory_bytes=memory_bytes,
            idle_accelerators=tuple(str(one) for one in idle),
        )

    def __str__(self) -> str:
        parts = (self.kind, self.name, self.capability)
        return " ".join(part for part in parts if part)


def wire_refusal(name: str, wire_version: int) -> str | None:
    """Why an agent of this protocol cannot be taken in; None if it can."""
    if wire_version == WIRE_VERSION:
        return None
    older = "the device's" if wire_version < WIRE_VERSION else "the coordinator's"
    return (
        f"{name} speaks version {wire_version} of plutino's protocol, this coordinator speaks {WIRE_VERSION}; "
        f"upgrade {older} plutino"
    )
