"""Answers questions with a transformers model: ``python -m ... REQUEST.json`` prints a line of JSON for each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Answer the questions of a request, one after the other."""
    request = json.loads(Path(sys.argv[1]).read_text())
    config = request["config"]
    # What libraries print must not stand among the answers.
    out = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):
        tokenizer: Any = AutoTokenizer.from_pretrained(config["path"], local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            config["path"], dtype=_DTYPES[config["dtype"]], local_files_only=True
        ).eval()
        for number, (question, seed) in enumerate(zip(request["questions"], request["seeds"], strict=True)):
            text = _answer(model, tokenizer, question, seed, config)
            print(json.dumps({"question": number, "text": text}), file=out, flush=True)


def _answer(model: Any, tokenizer: Any, question: list[dict[str, str]], seed: str, config: dict[str, Any]) -> str:
    # A model without a template, or with one that knows no system turn, is given the words alone.
    joined = "\n\n".join(turn["content"] for turn in question)
    if tokenizer.chat_template is None:
        inputs = tokenizer(joined + "\n", return_tensors="pt")
    else:
        turns = [{"role": "user", "content": joined}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    # By its name alone, so that a question is answered alike whatever was asked before it.
    torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    sampling = {"do_sample": True, "temperature": config["temperature"]} if config["temperature"] else {}
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=config["max_new_tokens"],
        **(sampling or {"do_sample": False}),
    )
    return str(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
