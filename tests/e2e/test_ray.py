"""``plutino up`` with Ray, which is the default: its runner reads a job's rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.stack import TEST_S, Stack, tiny_model, write_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(TEST_S)]


@pytest.fixture
def stack(tmp_path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    try:
        stack.up()
        yield stack
    finally:
        stack.close()


def test_job_without_devices_is_read_by_ray_waits_and_can_be_cancelled(stack):
    job = write_job(stack.folder / "job.yaml", tiny_model(stack.folder / "model"))
    job_id = stack.ask("submit", job, "--detach")["job_id"]

    waiting = stack.await_job(job_id, lambda job: job.state == "planning")

    assert waiting.total_steps == 3
    assert stack.ask("cancel", job_id)["state"] == "cancelled"
