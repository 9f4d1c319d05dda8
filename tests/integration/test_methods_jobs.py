"""Whole jobs of methods beside LoRA over real gRPC: planned, trained on one and two workers, exported, reloaded."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, losses, make_spec, wait_until

METHODS = {
    "adapters": {"type": "adapters", "bottleneck": 8},
    "full": {"type": "full", "unfreeze": {"every_steps": 1, "blocks": 3}},
    # All workers hold the MLP's trunk, and what is published is computed on them.
    "prefix": {"type": "prefix", "num_virtual_tokens": 4, "projection": True, "encoder_hidden_size": 16},
    "parallel_adapters": {"type": "parallel_adapters", "reduction": 4},
    # Devices have no tokenizer: the text's ids must reach them through the coordinator.
    "prompt": {"type": "prompt", "num_virtual_tokens": 4, "init": "text", "init_text": "Name the intent:"},
}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory):
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        coordinator = ThreadCoordinator(tmp_path_factory.mktemp("state"))
        stack.callback(coordinator.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        for index in range(2):
            agent = ThreadAgent(coordinator.endpoints.devices_address, f"device{index}")
            stack.callback(agent.close)
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")
        yield people


# One that trains the blocks in place; the others' bits are the engine's tests'.
@pytest.mark.parametrize("method", [m if m == "full" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_job_gives_the_same_bits_on_one_and_two_workers_and_its_adapter_is_reloaded(people, tmp_path, method):
    details = []
    for stages in (1, 2):
        spec = make_spec(
            TINY_LLAMA_DIR,
            SNIPS_DIR / "train.jsonl",
            tmp_path / f"adapter{stages}",
            training={"steps": 3, "batch_size": 4, "micro_batch_size": 2, "lr": 2e-3},
            placement={"stages": stages},
            method=METHODS[method],
        )
        job_id = people.submit(spec)
        assert people.wait(job_id).state == "succeeded", people.job(job_id)
        details.append(people.detail(job_id))

    assert losses(details[0]) == losses(details[1])
    card = (tmp_path / "adapter2" / "README.md").read_text()
    assert "relative difference" in card
    if method == "full":
        # A model's shards follow the stages; its tensors do not depend on them.
        one, two = (weights(tmp_path / f"adapter{n}") for n in (1, 2))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        assert "AutoModelForCausalLM.from_pretrained" in card
        return
    adapters = [(tmp_path / f"adapter{n}" / "adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert adapters[0] == adapters[1]
    assert f"An adapter (`{method}`)" in card


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
