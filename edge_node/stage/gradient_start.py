"""What a method may want of a job's first step: gradients of the blocks, before anything is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class GradientStart(Protocol):
    """First values of what is trained, from gradients that the pipeline sends through the frozen blocks once."""

    def watching(self) -> AbstractContextManager[None]:
        """Passes through the blocks within give gradients, of which the method takes what it needs."""
        ...

    def finish(self) -> None:
        """Set the first values.

        Raises:
            NumericsError: a gradient was not finite.
        """
        ...
