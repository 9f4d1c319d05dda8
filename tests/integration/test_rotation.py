"""Certificates are renewed, and expire, under a job that goes on as if nothing were."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coordinator import app
from coordinator.security.warden import Warden
from edge_node.joining import Membership, Renewal, join
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.client import Client
from plutino.job.spec import JobSpec
from plutino.security.certificates import life
from plutino.security.identity import Identity
from plutino.security.tls import Credentials
from plutino.security.tokens import JoinToken
from tests.integration.stack import ThreadAgent, ThreadCoordinator, losses, make_spec, wait_until
from tests.integration.step_gate import StepGate

ROTATIONS = [pytest.param(4), pytest.param(20, marks=pytest.mark.slow)]
STEPS_LEFT = 2
"""Steps behind the last rotation."""
LIFETIME_S = 20.0
"""So long that no renewal is due: those of the test are the only ones."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((TINY_LLAMA_DIR / name).read_bytes())
    return folder


def spec_of(model_dir: Path, output: Path, steps: int) -> JobSpec:
    return make_spec(
        model_dir,
        SNIPS_DIR / "train.jsonl",
        output,
        data={"limit": 32},
        training={"steps": steps, "batch_size": 2, "micro_batch_size": 1, "lr": 1e-2, "shadow_every": 2},
        placement={"stages": 2},
        method={"type": "lora", "rank": 4},
    )


class Stack:
    """A coordinator with its warden at hand, and two devices."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
        wardens: list[Warden] = []

        class SeenWarden(Warden):
            def __init__(self, *arguments: object, **settings: object) -> None:
                super().__init__(*arguments, **settings)
                wardens.append(self)

        monkeypatch.setattr(app, "Warden", SeenWarden)
        self.coordinator = ThreadCoordinator(folder / "state", **changes)
        self.client = Client.local(folder / "state")
        self.memberships: list[Membership | None] = [None, None]
        if wardens:
            self.warden = wardens[0]
            for number in range(2):
                (folder / f"node{number}").mkdir()
                token = JoinToken.decode(self.client.members.create_token().token)
                self.memberships[number] = join(token, f"device{number}", folder / f"node{number}")
        address = self.coordinator.endpoints.devices_address
        self.agents = [
            ThreadAgent(address, f"device{number}", membership=membership)
            for number, membership in enumerate(self.memberships)
        ]
        wait_until(
            lambda: [device["state"] for device in self.client.devices()] == ["alive"] * 2, "both devices attach"
        )

    def rotate(self) -> None:
        """Every certificate is replaced, and every control stream dials again with the new one."""
        self.warden._issue_own()
        for membership in self.memberships:
            asyncio.run(Renewal(membership.devices_address, Credentials(membership.identity))._renew())
            self.coordinator._loop.call_soon_threadsafe(self.warden.cut, membership.node_id)

    def close(self) -> None:
        self.client.close()
        for agent in self.agents:
            agent.close()
        self.coordinator.close()


@pytest.mark.parametrize("num_rotations", ROTATIONS)
def test_certificates_rotated_again_and_again_during_a_job_leave_its_adapter_bit_equal(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: StepGate, num_rotations: int
) -> None:
    steps = num_rotations + STEPS_LEFT

    def run(folder: Path, **changes: object) -> tuple[list[float], bytes]:
        folder.mkdir()
        stack = Stack(folder, monkeypatch, **changes)
        try:
            gate.hold_at(0)
            job_id = stack.client.submit(spec_of(model_dir, folder / "adapter", steps))
            for step in range(1, num_rotations + 1) if "certificate_lifetime_s" in changes else ():
                gate.hold_at(step)
                wait_until(lambda step=step: stack.client.job(job_id).summary.step >= step, f"step {step}")
                gate.hold_at(step + 1)
                stack.rotate()
            gate.open()
            wait_until(lambda: stack.client.job(job_id).summary.has_ended, "the job's end")
            summary = stack.client.job(job_id).summary
            assert summary.state == "succeeded", summary
            detail = stack.client.job(job_id).detail
            assert detail["recoveries"] == 0, "no rotation may cost a plan epoch"
            return losses(detail), (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        finally:
            gate.open()
            stack.close()

    undisturbed = run(tmp_path / "plain")
    rotated = run(tmp_path / "rotated", is_plaintext=False, certificate_lifetime_s=LIFETIME_S)

    assert rotated == undisturbed


def test_certificates_are_renewed_by_themselves_at_two_thirds_of_their_life(tmp_path: Path) -> None:
    coordinator = ThreadCoordinator(tmp_path / "state", is_plaintext=False, certificate_lifetime_s=3.0)
    client = Client.local(tmp_path / "state")
    (tmp_path / "node").mkdir()
    membership = join(JoinToken.decode(client.members.create_token().token), "pi", tmp_path / "node")
    first = Identity.read(membership.identity)
    _, first_ends_s = life(first.certificate_pem)

    async def renew_until(done: asyncio.Event) -> None:
        renewing = asyncio.create_task(Renewal(membership.devices_address, Credentials(membership.identity)).run())
        await asyncio.wait({renewing, asyncio.create_task(done.wait())}, return_when=asyncio.FIRST_COMPLETED)
        renewing.cancel()

    async def main() -> None:
        done = asyncio.Event()
        renewing = asyncio.create_task(renew_until(done))
        while time.time() < first_ends_s + 1.0:
            await asyncio.sleep(0.05)
            assert not renewing.done()
        done.set()
        await renewing

    asyncio.run(main())

    assert time.time() > first_ends_s
    assert Identity.read(membership.identity).key_pem != first.key_pem
    assert client.devices(), "the person's and the coordinator's own were renewed, too"
    agent = ThreadAgent(membership.devices_address, "pi", membership=membership)
    wait_until(
        lambda: [device["state"] for device in client.devices()] == ["alive"], "it attaches after the first ended"
    )
    agent.close()
    client.close()
    coordinator.close()
