"""The yardstick that plutino is measured with: the same job in ONE process of plain transformers and peft.

``python -m coordinator.demo.reference SPEC OUT.json`` trains SPEC (a job file) on this machine and writes what it
measured. Rows, their order and the padding come from plutino.data; model, method, loss, optimiser and generation are
the libraries' own, used as their documentation recommends. Initial adapters are peft's, so losses agree with plutino's
in course, not in digits; method.type: full is plain transformers. Placement settings other than ``threads`` do not
apply, nor do evaluation during training, keep_best and early stopping.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import peft
import torch
import transformers
from pydantic import BaseModel, ConfigDict

from coordinator.jobs.scoring import Score, score
from plutino.data.batches import (
    MicroBatchRows,
    batch_indices,
    cut_micro_batches,
    prompt_micro_batch,
    sequential_indices,
    total_steps,
)
from plutino.data.readers import read_rows
from plutino.data.samples import Samples
from plutino.data.tokenisation import tokenise
from plutino.data.tokenizer import ModelTokenizer, load_tokenizer
from plutino.errors import ConfigError
from plutino.job.blocks import chosen_blocks
from plutino.job.data import ScoringConfig
from plutino.job.method import FullConfig, LoraConfig, PrefixConfig, PromptConfig, PTuningV2Config
from plutino.job.spec import JobSpec, load_spec

if TYPE_CHECKING:
    from torch import Tensor

_IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default


class ReferenceResult(BaseModel):
    """What one process of plain transformers and peft needed and reached."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    losses: tuple[float, ...]
    """Mean loss per label token of each step."""
    before: Score | None
    after: Score | None
    train_s: float
    """Seconds from the first step to the last."""
    total_s: float
    """Seconds from reading the data to the last score; imports are not in it."""
    train_tokens_per_s: float
    """Tokens of the rows, without padding, per second of training."""
    num_steps: int
    num_train_rows: int
    mean_row_tokens: float
    trainable_parameters: int
    threads: int
    dtype: str
    baseline_rss_mib: float
    """Peak resident memory after imports, before the job."""
    peak_rss_mib: float
    versions: dict[str, str]


