"""Random generators that depend on names and numbers alone: the same on every device and for every partition."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that is a stable function of ``parts``.

    Always on the CPU, where uniform draws do not depend on the processor or the number of threads.
    """
    # Lengths keep ("ab", "c") and ("a", "bc") apart; Python's own hash changes from process to process.
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
