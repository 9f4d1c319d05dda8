"""A sum on a card is rounded as one in the host's memory is. Needs a card: ``make gpu``."""

from __future__ import annotations

import pytest
import torch

from edge_node.engine.sum_rounding import round_sums

pytestmark = pytest.mark.gpu


def test_sums_on_a_card_are_rounded_to_the_bits_of_those_on_the_host():
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 1e-30, 2.0**-100, 1e30, float("inf"))
    here = [scale * torch.randn(257, generator=generator) * 2.0 ** torch.arange(257).neg() for scale in scales]
    there = [sum_.to("cuda") for sum_ in here]

    round_sums(here)
    round_sums(there)

    for host, card in zip(here, there, strict=True):
        assert torch.equal(host.nan_to_num(0.5), card.cpu().nan_to_num(0.5))
