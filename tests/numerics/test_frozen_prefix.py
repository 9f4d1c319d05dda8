"""Methods that train in upper blocks alone: what lies below is computed once, and later epochs have the same bits."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from edge_node.activation_cache.stage_cache import StageCache
from edge_node.activation_cache.store import ActivationStore
from edge_node.engine.freezing import block_of_use
from edge_node.engine.stage_input import first_stage_input
from edge_node.methods.registry import METHODS
from edge_node.stage.build import build_stage
from edge_node.stage.weights import LocalSource
from edge_node.transport.base import MessageKind
from plutino.families import EMBEDDING_NAMES
from plutino.job.method import AdaptersConfig, LoraConfig
from tests.numerics.method_cases import CONFIGS
from tests.numerics.pipelines import (
    TARGETS,
    assert_same_tensors,
    make_batches,
    make_spec,
    padded,
    pipeline_of,
    stages_of,
    train,
)
from tests.numerics.tiny_families import CONFIGS as FAMILIES
from tests.numerics.tiny_families import ENCODERS, save_model

PLACE, NUM_BLOCKS, EPOCHS = 2, 4, 3
MIB = 1 << 20


def upper_lora(model="llama", **method):
    return LoraConfig(rank=4, target_modules=TARGETS.get(model, "all-linear"), blocks="last 2", **method)


METHOD_CASES = {
    "lora": upper_lora(dropout=0.1),
    "dora": upper_lora(use_dora=True),
    "head": upper_lora(modules_to_save=("lm_head",)),
    "adapters": AdaptersConfig(bottleneck=4, placement="houlsby", blocks="2-3"),
}


def spec_of(folder, method):
    spec = make_spec(folder)
    cached = spec.training.model_copy(update={"activation_cache": "raw"})
    return spec.model_copy(update={"method": method, "training": cached})


class Watched:
    """What the blocks and the links of a pipeline do in an epoch."""

    def __init__(self, pipeline):
        self.block_runs, self.floats, self.gradients = Counter(), Counter(), Counter()
        for me, executor in pipeline.executors.items():
            stage, send = executor.stage, executor.transport.send
            for block in range(stage.start_block, stage.end_block):
                module = stage.model.get_submodule(f"{stage.family.block_prefix}{block}")
                module.register_forward_hook(lambda *_, block=block: self.block_runs.update([block]))

            def watching(peer, key, tensors, me=me, send=send, **options):
                if key.kind == MessageKind.FORWARD:
                    floats = sum(t.numel() for t in tensors.values() if t.is_floating_point())
                    self.floats[me.stage_index] += floats
                self.gradients[me.stage_index] += key.kind == MessageKind.BACKWARD
                return send(peer, key, tensors, **options)

            executor.transport.send = watching

    def take(self):
        """Runs by block, floats sent up and gradients sent down by stage, since the last time."""
        found = dict(self.block_runs), +self.floats, +self.gradients
        self.block_runs, self.floats, self.gradients = Counter(), Counter(), Counter()
        return found


def epochs(spec, num_stages, root, *, budget_bytes=64 * MIB, between=lambda: None, num=EPOCHS, **options):
    """Decisions by epoch, adapter, what was watched by epoch, the stages' caches."""
    caches, store = [], ActivationStore(root, budget_bytes)

    def cache_of(stage):
        caches.append(StageCache(store, "tiny", stage, "raw"))
        return caches[-1]

    batches, decisions, seen = make_batches(num_steps=2), [], []
    with pipeline_of(spec, stages_of(num_stages), activation_cache=cache_of, **options) as pipeline:
        watched = Watched(pipeline)
        for epoch in range(num):
            decisions.append(train(pipeline, batches, first_step=epoch * len(batches)))
            seen.append(watched.take())
            between()
        state = pipeline.state()
    for cache in caches:
        cache.close()
    return decisions, state, seen, caches


