"""Export against stock peft: the joined file is peft's own, wrong ones are caught, the card's code loads the result."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from coordinator.artifacts import verify
from coordinator.artifacts.assemble import assemble_adapter
from coordinator.artifacts.card import CardFacts, TrainingLosses
from coordinator.artifacts.parts import AssembleRequest
from coordinator.artifacts.publish import PublishRequest, publish_adapter
from coordinator.artifacts.verify_process import Probe, ProbeRows, VerifyRequest
from plutino.errors import ExportError
from plutino.job.spec import JobSpec
from plutino.manifest import base_model_hash
from plutino.sizes import GIB

MODEL_DIR = Path(__file__).resolve().parents[2] / "plutino" / "assets" / "models" / "tiny-llama-7m"
ROWS = ([1, 9, 40, 77, 300, 5, 2], [1, 12, 800, 3, 2], [1, 4000, 33, 34, 35, 36, 37, 2])
NUM_PROMPT_TOKENS = 3

# peft asks transformers 5 for a property that is renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def stock_model() -> Any:
    """The base with a peft adapter that changes it clearly."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def stock_dir(stock_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    stock_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def probe(stock_model: Any) -> Probe:
    """Rows with the loss that a pipeline would report, from unpadded rows one by one."""
    loss_sum = 0.0
    with torch.no_grad():
        for row in ROWS:
            logits = stock_model(input_ids=torch.tensor([row])).logits[0, NUM_PROMPT_TOKENS - 1 : -1]
            loss_sum += float(functional.cross_entropy(logits, torch.tensor(row[NUM_PROMPT_TOKENS:]), reduction="sum"))
    micro_batches = tuple(
        ProbeRows(
            lengths=tuple(map(len, rows)),
            input_ids=tuple(token for row in rows for token in row),
            label_mask=tuple(int(t >= NUM_PROMPT_TOKENS) for row in rows for t in range(len(row))),
            padded_tokens=max(map(len, rows)),
        )
        for rows in (ROWS[:2], ROWS[2:])
    )
    num_labels = sum(len(row) - NUM_PROMPT_TOKENS for row in ROWS)
    return Probe(micro_batches=micro_batches, loss_sum=loss_sum, num_counted=num_labels, dtype="fp32")


class MemoryBulk:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put_shadow(self, job_id: str, shadow_id: str, data: bytes, sha256: str) -> None:
        self.files[shadow_id] = bytes(data)

    def get_shadow(self, job_id: str, shadow_id: str, sha256: str) -> bytearray:
        return bytearray(self.files[shadow_id])


