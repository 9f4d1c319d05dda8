"""What a job tells of the model beside its own goal: general text before and after, and examples in the prompt."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from plutino.assets import GENERAL_TEXT, SNIPS_DIR, TINY_LLAMA_DIR
from plutino.data.general_text import read_general_text
from plutino.data.tokenizer import load_tokenizer
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, make_spec, wait_until


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        coordinator = ThreadCoordinator(tmp_path_factory.mktemp("state"))
        stack.callback(coordinator.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        for index in range(2):
            stack.callback(ThreadAgent(coordinator.endpoints.devices_address, f"device{index}").close)
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")
        yield people


def losses_of_base(row_tokens: int, label_tokens: int) -> float:
    """The windows' mean loss by transformers."""
    text = read_general_text(
        GENERAL_TEXT, load_tokenizer(TINY_LLAMA_DIR), row_tokens=row_tokens, label_tokens=label_tokens
    )
    rows = range(len(text.samples))
    ids = torch.tensor(np.stack([text.samples.ids(row) for row in rows]), dtype=torch.long)
    mask = torch.tensor(np.stack([text.samples.mask(row) for row in rows])).bool()
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA_DIR, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(ids).logits[:, :-1][mask[:, 1:]]
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask[:, 1:]]))


# A prompt is no identity before training: only with it switched off is the base model measured.
@pytest.mark.parametrize("method", [{"type": "prompt", "num_virtual_tokens": 4}])
def test_report_tells_general_ability_before_and_after_and_the_base_with_examples(people, tmp_path, method):
    spec = make_spec(
        TINY_LLAMA_DIR,
        SNIPS_DIR / "train.jsonl",
        tmp_path / "adapter",
        data={"eval": str(SNIPS_DIR / "validation.jsonl"), "limit": 12, "eval_limit": 3},
        training={"steps": 2, "batch_size": 4, "micro_batch_size": 2, "lr": 0.5},
        placement={"stages": 2},
        scoring={"max_new_tokens": 2, "few_shot": 2, "before": False},
        method=method,
    )
    job_id = people.submit(spec)
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    detail = people.detail(job_id)

    ability = detail["ability"]
    before, after = ability["general_before"], ability["general_after"]
    notices = [event for kind, event in people.events(job_id) if kind == "Notice"]
    assert before["num_tokens"] == after["num_tokens"] >= 1000
    assert abs(after["loss"] - before["loss"]) > 1e-3
    assert ability["few_shot"]["num_rows"] == 3 and ability["num_examples"] == 2
    assert any("examples in its prompt" in event["text"] for event in notices)
    tokenizer = load_tokenizer(TINY_LLAMA_DIR)
    shape = _row_shape(spec, tokenizer)
    assert before["loss"] == pytest.approx(losses_of_base(*shape), abs=1e-5)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "perplexity on general text, trained" in card and "2 examples in its prompt" in card


def _row_shape(spec, tokenizer) -> tuple[int, int]:
    """Tokens of the job's longest row, and the most label tokens in one."""
    from coordinator.jobs.runner import JobRunner

    prepared = JobRunner(spec, "127.0.0.1:1").prepare()
    return prepared.row_tokens, prepared.label_tokens_per_row
