"""What holds for every method of the registry: partition invariance, identity at the start, sizes, one place each."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load, load_file, save

import edge_node.methods.registry
from coordinator.artifacts import verify
from coordinator.artifacts.assemble import assemble_adapter
from coordinator.artifacts.assemble_model import assemble_model
from coordinator.artifacts.parts import AssembleRequest
from coordinator.artifacts.verify_process import Probe, ProbeRows
from coordinator.scheduling.problem import first_trainable_stage
from edge_node.engine.generate import GenerateOptions
from edge_node.methods.registry import METHODS
from edge_node.stage.verify import part_difference
from edge_node.transport.base import Peer
from partitioner.adapter import adapter_params_of
from partitioner.model import describe_model
from plutino.errors import ConfigError
from plutino.families import family_of
from plutino.job.method import MethodConfig
from plutino.manifest import base_model_hash
from plutino.safetensors_index import read_safetensors_headers
from plutino.sizes import GIB
from tests.numerics.method_cases import CASES, CONFIGS, KEEPS_BASE, STARTS_AS_BASE
from tests.numerics.pipelines import (
    assert_same_tensors,
    make_batches,
    make_rows,
    make_spec,
    pipeline_of,
    stages_of,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ref-methods.md"
PACKAGE = Path(edge_node.methods.registry.__file__).parent
GREEDY = GenerateOptions(max_new_tokens=4, stop_tokens=())
BASE = GenerateOptions(max_new_tokens=4, stop_tokens=(), use_adapter=False)


def spec_of(model_dir, config):
    return make_spec(model_dir).model_copy(update={"method": config})


def prompts():
    return [make_rows(100, 3, num_tokens=6)]


_RESULTS: dict[tuple[str, int, bool], tuple] = {}


def result_of(model_dir, config, num_stages, *, checkpointing=False):
    """Decisions, adapter and generated tokens after three steps; kept for the other tests."""
    key = (f"{model_dir} {config.type} {config.model_dump_json()}", num_stages, checkpointing)
    if key not in _RESULTS:
        with pipeline_of(spec_of(model_dir, config), stages_of(num_stages), checkpointing=checkpointing) as pipeline:
            decisions = train(pipeline, make_batches())
            _RESULTS[key] = decisions, pipeline.state(), pipeline.generate(0, prompts(), GREEDY)
    return _RESULTS[key]


def assert_same_result(found, expected):
    assert found[0] == expected[0]
    assert expected[1]
    assert_same_tensors(found[1], expected[1])
    assert found[2] == expected[2]


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize(("method", "name"), CASES)
def test_partition_changes_no_bit_of_losses_adapter_and_tokens(model_dirs, method, name, num_stages):
    config = CONFIGS[method][name]

    whole = result_of(model_dirs["llama"], config, 1)

    assert_same_result(result_of(model_dirs["llama"], config, num_stages), whole)


@pytest.mark.parametrize("method", METHODS)
def test_partition_changes_no_bit_on_gpt2_and_training_moves_every_parameter(model_dirs, method):
    config = next(iter(CONFIGS[method].values()))
    whole = result_of(model_dirs["gpt2"], config, 1)

    assert_same_result(result_of(model_dirs["gpt2"], config, 3), whole)
    with pipeline_of(spec_of(model_dirs["gpt2"], config), stages_of(1)) as pipeline:
        start = pipeline.state()
    assert not [name for name, value in whole[1].items() if torch.equal(value, start[name])]


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_and_replicas_change_no_bit(model_dirs, method):
    config = next(iter(CONFIGS[method].values()))
    whole = result_of(model_dirs["llama"], config, 1)

    assert_same_result(result_of(model_dirs["llama"], config, 2, checkpointing=True), whole)
    replicated = stages_of(2, (2, 2), ((0, 1), (0, 1)))
    with pipeline_of(spec_of(model_dirs["llama"], config), replicated) as pipeline:
        assert train(pipeline, make_batches()) == whole[0]
        assert_same_tensors(pipeline.state(), whole[1])


@pytest.mark.parametrize(("method", "name"), KEEPS_BASE)
def test_switched_off_or_at_its_start_where_promised_a_method_is_the_base_model(model_dirs, method, name):
    spec = spec_of(model_dirs["llama"], CONFIGS[method][name])
    rows = make_batches()[0].rows
    with pipeline_of(spec, stages_of(2)) as pipeline:
        at_start = pipeline.evaluate(0, rows)
        train(pipeline, make_batches())
        trained = pipeline.evaluate(1, rows)
        tokens = pipeline.generate(2, prompts(), BASE)
        assert pipeline.evaluate(3, rows) == trained  # generation without the adapter leaves it on
        base = pipeline.evaluate(4, rows, without_adapter=True)
        assert pipeline.evaluate(6, rows) == trained
        assert tokens == pipeline.generate(5, prompts(), BASE)

    assert trained != base
    assert (at_start == base) == (method in STARTS_AS_BASE)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "name"), CASES)
def test_planner_knows_the_trained_parameters_of_every_block(model_dirs, model, method, name):
    config, folder = CONFIGS[method][name], model_dirs[model]
    values = json.loads((folder / "config.json").read_text())
    shapes = {tensor: entry.shape for tensor, entry in read_safetensors_headers(folder).items()}
    table = adapter_params_of(describe_model(values, shapes, family_of(values["model_type"])), config)

    with pipeline_of(spec_of(folder, config), stages_of(4)) as pipeline:
        found = {me.stage_index: counted(executor.method) for me, executor in pipeline.executors.items()}
        lowest = min(stage for stage, num in found.items() if num)
    expected = {stage: block.params + table.stage_params for stage, block in enumerate(table.blocks)}
    expected[0] += table.first_params
    expected[3] += table.last_params
    assert found == expected
    assert first_trainable_stage(spec_of(folder, config), stages_of(4)) == lowest


def counted(method):
    return sum(parameter.uses[0][1].numel() for parameter in method.parameters)


@pytest.mark.parametrize("method", METHODS)
def test_state_of_one_partition_starts_another(model_dirs, method):
    config = next(iter(CONFIGS[method].values()))
    _, state, tokens = result_of(model_dirs["llama"], config, 1)

    with pipeline_of(spec_of(model_dirs["llama"], config), stages_of(3)) as pipeline:
        for executor in pipeline.executors.values():
            executor.method.load(state)
        assert_same_tensors(pipeline.state(), state)
        assert pipeline.generate(0, prompts(), GREEDY) == tokens


@pytest.mark.parametrize("method", METHODS)
def test_adapter_that_does_not_fit_is_refused_and_changes_nothing(model_dirs, method):
    config = next(iter(CONFIGS[method].values()))
    with pipeline_of(spec_of(model_dirs["llama"], config), stages_of(1)) as pipeline:
        attached = pipeline.executors[Peer(0)].method
        before = attached.state()
        bad = {name: value + 1 for name, value in before.items()}
        bad[sorted(bad)[-1]] = torch.zeros(1)
        with pytest.raises(ConfigError, match=r"has shape \[1\] instead of"):
            attached.load(bad)
        with pytest.raises(ConfigError, match="is missing"):
            attached.load({})
        assert_same_tensors(attached.state(), before)


class MemoryBulk:
    """The bulk process as a dict."""

    def __init__(self):
        self.files = {}

    def put_shadow(self, job_id, shadow_id, data, sha256):
        self.files[shadow_id] = bytes(data)

    def get_shadow(self, job_id, shadow_id, sha256):
        return bytearray(self.files[shadow_id])


def export(pipeline, spec, output_dir, probe):
    """What the coordinator does with the stages' shadows, verification included."""
    bulk = MemoryBulk()
    for me, executor in pipeline.executors.items():
        bulk.files[f"stage{me.stage_index}"] = save(executor.snapshot())
    configs = {json.dumps(e.method.peft_config(), sort_keys=True) for e in pipeline.executors.values()}
    assert len(configs) == 1
    request = AssembleRequest(
        job_id="j1",
        step=3,
        shadows={name: hashlib.sha256(data).hexdigest() for name, data in bulk.files.items()},
        parameter_names=tuple(sorted({p.name for e in pipeline.executors.values() for p in e.method.parameters})),
        adapter_config_json=configs.pop(),
        output_dir=str(output_dir),
        base_hash=base_model_hash(spec.model.path),
        verify_reload_budget_bytes=GIB,
        probe=probe,
    )
    if spec.method.trains_weights:
        # A limit that cuts every stage's part into several files.
        assembled = assemble_model(request, spec, bulk, verify=verify.verify_adapter, max_shard_bytes=20_000)
        assert len(assembled.model_files) > len(pipeline.executors)
        files = [load_file(Path(assembled.staging_dir) / file) for file in assembled.model_files]
        return assembled, {name: tensor for file in files for name, tensor in file.items()}
    assembled = assemble_adapter(request, spec, bulk, verify=verify.verify_adapter)
    return assembled, load(bulk.files[assembled.shadow_id])