def stage_parts(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Shadows of three stages that hold blocks 0-2, 3 and 4-7."""
    stage_of_block = [0, 0, 0, 1, 2, 2, 2, 2]
    parts: dict[str, dict[str, np.ndarray]] = {f"step5-stage{stage}": {} for stage in range(3)}
    for name, value in tensors.items():
        part = parts[f"step5-stage{stage_of_block[int(name.split('.layers.')[1].split('.')[0])]}"]
        part |= {f"param/{name}": value, f"exp_avg/{name}": value * 0, f"adam_step/{name}": np.array(5.0, np.float32)}
    return {shadow_id: save(part) for shadow_id, part in parts.items()}


def facts(checks: tuple[tuple[str, str], ...], spec: JobSpec) -> CardFacts:
    return CardFacts(
        job_name="export",
        base_path=spec.model.path,
        base_hash=base_model_hash(MODEL_DIR),
        data=(),
        method=spec.method,
        objective=spec.objective,
        training=spec.training,
        dtype="fp32",
        plan_text="3 stages",
        num_steps=5,
        losses=TrainingLosses(first=3, last=2, best=1),
        checks=checks,
        was_reloaded=True,
        versions={"peft": peft.__version__},
        training_s=1,
        date="2026-01-02",
    )


def test_export_of_three_stages_is_stock_pefts_file_and_the_cards_code_loads_it(
    stock_model: Any, stock_dir: Path, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = JobSpec.model_validate({"model": {"path": str(MODEL_DIR)}, "data": {"train": "rows.jsonl"}})
    tensors, bulk = load_file(stock_dir / "adapter_model.safetensors"), MemoryBulk()
    bulk.files = stage_parts(tensors)
    request = AssembleRequest(
        job_id="j1",
        step=5,
        shadows={shadow_id: hashlib.sha256(data).hexdigest() for shadow_id, data in bulk.files.items()},
        parameter_names=tuple(tensors),
        adapter_config_json=(stock_dir / "adapter_config.json").read_text(),
        output_dir=str(tmp_path / "out"),
        base_hash=base_model_hash(MODEL_DIR),
        verify_reload_budget_bytes=GIB,
        probe=probe,
    )

    # In this process, which has torch already; the end-to-end job has its verification in a process of its own.
    assembled = assemble_adapter(request, spec, bulk, verify=verify.verify_adapter)
    publish_adapter(
        PublishRequest(
            job_id="j1",
            step=5,
            staging_dir=assembled.staging_dir,
            output_dir=request.output_dir,
            adapter_sha256=assembled.adapter_sha256,
            card=facts(assembled.checks, spec),
        )
    )

    out = tmp_path / "out"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / file).read_bytes() == (stock_dir / file).read_bytes()
    assert assembled.was_reloaded
    assert [name for name, _ in assembled.checks] == ["base model", "joined parts", "stock peft", "reload"]
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec((out / "README.md").read_text().split("```python\n")[1].split("\n```")[0], namespace)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert torch.equal(namespace["model"].eval()(input_ids=ids).logits, stock_model(input_ids=ids).logits)


@pytest.fixture
def altered(stock_dir: Path, tmp_path: Path) -> Callable[[dict[str, np.ndarray]], Path]:
    """Writes the stock adapter with some tensors put in place of its own; None removes one."""

    def write(changes: dict[str, Any]) -> Path:
        tensors = load_file(stock_dir / "adapter_model.safetensors") | changes
        save_file(
            {name: value for name, value in tensors.items() if value is not None},
            tmp_path / "adapter_model.safetensors",
        )
        (tmp_path / "adapter_config.json").write_bytes((stock_dir / "adapter_config.json").read_bytes())
        return tmp_path

    return write


def name_of(block: int, tensor: str = "q_proj.lora_A") -> str:
    return f"base_model.model.model.layers.{block}.self_attn.{tensor}.weight"


def test_check_reload_catches_two_blocks_tensors_swapped(stock_dir: Path, probe: Probe, altered: Any) -> None:
    tensors = load_file(stock_dir / "adapter_model.safetensors")
    folder = altered({name_of(2): tensors[name_of(6)], name_of(6): tensors[name_of(2)]})

    with pytest.raises(ExportError, match=r"does not do what was trained: loss sum .* nothing was published"):
        verify.check_reload(MODEL_DIR, folder, probe)
    verify.check_tensors(MODEL_DIR, folder)


def test_check_reload_catches_logits_that_are_not_finite(probe: Probe, altered: Any) -> None:
    folder = altered({name_of(7, "v_proj.lora_B"): np.full((128, 4), np.inf, np.float32)})

    with pytest.raises(ExportError, match="logits of the reloaded adapter are not finite"):
        verify.check_reload(MODEL_DIR, folder, probe)


def test_check_reload_refuses_a_probe_with_another_number_of_labels(stock_dir: Path, probe: Probe) -> None:
    miscounted = probe.model_copy(update={"num_counted": 12})

    with pytest.raises(ExportError, match="has 11 label tokens but the pipeline counted 12"):
        verify.check_reload(MODEL_DIR, stock_dir, miscounted)


def test_check_reload_tells_the_first_rows_loss_with_and_without_the_adapter(
    stock_model: Any, stock_dir: Path, probe: Probe
) -> None:
    def loss_of_first() -> float:
        with torch.no_grad():
            logits = stock_model(input_ids=torch.tensor([ROWS[0]])).logits[0, NUM_PROMPT_TOKENS - 1 : -1]
        return float(functional.cross_entropy(logits, torch.tensor(ROWS[0][NUM_PROMPT_TOKENS:]), reduction="sum"))

    _, outcome = verify.check_reload(MODEL_DIR, stock_dir, probe)

    told = re.search(r"of the first row (\S+), without the adapter (\S+) ", outcome)
    assert told is not None, outcome
    assert float(told[1]) == pytest.approx(loss_of_first(), rel=1e-4)
    with stock_model.disable_adapter():
        assert float(told[2]) == pytest.approx(loss_of_first(), rel=1e-4)


def test_check_reload_in_bf16_is_within_its_tolerance(stock_dir: Path, probe: Probe) -> None:
    name, outcome = verify.check_reload(MODEL_DIR, stock_dir, probe.model_copy(update={"dtype": "bf16"}))

    assert name == "reload" and "tolerance 2e-02" in outcome


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({name_of(3): np.zeros((8, 256), np.float32)}, r"is F32 \[8, 256\], peft expects F32 \[4, 256\]"),
        ({name_of(3): np.zeros((4, 256), np.float16)}, r"is F16 \[4, 256\], peft expects F32 \[4, 256\]"),
        ({name_of(3): None}, "is missing"),
        ({name_of(9): np.zeros((4, 256), np.float32)}, "is unknown to peft"),
    ],
)
def test_check_tensors_refuses_what_peft_would_not_save(changes: Any, problem: str, altered: Any) -> None:
    with pytest.raises(ExportError, match=rf"{next(iter(changes))} {problem}.*nothing was published"):
        verify.check_tensors(MODEL_DIR, altered(changes))


@pytest.mark.parametrize("budget_bytes", [0, 2**20])
def test_verify_without_the_budget_does_not_reload_and_says_why(
    budget_bytes: int, stock_dir: Path, probe: Probe
) -> None:
    wrong = probe.model_copy(update={"loss_sum": 1e6})
    request = VerifyRequest(
        base_dir=str(MODEL_DIR),
        adapter_dir=str(stock_dir),
        probe=wrong,
        reload_budget_bytes=budget_bytes,
        time_limit_s=60,
    )

    report = verify.verify_adapter(request)

    assert not report.was_reloaded
    assert report.checks[-1][1].startswith("not done: base and adapter in fp32 need 2")
