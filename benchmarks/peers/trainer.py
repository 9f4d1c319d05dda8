"""Peer: transformers' own Trainer with peft on one device: ``python -m benchmarks.peers.trainer ORDER.json OUT.json``.

Nothing of plutino runs in it but the reading of figures. Prompt and completion are joined as plutino joins them: a
decoder learns the completion and its end, an encoder-decoder writes it of the prompt that it has read.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cores import pinned
from benchmarks.pac_figures import RunFigures

_IGNORED = -100


def train_apart(
    order: Mapping[str, Any], work: Path, *, cores: Sequence[int], threads: int, timeout_s: float
) -> RunFigures:
    """Run it in a process of its own on these processors; the clock begins with the process.

    Raises:
        CalledProcessError, TimeoutExpired: it failed, or took too long.
    """
    order_path, out_path = work / "order.json", work / "figures.json"
    order_path.write_text(json.dumps(order), encoding="utf-8")
    started_s = time.monotonic()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "benchmarks.peers.trainer", str(order_path), str(out_path)]
    with pinned(cores):
        subprocess.run(command, check=True, timeout=timeout_s, env=environment)
    total_s = time.monotonic() - started_s
    found = json.loads(out_path.read_text(encoding="utf-8"))
    return RunFigures(
        total_s=total_s,
        first_epoch_s=found["epoch_s"][0],
        later_epochs_s=tuple(found["epoch_s"][1:]),
        num_steps=found["num_steps"],
        step_s=tuple(seconds / found["num_steps"] for seconds in found["epoch_s"]),
        begin_s=found["begin_s"],
        end_s=total_s - found["begin_s"] - sum(found["epoch_s"]),
        job_bytes={"one device": found["job_bytes"]},
        rss_bytes={"one device": found["rss_bytes"]},
    )


def main() -> None:
    """Train as the order says."""
    started_s = time.monotonic()
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    baseline_bytes = _peak_bytes()
    is_seq2seq, method = order["is_seq2seq"], order["method"]
    tokenizer = AutoTokenizer.from_pretrained(order["model_dir"])
    kind = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(order["model_dir"], dtype=torch.float32)
    if method["type"] == "lora":
        task = TaskType.SEQ_2_SEQ_LM if is_seq2seq else TaskType.CAUSAL_LM
        config = LoraConfig(
            r=method["rank"], lora_alpha=method["alpha"], target_modules=method["target_modules"], task_type=task
        )
        model = get_peft_model(model, config)

    at_s: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            at_s.append(time.monotonic())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            at_s.append(time.monotonic())

    rows = [json.loads(line) for line in Path(order["rows_path"]).read_text(encoding="utf-8").splitlines()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=order["out_dir"],
            per_device_train_batch_size=order["batch_size"],
            num_train_epochs=order["epochs"],
            learning_rate=3e-4,
            use_cpu=order["use_cpu"],
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[_tokens(tokenizer, row, is_seq2seq) for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED),
        callbacks=[Clock()],
    )
    trainer.train()
    model.save_pretrained(order["out_dir"])
    figures = {
        "begin_s": at_s[0] - started_s,
        "epoch_s": [after - before for before, after in itertools.pairwise(at_s)],
        "num_steps": -(-len(rows) // order["batch_size"]),
        "job_bytes": _peak_bytes() - baseline_bytes,
        "rss_bytes": _peak_bytes(),
    }
    Path(sys.argv[2]).write_text(json.dumps(figures), encoding="utf-8")


def _tokens(tokenizer: Any, row: Mapping[str, str], is_seq2seq: bool) -> dict[str, list[int]]:
    if is_seq2seq:
        return {**tokenizer(row["prompt"]), "labels": tokenizer(row["completion"])["input_ids"]}
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": [*prompt, *answer],
        "attention_mask": [1] * (len(prompt) + len(answer)),
        "labels": [_IGNORED] * len(prompt) + answer,
    }


def _peak_bytes() -> int:
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
