"""Assembling with a bulk store and a verification that are fakes: staging, refusals, what is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from coordinator.artifacts.assemble import assemble_adapter
from coordinator.artifacts.parts import AssembledAdapter, AssembleRequest
from coordinator.artifacts.verify_process import VerifyReport, VerifyRequest
from plutino.errors import ConfigError, ExportError
from plutino.job.spec import JobSpec
from plutino.manifest import base_model_hash

NAMES = [f"base_model.model.model.layers.{block}.self_attn.q_proj.lora_{ab}.weight" for block in (0, 5) for ab in "AB"]
PARAMETERS = {name: np.full((2, 3), index, np.float32) for index, name in enumerate(NAMES)}


def accept(request: VerifyRequest) -> VerifyReport:
    return VerifyReport(checks=(("stock peft", "equal"),))


def request_for(bulk: Any, spec: JobSpec, output_dir: Path, **changes: Any) -> AssembleRequest:
    halves = (dict(list(PARAMETERS.items())[:2]), dict(list(PARAMETERS.items())[2:]))
    shadows = {f"step9-epoch0-stage{stage}-0": part for stage, part in enumerate(halves)}
    values: dict[str, Any] = {
        "job_id": "j1",
        "step": 9,
        "shadows": {name: bulk.put_part(name, part) for name, part in shadows.items()},
        "parameter_names": tuple(NAMES),
        "adapter_config_json": '{"r": 2, "peft_type": "LORA"}',
        "output_dir": str(output_dir),
        "base_hash": base_model_hash(spec.model.path),
    }
    return AssembleRequest.model_validate(values | changes)


def test_assemble_stages_the_joined_file_and_hands_it_to_the_workers(bulk: Any, spec: JobSpec, tmp_path: Path) -> None:
    request = request_for(bulk, spec, tmp_path / "out")

    result = assemble_adapter(request, spec, bulk, verify=accept)

    staged = (Path(result.staging_dir) / "adapter_model.safetensors").read_bytes()
    assert staged == save(PARAMETERS, {"format": "pt"}) == bulk.files[result.shadow_id]
    assert result.shadow_id.startswith("adapter-step9-")
    assert [name for name, _ in result.checks] == ["base model", "joined parts", "stock peft"]
    assert Path(result.staging_dir).parent == tmp_path and not (tmp_path / "out").exists()


def test_assemble_config_gets_the_base_and_peft_formatting(bulk: Any, spec: JobSpec, tmp_path: Path) -> None:
    result = assemble_adapter(request_for(bulk, spec, tmp_path / "out"), spec, bulk, verify=accept)

    text = (Path(result.staging_dir) / "adapter_config.json").read_text()
    wanted = {"r": 2, "peft_type": "LORA", "base_model_name_or_path": spec.model.path}
    assert text == json.dumps(wanted, indent=2, sort_keys=True)


def test_assemble_again_overwrites_its_own_staging(bulk: Any, spec: JobSpec, tmp_path: Path) -> None:
    request = request_for(bulk, spec, tmp_path / "out")
    first = assemble_adapter(request, spec, bulk, verify=accept)
    (Path(first.staging_dir) / "leftover").touch()

    second = assemble_adapter(request, spec, bulk, verify=accept)

    assert second == first
    assert {path.name for path in Path(second.staging_dir).iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_assemble_messages_round_trip_as_json(bulk: Any, spec: JobSpec, tmp_path: Path) -> None:
    request = request_for(bulk, spec, tmp_path / "out")
    result = assemble_adapter(request, spec, bulk, verify=accept)

    assert AssembleRequest.model_validate_json(request.model_dump_json()) == request
    assert AssembledAdapter.model_validate_json(result.model_dump_json()) == result


def test_assemble_head_tied_to_a_trained_embedding_is_saved_under_both_keys(
    bulk: Any, spec: JobSpec, tmp_path: Path
) -> None:
    embedding = "base_model.model.model.embed_tokens.weight"
    method = spec.method.model_copy(update={"modules_to_save": ("lm_head",), "ensure_weight_tying": True})
    value = np.ones((5, 2), np.float32)
    shadows = {f"stage{stage}": bulk.put_part(f"stage{stage}", {embedding: value}) for stage in (0, 2)}
    request = request_for(bulk, spec, tmp_path / "out", shadows=shadows, parameter_names=(embedding,))

    result = assemble_adapter(request, spec.model_copy(update={"method": method}), bulk, verify=accept)

    assert set(load(bulk.files[result.shadow_id])) == {embedding, "base_model.model.lm_head.weight"}


def _corrupt(bulk: Any) -> dict[str, Any]:
    bulk.files["step9-epoch0-stage1-0"] = bulk.files["step9-epoch0-stage1-0"][:-1] + b"!"
    return {}


def _missing_name(bulk: Any) -> dict[str, Any]:
    return {"parameter_names": (*NAMES, "base_model.model.model.norm.weight")}


def _other_base(bulk: Any) -> dict[str, Any]:
    return {"base_hash": "0" * 64}


def _no_config(bulk: Any) -> dict[str, Any]:
    return {"adapter_config_json": "[1, 2]"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_corrupt, "part step9-epoch0-stage1-0 of job j1 cannot be used: .* has sha256"),
        (_missing_name, "lack 1 of 5 parameters, first base_model.model.model.norm.weight"),
        (_other_base, "was trained on 000000000000"),
        (_no_config, "config is not a JSON mapping"),
    ],
)
def test_assemble_with_a_fault_is_refused_and_leaves_nothing(
    fault: Any, message: str, bulk: Any, spec: JobSpec, tmp_path: Path
) -> None:
    request = request_for(bulk, spec, tmp_path / "out")
    request = request.model_copy(update=fault(bulk))

    with pytest.raises(ExportError, match=message) as caught:
        assemble_adapter(request, spec, bulk, verify=accept)

    assert "nothing was published" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_assemble_that_fails_verification_leaves_nothing_and_gives_workers_nothing(
    bulk: Any, spec: JobSpec, tmp_path: Path
) -> None:
    def refuse(request: VerifyRequest) -> VerifyReport:
        raise ExportError("peft expects F32 [4, 256]; nothing was published")

    with pytest.raises(ExportError, match="peft expects"):
        assemble_adapter(request_for(bulk, spec, tmp_path / "out"), spec, bulk, verify=refuse)

    assert list(tmp_path.iterdir()) == []
    assert not [name for name in bulk.files if name.startswith("adapter")]


def test_assemble_towards_a_foreign_folder_is_refused_before_any_work(bulk: Any, spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    request = request_for(bulk, spec, tmp_path / "out", shadows={})

    with pytest.raises(ConfigError, match=r"out is no result of plutino \(it holds thesis.tex\)"):
        assemble_adapter(request, spec, bulk, verify=accept)


def test_assembling_and_publishing_import_no_torch() -> None:
    code = "import sys, coordinator.artifacts.assemble; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], timeout=50).returncode == 0
