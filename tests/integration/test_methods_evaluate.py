"""Rows that each name an adapter, answered over one base that is loaded once: over gRPC, and by the command."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from coordinator import cli
from coordinator.jobs.runner import JobRunner
from plutino.assets import TINY_LLAMA_DIR
from plutino.events import WorkerLoaded
from plutino.job.spec import load_spec
from tests.integration.test_methods_sweep import JOB, agents_of, stack, start

__all__ = ["stack"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning"),
]

TEXTS = ["play some jazz", "what is the weather in Rome", "book a table for two", "add this song to my list"]
CONFIGS = {
    "lo": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], use_rslora=True),
    "pre": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "pro": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Random weights far larger than a new model's, so that what it answers depends on what it is asked."""
    folder = tmp_path_factory.mktemp("model")
    config = json.loads((TINY_LLAMA_DIR / "config.json").read_text())
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(1)
    changes = {"num_hidden_layers": 2, "head_dim": 8, "initializer_range": 0.7}
    LlamaForCausalLM(LlamaConfig(**{**config, **sizes, **changes})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_LLAMA_DIR / name, folder)
    return folder


@pytest.fixture
def folders(model_dir, tmp_path):
    """Adapters as stock peft writes them, every tensor of them random."""
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(len(name))
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
        found[name] = tmp_path / name
        model.save_pretrained(found[name])
    return found


def alone(model_dir, folder, texts, tmp_path):
    """Greedy answers of one adapter over stock transformers and peft, one row at a time."""
    rows = tmp_path / "alone.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "completion": "-"}) + "\n" for text in texts))
    (tmp_path / "alone.yaml").write_text(JOB.replace("MODEL", str(model_dir)))
    runner = JobRunner(load_spec(tmp_path / "alone.yaml", [f"data.eval={rows}", "data.eval_limit=null"]), "")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, str(folder))
    stops = list(runner.prepare().stop_token_ids)
    answers = []
    for prompt in runner.prompts(0, len(texts), 1):
        ids = torch.from_numpy(prompt.input_ids).long()[None]
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
        new = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        kept = [token for token in new.tolist() if token not in stops]
        answers.append(runner._rows.tokenizer.decode(kept))
    return answers


def evaluate(state_dir, rows, *arguments):
    return CliRunner().invoke(cli.app, ["evaluate", str(rows), *arguments, "--state-dir", str(state_dir), "--json"])


def test_rows_are_answered_as_each_adapter_alone_answers_them_over_a_base_that_is_loaded_once(
    stack, tmp_path, model_dir, folders
):
    coordinator, people, client = start(stack, tmp_path / "state")
    for one in (coordinator, people, client):
        stack.callback(one.close)
    agents_of(stack, coordinator, people)
    (tmp_path / "job.yaml").write_text(JOB.replace("MODEL", str(model_dir)))
    job_id = people.submit(load_spec(tmp_path / "job.yaml", ["training.lr=0.1"]))
    assert people.wait(job_id).state == "succeeded"
    places = {**folders, "job": people.job(job_id).adapter_dir}
    names = [None, *places]
    # Interleaved on purpose; half of the rows know their answer.
    asked = [(names[n % len(names)], TEXTS[n % len(TEXTS)]) for n in range(2 * len(names))]
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for n, (name, text) in enumerate(asked):
            row = {"prompt": text, **({"adapter": name} if name else {}), **({"completion": "yes"} if n % 2 else {})}
            file.write(json.dumps(row) + "\n")

    options = [f"--adapter={name}={job_id if name == 'job' else place}" for name, place in places.items()]
    options += ["--set", "placement.stages=2", "--set", "placement.threads=1", "--max-new-tokens", "6"]
    told = evaluate(tmp_path / "state", rows, *options, "--set", "model.dtype=fp32")

    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [(row["adapter"], row["prompt"]) for row in found["rows"]] == [
        (name or "base", text) for name, text in asked
    ]
    for name in names:
        texts = [text for asked_of, text in asked if asked_of == name]
        expected = alone(model_dir, places.get(name), texts, tmp_path)
        assert [row["answer"] for row in found["rows"] if row["adapter"] == (name or "base")] == expected
    answers = {tuple(row["answer"] for row in found["rows"] if row["adapter"] == (name or "base")) for name in names}
    assert len(answers) == len(names), "adapters that change nothing prove nothing"
    assert ["expected" in row for row in found["rows"]] == [bool(n % 2) for n in range(len(asked))]
    events = {name: [e.event for e in client.watch(one["job_id"])] for name, one in found["adapters"].items()}
    read = [sum(e.tensors_read for e in own if isinstance(e, WorkerLoaded)) for own in events.values()]
    assert read[0] > 0 and read[1:] == [0] * len(places)


def test_adapters_that_are_unknown_of_another_base_or_of_other_shapes_are_refused_by_name(
    stack, tmp_path, model_dir, folders
):
    coordinator, people, client = start(stack, tmp_path / "state")
    for one in (coordinator, people, client):
        stack.callback(one.close)
    rows = tmp_path / "rows.jsonl"

    def refusal(row, *arguments):
        rows.write_text(json.dumps(row) + "\n")
        told = evaluate(tmp_path / "state", rows, f"--model={model_dir}", *arguments)
        assert told.exit_code != 0
        return told.stderr

    ask = {"prompt": "play some jazz", "adapter": "lo"}
    assert "names adapters that are not known: 'lo' in line 1; known are base" in refusal(ask)
    assert "no job" in refusal(ask, "--adapter=lo=nowhere")
    assert "holds no adapter" in refusal(ask, f"--adapter=lo={model_dir}")
    config = folders["lo"] / "adapter_config.json"
    values = json.loads(config.read_text())
    (folders["lo"] / "plutino.json").write_text(json.dumps({"base_hash": "0" * 64}))
    assert "was trained on a base model with hash 000000000000" in refusal(ask, f"--adapter=lo={folders['lo']}")
    (folders["lo"] / "plutino.json").unlink()
    config.write_text(json.dumps(values | {"peft_type": "IA3"}))
    assert "knows no adapters of type IA3" in refusal(ask, f"--adapter=lo={folders['lo']}")
    config.write_text(json.dumps(values | {"r": 3}))
    agents_of(stack, coordinator, people)
    assert "does not fit the method" in refusal(ask, f"--adapter=lo={folders['lo']}", "--set=placement.threads=1")