def assert_as_uncached(found, spec, num_stages=1, **options):
    batches = make_batches(num_steps=2)
    plain = spec.model_copy(update={"training": spec.training.model_copy(update={"activation_cache": "off"})})
    with pipeline_of(plain, stages_of(num_stages), **options) as pipeline:
        decisions = [train(pipeline, batches, first_step=epoch * 2) for epoch in range(len(found[0]))]
        state = pipeline.state()
    assert found[0] == decisions
    assert_same_tensors(found[1], state)


# With 4 stages the place is a border, with 2 and 1 it is inside a stage.
@pytest.mark.parametrize(
    ("model", "num_stages"),
    [
        pytest.param("llama", 1, marks=pytest.mark.slow),
        ("llama", 2),
        pytest.param("llama", 4, marks=pytest.mark.slow),
        ("gpt2", 1),
    ],
)
def test_cached_epochs_run_nothing_below_the_lowest_trained_block_and_have_the_bits_of_uncached_ones(
    model_dirs, tmp_path, model, num_stages
):
    spec = spec_of(model_dirs[model], upper_lora(model, dropout=0.1))

    found = epochs(spec, num_stages, tmp_path)

    assert_as_uncached(found, spec)
    first, *later = found[2]
    assert set(first[0]) == {0, 1, 2, 3}
    assert all(runs == {2: first[0][2], 3: first[0][3]} for runs, _, _ in later)
    lowest = next(i for i, stage in enumerate(stages_of(num_stages)) if stage.end_block > PLACE)
    for _, _, gradients in found[2]:
        assert set(gradients) == set(range(lowest + 1, num_stages))
    for _, floats, _ in later:
        assert set(floats) == set(range(lowest, num_stages - 1))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dora", "head", "adapters"])
def test_every_kind_of_method_in_upper_blocks_finds_its_prefix_again(model_dirs, tmp_path, case):
    spec = spec_of(model_dirs["llama"], METHOD_CASES[case])

    found = epochs(spec, 2, tmp_path, num=2)

    assert_as_uncached(found, spec)
    assert set(found[2][1][0]) == {2, 3}


def test_entries_of_one_job_serve_another_method_and_other_cuts(model_dirs, tmp_path):
    epochs(spec_of(model_dirs["llama"], upper_lora()), 4, tmp_path, num=1)
    spec = spec_of(model_dirs["llama"], METHOD_CASES["adapters"])

    found = epochs(spec, 1, tmp_path, num=1)

    assert_as_uncached(found, spec)
    assert set(found[2][0][0]) == {2, 3}


@pytest.mark.parametrize(("first", "then"), [pytest.param(1, 4, marks=pytest.mark.slow), (4, 1)])
def test_border_in_bf16_at_the_place_is_rounded_once_inside_a_stage_and_between_two(model_dirs, tmp_path, first, then):
    spec = spec_of(model_dirs["llama"], upper_lora())
    options = {"bf16_borders": (1, PLACE), "num": 1}
    epochs(spec, first, tmp_path, **options)

    found = epochs(spec, then, tmp_path, **options)

    assert_as_uncached(found, spec, bf16_borders=(1, PLACE))
    assert set(found[2][0][0]) == {2, 3}


def test_rows_without_room_and_damaged_ones_are_computed_again(model_dirs, tmp_path):
    spec = spec_of(model_dirs["llama"], upper_lora())

    def damage():
        path = tmp_path / "whole" / "tiny" / f"h{PLACE}.data"
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        with path.open("r+b") as file:  # in place, so that whoever mapped it sees it
            file.write(data)

    damaged = epochs(spec, 2, tmp_path / "whole", between=damage, num=2)
    tight = epochs(spec, 2, tmp_path / "tight", budget_bytes=4_000, num=2)

    for found in (damaged, tight):
        assert_as_uncached(found, spec)
        assert 0 < found[2][1][0][0] < found[2][0][0][0]
    assert [sum(cache.num_damaged for cache in found[3]) for found in (damaged, tight)] == [1, 0]
    assert all(sum(cache.counts.rows_written for cache in found[3]) for found in (damaged, tight))
    assert sum(cache.counts.rows_left_out for cache in tight[3]) > 0


