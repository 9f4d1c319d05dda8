"""The benchmarks' workload as plutino takes it: a model folder, rows in a file, a job.

The rows are such that step n of the job trains on exactly the tokens of :func:`benchmarks.peers.workload.batch` for n.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks.peers.workload import END_TOKEN, Workload, batch, build_base, build_model
from edge_node.stage.random_source import RandomSource
from plutino.data.batches import batch_indices
from plutino.random_weights import RANDOM_FILE

DtypeName = Literal["fp32", "bf16"]
_DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What a job reads."""

    model_dir: Path
    rows_path: Path
    num_steps: int
    """Steps that the rows are enough for."""
    adapter_dir: Path | None = None
    """The peers' own initial adapters; None: the job draws its own."""


def write_with_adapter(workload: Workload, folder: Path, *, num_steps: int) -> ModelFolder:
    """The very model that the peers build, bf16, with its initial adapters beside it."""
    model = build_model(workload)
    model_dir, adapter_dir = folder / "model", folder / "adapter"
    model.save_pretrained(str(adapter_dir))
    model.unload().save_pretrained(str(model_dir))
    write_tokenizer(workload, model_dir)
    rows_path = write_rows(workload, folder / "rows.jsonl", num_steps=num_steps)
    return ModelFolder(model_dir=model_dir, rows_path=rows_path, num_steps=num_steps, adapter_dir=adapter_dir)


def write_base(workload: Workload, folder: Path, *, num_steps: int, dtype: DtypeName) -> ModelFolder:
    """The model alone, its weights stored as this dtype."""
    model_dir = folder / "model"
    build_base(workload, _DTYPES[dtype]).save_pretrained(str(model_dir))
    write_tokenizer(workload, model_dir)
    rows_path = write_rows(workload, folder / "rows.jsonl", num_steps=num_steps)
    return ModelFolder(model_dir=model_dir, rows_path=rows_path, num_steps=num_steps)


def write_drawn_base(workload: Workload, folder: Path, *, num_steps: int) -> ModelFolder:
    """The model without weights: workers draw them when they load, so that no size costs disk."""
    model_dir = folder / "model"
    model_dir.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": workload.hidden_dim,
        "intermediate_size": workload.intermediate_dim,
        "num_hidden_layers": workload.num_blocks,
        "num_attention_heads": workload.num_heads,
        "num_key_value_heads": workload.num_heads,
        "vocab_size": workload.vocab_size,
        "max_position_embeddings": workload.seq_len_tokens,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END_TOKEN,
        "pad_token_id": END_TOKEN,
    }
    (model_dir / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shapes = RandomSource(config)
    drawn = {"seed": workload.seed, "dtype": "BF16", "shapes": {name: shapes.shape(name) for name in shapes.names()}}
    (model_dir / RANDOM_FILE).write_text(json.dumps(drawn), encoding="utf-8")
    write_tokenizer(workload, model_dir)
    rows_path = write_rows(workload, folder / "rows.jsonl", num_steps=num_steps)
    return ModelFolder(model_dir=model_dir, rows_path=rows_path, num_steps=num_steps)


def write_rows(workload: Workload, path: Path, *, num_steps: int) -> Path:
    """Rows laid out so that the job's data order brings step n the workload's batch n."""
    num_rows = num_steps * workload.batch_size
    lines = [""] * num_rows
    for step in range(num_steps):
        positions = batch_indices(step, workload.batch_size, num_rows, workload.seed)
        for position, ids in zip(positions, batch(workload, step).tolist(), strict=True):
            lines[position] = json.dumps(_row(ids))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def job_values(
    workload: Workload,
    folder: ModelFolder,
    *,
    dtype: DtypeName,
    checkpointing: Literal["on", "off"] = "off",
    shadow_every: int,
    num_stages: int,
) -> dict[str, Any]:
    """Values of the job that trains what the peers train: the same optimiser, no clipping, loss on every token."""
    assert workload.batch_size % workload.num_micro_batches == 0
    return {
        "name": "benchmark",
        "model": {"path": str(folder.model_dir), "dtype": dtype},
        "method": {
            "type": "lora",
            "rank": workload.lora_rank,
            "alpha": 2 * workload.lora_rank,
            "target_modules": "all-linear",
        },
        "objective": {"type": "sft", "train_on": "all"},
        "data": {"train": str(folder.rows_path), "max_tokens": workload.seq_len_tokens},
        "training": {
            "steps": folder.num_steps,
            "batch_size": workload.batch_size,
            "micro_batch_size": workload.batch_size // workload.num_micro_batches,
            "lr": workload.lr,
            "lr_schedule": "constant",
            "weight_decay": 0.01,  # torch's default, which the peers use
            "max_grad_norm": None,
            "seed": workload.seed,
            "checkpointing": checkpointing,
            "init_adapter": None if folder.adapter_dir is None else str(folder.adapter_dir),
            "shadow_every": shadow_every,
        },
        "placement": {"stages": num_stages, "threads": 1, "replan": "never"},
    }


def _row(ids: list[int]) -> dict[str, str]:
    """A row that encodes to these ids: the tokenisation itself puts the end token behind it."""
    assert ids[-1] == END_TOKEN
    prompt, *completion = (f"t{token}" for token in ids[:-1])
    return {"prompt": prompt, "completion": "".join(f" {word}" for word in completion)}


def write_tokenizer(workload: Workload, model_dir: Path) -> None:
    """A tokenizer whose words are the numbers of its tokens."""
    end = f"t{END_TOKEN}"
    words = {f"t{token}": token for token in range(workload.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=end))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(model_dir / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end, "unk_token": end}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
