"""What the peers with peft train: one model, one set of rows, one method, however many devices share them.

Prompt and completion are joined as plutino joins them: a decoder learns the completion and its end, an encoder-decoder
writes it of the prompt that it has read. An order, see :data:`Order`, says which.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

IGNORED_LABEL = -100
"""Of tokens that no loss is taken of."""
LEARNING_RATE = 3e-4

Order = Mapping[str, Any]
"""``model_dir``, ``rows_path``, ``out_dir``, ``is_seq2seq``, ``method``, ``epochs`` and ``batch_size``, from a file."""


def model_of(order: Order) -> Any:
    """The order's model in fp32 with its method."""
    is_seq2seq, method = order["is_seq2seq"], order["method"]
    kind = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(order["model_dir"], dtype=torch.float32)
    if method["type"] != "lora":
        return model
    task = TaskType.SEQ_2_SEQ_LM if is_seq2seq else TaskType.CAUSAL_LM
    config = LoraConfig(
        r=method["rank"], lora_alpha=method["alpha"], target_modules=method["target_modules"], task_type=task
    )
    return get_peft_model(model, config)


def rows_of(order: Order, tokenizer: Any) -> list[dict[str, list[int]]]:
    """The order's rows as tokens, each as long as it is."""
    lines = Path(order["rows_path"]).read_text(encoding="utf-8").splitlines()
    return [_tokens(tokenizer, json.loads(line), order["is_seq2seq"]) for line in lines]


def _tokens(tokenizer: Any, row: Mapping[str, str], is_seq2seq: bool) -> dict[str, list[int]]:
    if is_seq2seq:
        return {**tokenizer(row["prompt"]), "labels": tokenizer(row["completion"])["input_ids"]}
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": [*prompt, *answer],
        "attention_mask": [1] * (len(prompt) + len(answer)),
        "labels": [IGNORED_LABEL] * len(prompt) + answer,
    }


def peak_bytes() -> int:
    """Resident memory of this process at its peak so far."""
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