@pytest.mark.parametrize(("method", "name"), CASES)
def test_exported_adapter_is_reloaded_with_the_pipelines_loss_and_by_every_stage(model_dirs, tmp_path, method, name):
    spec = spec_of(model_dirs["llama"], CONFIGS[method][name])
    rows = make_batches()[0].rows
    with pipeline_of(spec, stages_of(3)) as pipeline:
        train(pipeline, make_batches())
        probe = Probe(
            micro_batches=tuple(map(ProbeRows.of, rows)),
            loss_sum=pipeline.evaluate(0, rows),
            num_counted=int(sum(each.label_mask.sum() for each in rows)),
            dtype="fp32",
        )
        assembled, published = export(pipeline, spec, tmp_path / "out", probe)
        differences = [part_difference(e.stage, e.method, published) for e in pipeline.executors.values()]

    assert differences == [0.0, 0.0, 0.0]
    assert assembled.was_reloaded
    (outcome,) = (text for check, text in assembled.checks if check == "reload")
    assert "too little" not in outcome


def test_a_method_is_one_file_one_line_and_one_row():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    rows = re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), flags=re.MULTILINE)
    configs = [member.model_fields["type"].default for member in get_args(get_args(MethodConfig)[0])]

    assert sorted(METHODS) == sorted(configs) == sorted(rows) == sorted(CONFIGS)
    assert set(METHODS) <= files
    lines = (PACKAGE / "registry.py").read_text().splitlines()
    assert all(sum(f'"{method}":' in line for line in lines) == 1 for method in METHODS)
