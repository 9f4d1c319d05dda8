"""Lines of Python that load what a job published, as its card and its last screen show them. Pure."""

from __future__ import annotations

import json

from plutino.job.method import MethodConfig
from plutino.job.objective import ObjectiveConfig


def loading_code(method: MethodConfig, objective: ObjectiveConfig, base_path: str, folder: str, dtype: str) -> str:
    """Code for a program of its own.

    Args:
        method: what was trained.
        objective: with a score head or without.
        base_path: folder of the base model.
        folder: what was published, as the code shall name it.
        dtype: of the frozen base, fp32 or bf16.
    """
    # A JSON string is a Python string too.
    base, published = json.dumps(base_path), json.dumps(folder)
    torch_dtype = json.dumps({"fp32": "float32", "bf16": "bfloat16"}.get(dtype, dtype))
    task, num_labels, labels = "Seq2SeqLM" if objective.type == "seq2seq" else "CausalLM", "", ""
    if objective.has_score_head:
        task, num_labels = "SequenceClassification", f", num_labels={objective.num_outputs}"
        if objective.num_outputs > 1:
            labels = f"\nmodel.config.id2label = {dict(enumerate(getattr(objective, 'labels', ())))!r}"
    of_base = f"AutoModelFor{task}.from_pretrained({base}, dtype={torch_dtype}{num_labels})"
    imported = f"from transformers import AutoModelFor{task}\n"
    if method.trains_weights:
        return f"{imported}model = AutoModelFor{task}.from_pretrained({published})"
    if not method.has_peft_format:
        return (
            "from plutino.load_adapter import load_adapter\n"
            f"{imported}model = {of_base}\n"
            f"load_adapter(model, {published})  # in place{labels}"
        )
    if objective.has_score_head:
        return (
            "from peft import PeftModel\n"
            f"{imported}base = {of_base}\n"
            f"model = PeftModel.from_pretrained(base, {published}){labels}"
        )
    can_merge = method.type == "lora"
    # Left to the reader: folded weights are rounded, so that answers are the job's only nearly.
    merging = "# model = model.merge_and_unload() makes it a plain transformers model.\n" if can_merge else ""
    return (
        f"from peft import AutoPeftModelFor{task}\n"
        f"model = AutoPeftModelFor{task}.from_pretrained({published}, dtype={torch_dtype})\n"
        f"{merging}# It finds the base in {base}; elsewhere, change adapter_config.json."
    )
