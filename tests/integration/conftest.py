"""What tests of several files share: a small job and its undisturbed run; a coordinator with TLS and a stranger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from plutino.assets import SNIPS_DIR
from plutino.job.spec import JobSpec
from plutino.security.certificates import Authority
from tests.integration.job_cases import NUM_ROWS, adapter_bytes, save_small_model, small_spec, start
from tests.integration.stack import losses
from tests.integration.step_gate import StepGate

if TYPE_CHECKING:
    from tests.integration.secure_stack import SecureStack


@pytest.fixture(scope="session")
def small_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    lines = (SNIPS_DIR / "train.jsonl").read_text().splitlines()[:NUM_ROWS]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def gate(cleanup: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Iterator[StepGate]:
    """Opened before ``cleanup`` ends the workers that may wait at it."""
    gate = StepGate(monkeypatch)
    yield gate
    gate.open()


@pytest.fixture
def job(small_model_dir: Path, rows_file: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    def make(name: str = "adapter", **settings: object) -> JobSpec:
        return small_spec(small_model_dir, rows_file, tmp_path / name, **settings)

    return make


@pytest.fixture(scope="session")
def undisturbed(
    small_model_dir: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], bytes]:
    """Losses and adapter of a run to which nothing happens."""
    folder = tmp_path_factory.mktemp("calm")
    with ExitStack() as stack:
        people, _ = start(stack, folder / "state", 2)
        job_id = people.submit(small_spec(small_model_dir, rows_file, folder / "adapter", eval_every=4))
        assert people.wait(job_id).state == "succeeded", people.job(job_id)
        return losses(people.detail(job_id)), adapter_bytes(folder / "adapter")


@pytest.fixture(scope="module")
def secure_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureStack]:
    # It looks at every service there is, which other tests need not.
    from tests.integration.secure_stack import SecureStack

    stack = SecureStack(tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("members"))
    yield stack
    stack.close()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another plutino's authority."""
    return Authority.open(tmp_path_factory.mktemp("stranger") / "authority.pem")
