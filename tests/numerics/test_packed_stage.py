"""Stages whose frozen weights are packed: what is held, what is trained, what is exported."""

from __future__ import annotations

import shutil
from itertools import pairwise

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from edge_node.cache import BlobCache
from edge_node.methods.lora import attach_lora
from edge_node.quantize.embedding import QuantEmbedding
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.registry import SCHEMES
from edge_node.quantize.workspace import TILE_ELEMENTS
from edge_node.stage.build import build_stage
from edge_node.stage.pack_model import pack_model
from edge_node.stage.packed_cache import PackedBlobs, ShippedMatrices
from edge_node.stage.weights import CONVERSION_BYTES, LocalSource
from partitioner import packed as planned
from partitioner.adapter import adapter_params_of
from partitioner.model import describe_model
from partitioner.packed import WeightSizes
from partitioner.shape import JobShape
from plutino.errors import ModelError, QuantizationError
from plutino.families import family_of
from plutino.job.method import LoraConfig
from plutino.job.model import Packing
from plutino.safetensors_index import read_safetensors_headers
from tests.numerics.chain import build_chain, frozen_chain, make_batch, run_chain
from tests.numerics.pipelines import make_batches, make_spec, pipeline_of, stages_of, train
from tests.numerics.tiny_families import CONFIGS, save_model
from tests.sampling import sampled

FAMILIES = ("llama", "gpt2")
OUTER = {"embedding": "int8", "head": "int8"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Models wide enough for int4's groups of 128."""
    models = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=61,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=False,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=None,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=61,
                n_embd=128,
                n_layer=4,
                n_head=4,
                n_positions=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=None,
            )
        ),
    }
    found = {}
    for name, make in models.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(found[name])
    return found


