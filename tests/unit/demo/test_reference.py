"""The yardstick on a random two-block model; slow because torch, transformers and peft are imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.spec import JobSpec, parse_spec

if TYPE_CHECKING:
    from coordinator.demo.reference import ReferenceResult

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers

    target = tmp_path_factory.mktemp("model")
    shutil.copytree(TINY_LLAMA_DIR, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = transformers.AutoConfig.from_pretrained(TINY_LLAMA_DIR)
    config.update({"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(target)
    return target


def spec(model_dir: Path, **training: Any) -> JobSpec:
    return parse_spec(
        {
            "model": {"path": str(model_dir), "dtype": "fp32"},
            "data": {
                "train": str(SNIPS_DIR / "train.jsonl"),
                "eval": str(SNIPS_DIR / "validation.jsonl"),
                "limit": 20,
                "eval_limit": 6,
            },
            "scoring": {"max_new_tokens": 3, "batch_rows": 4},
            "training": {"batch_size": 6, "epochs": 2, "lr": 1e-2, **training},
            "placement": {"threads": 1},
        },
        base_dir=Path("/"),
    )


def run(job: JobSpec) -> ReferenceResult:
    from coordinator.demo.reference import run_reference

    return run_reference(job)


def test_reference_same_job_twice_gives_the_same_losses_and_learns(model_dir: Path) -> None:
    first, second = run(spec(model_dir)), run(spec(model_dir))

    assert first.losses == second.losses
    assert first.num_steps == 8
    assert first.losses[-1] < first.losses[0]


def test_reference_micro_batches_change_no_loss_beyond_rounding(model_dir: Path) -> None:
    whole, cut = run(spec(model_dir)), run(spec(model_dir, micro_batch_size=4))

    # fp32 sums in another order and over another padding: 3e-6 a step, grown by eight updates.
    assert cut.losses == pytest.approx(whole.losses, abs=1e-4)


def test_reference_reports_both_scores_over_the_held_out_rows(model_dir: Path) -> None:
    result = run(spec(model_dir))

    assert result.before is not None and result.after is not None
    assert (result.before.num_rows, result.after.num_rows) == (6, 6)


def test_reference_main_writes_its_result(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coordinator.demo.reference import ReferenceResult, main

    job, out = tmp_path / "job.json", tmp_path / "out.json"
    job.write_text(spec(model_dir, steps=1, epochs=None).model_dump_json())
    monkeypatch.setattr("sys.argv", ["reference", str(job), str(out)])

    main()

    result = ReferenceResult.model_validate(json.loads(out.read_text()))
    assert result.num_steps == 1
    assert result.peak_rss_mib >= result.baseline_rss_mib > 0
