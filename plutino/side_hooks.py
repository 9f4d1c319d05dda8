"""Hooks that run a side network beside a whole transformers model; :mod:`plutino.side_loader` puts them there.

The model's own code runs as ever: hooks record what its blocks give and add the side network's part to what the head
reads. An encoder-decoder's encoder and decoder are called apart, by ``generate`` even rows repeated between them for
beams. So the source's side state goes from one to the other inside the encoder's output: its fp32 bits, as further
numbers of each token in the model's dtype, which the decoder's hook takes off again. Needs torch and transformers.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from plutino.errors import ConfigError
from plutino.family import Halves
from plutino.side_halves import run_ladders
from plutino.side_network import BackboneStates, BackboneTap, SideNetwork


class _Recorded(ABC):
    """Hooks on a module whose blocks are recorded while it runs."""

    def __init__(self, owner: nn.Module, tap: BackboneTap, side: SideNetwork) -> None:
        self._tap, self._side = tap, side
        self._signature = inspect.signature(owner.forward)
        self._recording: AbstractContextManager[BackboneStates] | None = None
        self._states = BackboneStates()
        owner.register_forward_pre_hook(self._before, with_kwargs=True)
        owner.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._recording = None
        if self._side.is_enabled:
            self._recording = self._tap.recording()
            self._states = self._recording.__enter__()
            return args, self.prepared(kwargs)
        return args, kwargs

    def _after(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._recording is None:
            return output
        self._recording.__exit__(None, None, None)
        states, self._states = self._states, BackboneStates()
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = given | given.get("kwargs", {})
        if isinstance(output, tuple):
            raise ConfigError("a side network needs return_dict=True, which is transformers' default")
        self.complete(owner, states, given, output)
        return output

    def prepared(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the module is called with."""
        return kwargs

    @abstractmethod
    def complete(self, owner: nn.Module, states: BackboneStates, given: dict[str, Any], output: Any) -> None:
        """Add the side network's part to the module's output, in place."""


class BesideOneStack(_Recorded):
    """Hooks on a base model."""

    def complete(self, owner: nn.Module, states: BackboneStates, given: dict[str, Any], output: Any) -> None:
        """See :class:`_Recorded`."""
        side = self._side(
            states,
            None,
            attention_mask=given.get("attention_mask"),
            position_ids=given.get("position_ids"),
            cache=output.past_key_values,
        )
        output.last_hidden_state = self._side.mix(output.last_hidden_state, side)
        pooler = getattr(owner, "pooler", None)
        if pooler is not None:
            output.pooler_output = pooler(output.last_hidden_state)


class _BesideEncoder(_Recorded):
    """Hooks on an encoder."""

    def complete(self, owner: nn.Module, states: BackboneStates, given: dict[str, Any], output: Any) -> None:
        """See :class:`_Recorded`."""
        mask = given.get("attention_mask")
        source_side, _ = run_ladders(self._side, states, None, None, source_mask_BS=mask, cache=None, parts="source")
        assert source_side is not None, "the encoder has run"
        hidden = output.last_hidden_state
        output.last_hidden_state = torch.cat([hidden, source_side.contiguous().view(hidden.dtype)], dim=-1)


class _BesideDecoder(_Recorded):
    """Hooks on a decoder."""

    _source_side: Tensor | None = None

    def prepared(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """See :class:`_Recorded`."""
        source = kwargs.get("encoder_hidden_states")
        layout = self._side.layout
        if source is None or source.shape[-1] == layout.width:
            raise ConfigError(
                "the encoder's output does not come from the model with its side network switched on; call the model "
                "itself, or its own encoder, once load_adapter has returned"
            )
        self._source_side = source[..., layout.width :].contiguous().view(torch.float32)
        return kwargs | {"encoder_hidden_states": source[..., : layout.width]}

    def complete(self, owner: nn.Module, states: BackboneStates, given: dict[str, Any], output: Any) -> None:
        """See :class:`_Recorded`."""
        _, side = run_ladders(
            self._side,
            states,
            self._source_side,
            None,
            source_mask_BS=given.get("encoder_attention_mask"),
            cache=output.past_key_values,
            parts="target",
        )
        assert side is not None, "the decoder has run"
        output.last_hidden_state = self._side.mix(output.last_hidden_state, side)


def put_beside_halves(model: nn.Module, halves: Halves, tap: BackboneTap, side: SideNetwork) -> None:
    """Run a side network's ladders beside the encoder and the decoder of a model, in place."""
    _BesideEncoder(model.get_submodule(halves.encoder), tap, side)
    _BesideDecoder(model.get_submodule(halves.decoder), tap, side)