@pytest.mark.slow
def test_experts_see_the_padding_that_they_saw(tmp_path):
    folder = save_model("qwen3_moe", tmp_path / "model")
    spec = spec_of(folder, LoraConfig(rank=4, target_modules=("q_proj",), blocks="last 2"))

    found = epochs(spec, 1, tmp_path / "cache", num=2)

    assert_as_uncached(found, spec)
    assert set(found[2][1][0]) == {2, 3}


QUICK_FAMILIES = ("bert", "bloom", "opt")


@pytest.mark.parametrize(
    "family",
    [
        *QUICK_FAMILIES,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in {**FAMILIES, **ENCODERS}
            if name not in QUICK_FAMILIES
        ),
    ],
)
def test_pass_from_the_kept_place_gives_what_the_whole_pass_gave(tmp_path, family):
    folder = save_model(family, tmp_path)
    stage = build_stage(LocalSource(folder), 0, NUM_BLOCKS, dtype=torch.float32, has_lm_head=family not in ENCODERS)
    stage.keep_below(PLACE)
    inputs, _ = first_stage_input(stage, make_batches(1)[0].rows[0], 0)
    below = Counter()
    for block in range(PLACE):
        module = stage.model.get_submodule(f"{stage.family.block_prefix}{block}")
        module.register_forward_hook(lambda *_: below.update(["runs"]))

    with torch.no_grad():
        whole = stage.run(inputs)
        known = stage.run_known(replace(inputs, input_ids=None, token_types=None), whole.states)
        again = stage.run(inputs)

    assert torch.equal(known.hidden, whole.hidden)
    assert torch.equal(again.hidden, whole.hidden)
    assert below["runs"] == 2 * PLACE


@pytest.mark.parametrize("method", METHODS)
def test_methods_say_rightly_whether_they_leave_lower_blocks_alone(model_dirs, method):
    config = next(iter(CONFIGS[method].values()))
    cases = [config]
    if "blocks" in type(config).model_fields:
        cases.append(config.model_copy(update={"blocks": "last 2"}))
    for case in cases:
        spec = make_spec(model_dirs["llama"]).model_copy(update={"method": case})
        with pipeline_of(spec, stages_of(1)) as pipeline:
            (executor,) = pipeline.executors.values()
            blocks = [
                block_of_use(p.name, role, executor.stage.family)
                for p in executor.method.parameters
                for role, _ in p.uses
            ]
        lowest = case.lowest_trained_block(NUM_BLOCKS, EMBEDDING_NAMES)
        if not case.leaves_blocks_alone:
            assert lowest == min((block for block in blocks if block is not None), default=0)
        assert case.may_freeze_blocks(EMBEDDING_NAMES) == (lowest > 0)


def test_stock_peft_loads_an_adapter_of_the_last_blocks_into_those_alone(model_dirs, tmp_path):
    config = upper_lora()
    with pipeline_of(spec_of(model_dirs["llama"], config), stages_of(2)) as pipeline:
        train(pipeline, make_batches())
        saved = next(iter(pipeline.executors.values())).method.peft_config()
        state = pipeline.state()
        rows = make_batches(1)[0].rows
        expected = pipeline.evaluate(0, rows)
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    save_file(state, tmp_path / "adapter_model.safetensors")

    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    found = 0.0
    for each in rows:
        ids, labels, mask = padded(each)
        with torch.no_grad():
            logits = loaded(input_ids=ids, attention_mask=mask).logits
        found += float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))

    assert saved["layers_to_transform"] == [2, 3]
    adapted = {name.split(".layers.")[1][0] for name, _ in loaded.named_parameters() if "lora_" in name}
    assert adapted == {"2", "3"}
    assert found == pytest.approx(expected, rel=1e-6)