def logits_of(folder, num_stages, family, **packing):
    chain = frozen_chain(folder, num_stages, packing=Packing(**packing))
    return run_chain(chain, make_batch("right", family=family))[0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_split_equals_packed_whole_to_the_bit(folders, family, scheme):
    whole, two, three = (logits_of(folders[family], n, family, scheme=scheme, **OUTER) for n in (1, 2, 3))
    plain = logits_of(folders[family], 1, family)

    assert torch.equal(whole, two) and torch.equal(whole, three)
    assert 0 < (whole - plain).norm() / plain.norm() < 0.3


@pytest.mark.parametrize(
    "name", sampled(sorted(CONFIGS.keys() - {"qwen3_moe", "llama", "gpt2"}), 4, always=("falcon",))
)
def test_packed_split_equals_packed_whole_in_every_family(name, tmp_path):
    folder = save_model(name, tmp_path)
    family = LocalSource(folder).config()["model_type"]
    chains = [build_chain(folder, n, packing=Packing(scheme="int8", head="int8"), attention=None) for n in (1, 3)]

    one, three = (run_chain(chain, make_batch("right", family=family))[0] for chain in chains)

    assert torch.equal(one, three)
    linears = [chains[0][0].model.get_submodule(linear) for linear in chains[0][0].block_linears]
    assert all(isinstance(linear, QuantLinear) for linear in linears)


def test_packed_experts_are_refused_with_the_way_out(tmp_path):
    source = LocalSource(save_model("qwen3_moe", tmp_path))

    with pytest.raises(QuantizationError, match=r"experts lie fused; set model\.quantization: none"):
        build_stage(source, 0, 4, dtype=torch.float32, packing=Packing(scheme="int8"))

    assert source.bytes_read == 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_stage_holds_no_weight_of_a_linear_unpacked(folders, family, scheme):
    stage = frozen_chain(folders[family], 1, packing=Packing(scheme=scheme, **OUTER))[0]

    own = {name for name, module in stage.model.named_modules() if isinstance(module, QuantLinear)}
    assert own == {*stage.block_linears, "lm_head"}
    assert all(p.dim() == 1 for name, p in stage.model.named_parameters() if not name.endswith("wpe.weight"))


def planned_sizes(folder, family, packing):
    source = LocalSource(folder)
    shapes = {name: entry.shape for name, entry in read_safetensors_headers(folder).items()}
    table = describe_model(source.config(), shapes, family_of(family))
    shape = JobShape(
        dtype="fp32",
        packing=packing,
        batch_rows=1,
        micro_batch_rows=1,
        row_tokens=8,
        label_tokens=1,
        **adapter_params_of(table, LoraConfig()).shape_fields,
    )
    return WeightSizes(table, shape)


@pytest.mark.parametrize("outer", [{}, OUTER], ids=["keep", "int8"])
@pytest.mark.parametrize("scheme", [*SCHEMES, "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_planner_counts_the_bytes_that_stages_hold_exactly(folders, family, scheme, outer):
    packing = Packing(scheme=scheme, **outer)
    sizes = planned_sizes(folders[family], family, packing)
    for num_stages in (1, 3):
        chain = frozen_chain(folders[family], num_stages, packing=packing)
        for stage in chain:
            ends = {"is_first": stage.is_first, "is_last": stage.is_last}
            blocks = np.asarray(stage.start_block), np.asarray(stage.end_block)
            packed = [m for m in stage.model.modules() if isinstance(m, QuantLinear | QuantEmbedding)]
            storages = {t.data_ptr(): t.nbytes for module in packed for t in module.packed.values()}
            plain = {p.data_ptr(): p.numel() for p in stage.model.parameters()}

            assert int(sizes.packed_bytes(*blocks, **ends)) == sum(storages.values())
            assert int(sizes.plain_params(*blocks, **ends)) == sum(plain.values())


def test_planner_and_stages_agree_on_tile_and_conversion_sizes():
    assert planned.UNPACK_TILE_PARAMS == TILE_ELEMENTS
    assert planned.CONVERSION_BYTES == CONVERSION_BYTES


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_lora_matrix_of_every_stage_gets_a_gradient_and_the_loss_falls(folders, family, scheme):
    spec = make_spec(folders[family], target_modules="all-linear")
    batch = make_batches(1)[0]
    with pipeline_of(spec, stages_of(3), packing=Packing(scheme=scheme, **OUTER)) as pipeline:
        losses = [decision.loss for decision in train(pipeline, [batch] * 4)]
        outcomes = pipeline.train_step(4, batch.rows, batch.loss_weight)

    silent = [
        parameter.name
        for me, outcome in outcomes.items()
        for parameter, norm in zip(pipeline.executors[me].method.parameters, outcome.squared_norms, strict=True)
        if norm == 0.0
    ]
    assert not silent
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_training_is_the_same_in_every_partition_to_the_bit(folders, scheme):
    spec = make_spec(folders["llama"])
    runs = []
    for num_stages in (1, 3):
        with pipeline_of(spec, stages_of(num_stages), packing=Packing(scheme=scheme), checkpointing=True) as pipeline:
            runs.append(train(pipeline, make_batches()))

    assert runs[0] == runs[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_of_a_packed_stage_loads_with_stock_peft_on_the_unquantised_base(folders, family, tmp_path):
    packing = Packing(scheme="int8")
    states, config = {}, {}
    for start, end in pairwise((0, 2, 4)):
        stage = build_stage(LocalSource(folders[family]), start, end, dtype=torch.float32, packing=packing)
        method = attach_lora(stage, LoraConfig(rank=4), seed=0)
        with torch.no_grad():
            for parameter in method.parameters:
                parameter.uses[0][1].normal_(0, 0.1)
        states |= method.state()
        config = method.peft_config()
    save_file(states, tmp_path / "adapter_model.safetensors")
    peft.LoraConfig(**config).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folders[family])

    model = peft.PeftModel.from_pretrained(base, str(tmp_path))

    loaded = peft.get_peft_model_state_dict(model)
    assert loaded.keys() == states.keys()
    assert all(torch.equal(loaded[name], states[name]) for name in states)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_cache_gives_the_second_job_the_same_bits_without_reading(folders, scheme, tmp_path):
    cache = PackedBlobs(BlobCache(tmp_path), "hash of the base")
    packing = Packing(scheme=scheme, **OUTER)
    first, second = (build_chain(folders["gpt2"], 1, packing=packing, cache=cache)[0] for _ in range(2))

    linears = {name for name, module in second.model.named_modules() if isinstance(module, QuantLinear)}
    assert all(
        torch.equal(tensor, second.model.get_submodule(name).packed[key])
        for name in linears
        for key, tensor in first.model.get_submodule(name).packed.items()
    )
    assert not [name for name in second.tensor_names_read if name.endswith(("c_attn.weight", "c_fc.weight"))]
    assert second.bytes_read < first.bytes_read / 5
    other_base = PackedBlobs(BlobCache(tmp_path), "hash of another base")
    assert other_base.load(next(iter(linears)), scheme) is None


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_model_packed_elsewhere_gives_the_stages_the_bits_that_they_would_have_packed(
    folders, family, scheme, tmp_path
):
    packing = Packing(scheme=scheme, **OUTER)
    packed_dir = tmp_path / "packed"
    packed_dir.mkdir()
    told = list(pack_model(LocalSource(folders[family]), packing, packed_dir))
    assert told == [(block, 4) for block in (1, 2, 3, 4)]

    for here in build_chain(folders[family], 3, packing=packing):
        # A device that has packed nothing itself.
        cache = ShippedMatrices(PackedBlobs(BlobCache(tmp_path / "cache", budget_bytes=0), "base"), Shipped(packed_dir))
        source = LocalSource(folders[family])
        there = build_stage(source, here.start_block, here.end_block, dtype=here.dtype, packing=packing, cache=cache)
        found, expected = there.model.state_dict(), here.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        # Norms, biases and positions alone were read as they are stored.
        assert not [name for name in there.tensor_names_read if name.endswith(("proj.weight", "wte.weight"))]
        assert there.bytes_read < here.bytes_read / 5


class Shipped(LocalSource):
    """A folder of packed tensors, asked for as those of a worker are."""

    def config(self):
        return {}

    def prepare(self, names):
        for name in names:
            self.shape(name)


def test_packed_cache_flipped_byte_is_packed_anew(folders, tmp_path):
    blobs = BlobCache(tmp_path)
    cache = PackedBlobs(blobs, "base")
    packing = Packing(scheme="int8")
    whole = build_chain(folders["llama"], 1, packing=packing, cache=cache)[0]
    for path in (tmp_path / "blobs").glob("*/*"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    again = build_chain(folders["llama"], 1, packing=packing, cache=cache)[0]

    name = whole.block_linears[-1]
    assert torch.equal(again.model.get_submodule(name).codes, whole.model.get_submodule(name).codes)


def test_packed_cache_without_room_costs_this_job_nothing(folders, tmp_path):
    cache = PackedBlobs(BlobCache(tmp_path, budget_bytes=10), "base")

    stage = build_chain(folders["llama"], 1, packing=Packing(scheme="int8"), cache=cache)[0]

    assert isinstance(stage.model.get_submodule(stage.block_linears[0]), QuantLinear)


def test_missing_tensors_are_refused_before_anything_is_packed(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.down_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    source = LocalSource(folder)

    with pytest.raises(ModelError, match=r"lacks 2 of the stage's .* model\.norm\.weight.*down_proj"):
        build_stage(source, 0, 4, dtype=torch.float32, packing=Packing(scheme="int8"))

    assert source.bytes_read == 0


def test_weight_that_is_not_finite_is_refused_with_the_layers_name(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors")

    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj cannot be held in int8.*not finite"):
        build_stage(LocalSource(folder), 0, 4, dtype=torch.float32, packing=Packing(scheme="int8"))


def test_gptq_asked_of_an_unquantised_model_is_refused_with_the_way_out(folders):
    with pytest.raises(ModelError, match=r"needs a GPTQ checkpoint, and config\.json names none; choose nf4"):
        build_stage(LocalSource(folders["llama"]), 0, 4, dtype=torch.float32, packing=Packing(scheme="gptq"))
