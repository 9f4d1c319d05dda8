"""A job of every family through the whole installation: measured, planned, trained over two devices, exported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from plutino.assets import TINY_LLAMA_DIR
from tests.e2e.stack import Stack, wait_until, write_job
from tests.numerics.tiny_families import CONFIGS, save_model

pytestmark = pytest.mark.slow

JOB_S = 400.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.up("--engine", "local")
        for name in ("one", "two"):
            stack.node(name, memory="900MiB")
        stack.await_devices("one", "two")
        yield stack
    finally:
        stack.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_job_over_two_devices_ends_with_an_adapter_that_stock_peft_verified(stack, name):
    folder = stack.folder / name
    shutil.copytree(TINY_LLAMA_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(TINY_LLAMA_DIR / "tokenizer_config.json", folder)
    positions = "n_positions" if name == "gpt2" else "max_position_embeddings"
    save_model(name, folder, vocab_size=4096, eos_token_id=2, **{} if name == "bloom" else {positions: 1024})
    job = write_job(stack.folder / f"{name}.yaml", folder, placement={"stages": 2})
    out = stack.folder / f"{name}-adapter"
    job_id = stack.ask("submit", job, "--detach", "--set", f"output.dir={out}")["job_id"]

    with stack.client() as client:
        wait_until(lambda: client.job(job_id).summary.has_ended, timeout_s=JOB_S)
        summary = client.job(job_id).summary

    assert summary.state == "succeeded", summary.reason
    assert (out / "adapter_model.safetensors").exists()
    assert "without the adapter" in (out / "README.md").read_text()
