"""Tiny random models, saved by transformers as a person would have them on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def _llama(*, is_tied: bool) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=is_tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=61,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        # Reads the block's global index in its constructor, so it breaks if blocks are renumbered.
        scale_attn_by_inverse_layer_idx=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _llama(is_tied=False),
    "tied_llama": lambda: _llama(is_tied=True),
    "gpt2": _gpt2,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by model name; llama is sharded, gpt2 and tied_llama have tied embeddings."""
    folders = {}
    for name, make in _MODELS.items():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                # Ten times transformers' own spread, so that attention is far from uniform; norms and biases too.
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name], max_shard_size="30KB" if name == "llama" else "1GB")
    return folders
