"""Prompt tuning against stock peft on the unsplit model: outputs, first gradients, generation, starting values."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from edge_node.engine.generate import GenerateOptions
from edge_node.methods.prompt import attach_prompt
from edge_node.transport.base import Peer
from plutino.errors import ConfigError
from plutino.job.method import PromptConfig
from tests.numerics.chain import build_chain
from tests.numerics.pipelines import make_batches, make_rows, make_spec, padded, pipeline_of, stages_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CONFIG = PromptConfig(num_virtual_tokens=5)
NEW_TOKENS = 6


def spec_of(model_dir):
    return make_spec(model_dir).model_copy(update={"method": CONFIG})


def stock_model(model_dir, pipeline, folder):
    """Stock peft with the pipeline's prompt, from the files that a job publishes."""
    save_file(pipeline.state(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(pipeline.executors[Peer(0)].method.peft_config()))
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("model", ["llama", "tied_llama", "gpt2"])
def test_loss_and_first_gradient_on_padded_rows_are_those_of_stock_peft(model_dirs, tmp_path, model):
    batch = make_batches()[0]
    with pipeline_of(spec_of(model_dirs[model]), stages_of(3)) as pipeline:
        outcomes = pipeline.train_step(0, batch.rows, batch.loss_weight)
        found = pipeline.executors[Peer(0)]._gradients["prompt_embeddings"].clone()
        stock = stock_model(model_dirs[model], pipeline, tmp_path)
    prompt = stock.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    total = 0.0
    for ids, labels, mask in map(padded, batch.rows):
        logits = stock(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, CONFIG.num_virtual_tokens :]
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (loss / batch.loss_weight).backward()
        total += loss.item()

    assert outcomes[Peer(2)].loss_sum == pytest.approx(total, rel=1e-5)
    assert any(length < rows.padded_tokens for rows in batch.rows for length in rows.lengths)
    torch.testing.assert_close(found, prompt.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_greedy_tokens_of_left_padded_rows_are_those_of_stock_peft_on_each_row_alone(model_dirs, tmp_path, model):
    """Alone, because peft counts positions over the padding: with it, its own rows get other tokens."""
    groups = [make_rows(100 + g, 3, num_tokens=6 + g) for g in range(2)]
    options = GenerateOptions(max_new_tokens=NEW_TOKENS, stop_tokens=())
    with pipeline_of(spec_of(model_dirs[model]), stages_of(2)) as pipeline:
        found = pipeline.generate(0, groups, options)
        stock = stock_model(model_dirs[model], pipeline, tmp_path)

    for rows, tokens in zip(groups, found, strict=True):
        starts = [sum(rows.lengths[:i]) for i in range(len(rows.lengths))]
        for start, length, own in zip(starts, rows.lengths, tokens, strict=True):
            ids = torch.from_numpy(rows.input_ids[start : start + length])[None].long()
            output = stock.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            assert output[0, length:].tolist() == own


def test_prompt_starts_from_text_vocabulary_or_noise(model_dirs):
    stage = build_chain(model_dirs["llama"], 2)[0]
    table = stage.model.get_submodule(stage.embedding_name).weight

    def initial(**settings):
        return attach_prompt(stage, PromptConfig(num_virtual_tokens=5, **settings), seed=3).state()["prompt_embeddings"]

    text = initial(init="text", init_text="tag this", init_token_ids=(7, 9))
    assert torch.equal(text, table[[7, 9, 7, 9, 7]])
    vocabulary = initial(init="vocabulary")
    assert all((row == table).all(dim=1).any() for row in vocabulary)
    noise = initial(init="random")
    assert not any((row == table).all(dim=1).any() for row in noise) and 0.8 < noise.std() < 1.2
    with pytest.raises(ConfigError, match="needs the token ids of init_text"):
        initial(init="text", init_text="tag this")


def test_only_the_first_stage_holds_the_prompt(model_dirs):
    methods = [attach_prompt(stage, CONFIG, seed=1) for stage in build_chain(model_dirs["llama"], 3)]

    assert [len(method.parameters) for method in methods] == [1, 0, 0]
    assert {method.num_prompt_tokens for method in methods} == {5}