def main() -> None:
    """Run the job of the command line and write its result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("spec", type=Path, help="job file (YAML or JSON)")
    parser.add_argument("out", type=Path, help="where the result goes, as JSON")
    arguments = parser.parse_args()
    result = run_reference(load_spec(arguments.spec))
    arguments.out.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    summary = {"before": result.before, "after": result.after}
    scores = {when: None if value is None else round(value.headline, 4) for when, value in summary.items()}
    print(json.dumps({**scores, "train_s": round(result.train_s, 2), "last_loss": round(result.losses[-1], 4)}))


def run_reference(spec: JobSpec) -> ReferenceResult:
    """Train and score a job in this process.

    Raises:
        ModelError: the model folder cannot be used.
        DataError: the rows cannot be used.
    """
    started_s = time.monotonic()
    baseline_rss_mib = _peak_rss_mib()
    if spec.placement.threads is not None:
        torch.set_num_threads(spec.placement.threads)
    torch.manual_seed(spec.training.seed)
    tokenizer = load_tokenizer(Path(spec.model.path))
    assert spec.data.train is not None, "the reference trains on one data set"
    rows = read_rows(Path(spec.data.train), spec.data.format, spec.data.limit)
    samples = tokenise(rows, tokenizer, max_tokens=spec.data.max_tokens, train_on=spec.objective.labelled_tokens)
    model = _load_model(spec)
    before = after = None
    if spec.scoring is not None and spec.scoring.before:
        before = _score(spec, model, tokenizer, use_adapter=False)
    train_started_s = time.monotonic()
    losses, num_tokens = _train(spec, model, samples)
    train_s = time.monotonic() - train_started_s
    if spec.scoring is not None:
        after = _score(spec, model, tokenizer, use_adapter=True)
    return ReferenceResult(
        losses=tuple(losses),
        before=before,
        after=after,
        train_s=train_s,
        total_s=time.monotonic() - started_s,
        train_tokens_per_s=num_tokens / train_s,
        num_steps=len(losses),
        num_train_rows=len(samples),
        mean_row_tokens=float(np.mean(samples.lengths)),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        threads=torch.get_num_threads(),
        dtype=_dtype_name(spec),
        baseline_rss_mib=baseline_rss_mib,
        peak_rss_mib=_peak_rss_mib(),
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    )


def _load_model(spec: JobSpec) -> peft.PeftModel:
    dtype = torch.bfloat16 if _dtype_name(spec) == "bf16" else torch.float32
    base: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(spec.model.path, dtype=dtype)
    base.config.use_cache = False
    if spec.training.init_adapter is not None:
        model = peft.PeftModel.from_pretrained(base, spec.training.init_adapter, is_trainable=True)
    elif isinstance(spec.method, FullConfig):
        model = cast("peft.PeftModel", base)  # what is asked of it below, both have
    else:
        model = peft.get_peft_model(base, peft_config_of(spec, int(base.config.num_hidden_layers)))
    if spec.training.checkpointing == "on":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def peft_config_of(spec: JobSpec, num_blocks: int) -> peft.PeftConfig:
    """The job's method on a model of so many blocks, as a person would ask stock peft for it.

    Raises:
        ConfigError: peft has no such method.
    """
    method = spec.method
    if isinstance(method, PromptConfig) and method.init != "text":
        return peft.PromptTuningConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            num_virtual_tokens=method.num_virtual_tokens,
            prompt_tuning_init="SAMPLE_VOCAB" if method.init == "vocabulary" else "RANDOM",
        )
    if isinstance(method, PrefixConfig | PTuningV2Config) and not method.has_dropout and method.init == "random":
        projection: dict[str, Any] = {}
        if isinstance(method, PrefixConfig) and method.projection:
            projection = {"prefix_projection": True, "encoder_hidden_size": method.encoder_hidden_size}
        return peft.PrefixTuningConfig(
            task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=method.num_virtual_tokens, **projection
        )
    if isinstance(method, LoraConfig) and method.unfreeze is None:
        return _lora(method, num_blocks)
    raise ConfigError(f"stock peft has no method.type: {method.type} with these settings")


def _lora(method: LoraConfig, num_blocks: int) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # annotated int, used as a float
        lora_dropout=method.dropout,
        target_modules=method.target_modules if isinstance(method.target_modules, str) else list(method.target_modules),
        layers_to_transform=None if method.blocks is None else list(chosen_blocks(method.blocks, num_blocks)),
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        modules_to_save=list(method.modules_to_save) or None,
        ensure_weight_tying=method.ensure_weight_tying,
    )


def _train(spec: JobSpec, model: peft.PeftModel, samples: Samples) -> tuple[list[float], int]:
    """Losses per step and the number of tokens seen, padding not counted."""
    training = spec.training
    num_steps = total_steps(len(samples), training.batch_size, epochs=training.epochs, steps=training.steps)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=training.lr, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay
    )
    kind = "constant_with_warmup" if training.lr_schedule == "constant" else training.lr_schedule
    scheduler = transformers.get_scheduler(kind, optimizer, training.warmup_steps, num_steps)
    losses = []
    num_tokens = 0
    model.train()
    for step in range(num_steps):
        indices = batch_indices(step, training.batch_size, len(samples), training.seed)
        batch = cut_micro_batches(samples, indices, training.micro_batch_size or training.batch_size)
        loss_sum = 0.0
        for rows in batch.micro_batches:
            loss = model(**_right_padded(rows), num_items_in_batch=batch.loss_weight).loss
            loss.backward()
            loss_sum += loss.item()
            num_tokens += len(rows.input_ids)
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
    return losses, num_tokens


def _score(spec: JobSpec, model: peft.PeftModel, tokenizer: ModelTokenizer, *, use_adapter: bool) -> Score:
    assert spec.scoring is not None and spec.data.eval is not None  # JobSpec validates this
    held_out = read_rows(Path(spec.data.eval), spec.data.format, spec.data.eval_limit)
    samples = tokenise(held_out, tokenizer, max_tokens=spec.data.max_tokens, train_on=spec.objective.labelled_tokens)
    model.eval()
    # Of a model trained in full the base is scored before the first step, while it is still itself.
    is_itself = use_adapter or spec.method.trains_weights
    with contextlib.nullcontext() if is_itself else model.disable_adapter():
        answers = list(_generate(spec.scoring, model, tokenizer, samples))
    return score(spec.metric_of(spec.data.sources[0]), answers, [row.answer for row in held_out.rows])


def _generate(
    scoring: ScoringConfig, model: peft.PeftModel, tokenizer: ModelTokenizer, samples: Samples
) -> Iterator[str]:
    sampling = {"do_sample": True, "temperature": scoring.temperature} if scoring.temperature else {"do_sample": False}
    for batch in range(math.ceil(len(samples) / scoring.batch_rows)):
        prompts = _left_padded(
            prompt_micro_batch(samples, sequential_indices(batch, scoring.batch_rows, len(samples))),
            tokenizer.pad_token_id,
        )
        generated = model.generate(
            **prompts,
            **sampling,
            max_new_tokens=scoring.max_new_tokens,
            use_cache=True,
            eos_token_id=list(tokenizer.stop_token_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in generated[:, prompts["input_ids"].shape[1] :].tolist():
            yield tokenizer.decode(row)


def _right_padded(rows: MicroBatchRows) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, each [num_rows, padded_tokens]."""
    places = np.arange(rows.padded_tokens) < rows.lengths[:, None]
    input_ids = np.zeros(places.shape, np.int64)
    labels = np.full(places.shape, _IGNORED_LABEL, np.int64)
    input_ids[places] = rows.input_ids
    labels[places] = np.where(rows.label_mask == 1, rows.input_ids, _IGNORED_LABEL)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(places.astype(np.int64)),
        "labels": torch.from_numpy(labels),
    }


def _left_padded(rows: MicroBatchRows, pad_token_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, each [num_rows, padded_tokens]."""
    places = np.arange(rows.padded_tokens)[::-1] < rows.lengths[:, None]
    input_ids = np.full(places.shape, pad_token_id, np.int64)
    input_ids[places] = rows.input_ids
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(places.astype(np.int64))}


def _dtype_name(spec: JobSpec) -> str:
    """fp32 unless the job says bf16: auto is fp32 here, the dtype that every machine runs well."""
    return "bf16" if spec.model.dtype == "bf16" else "fp32"


def _peak_rss_mib() -> float:
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
