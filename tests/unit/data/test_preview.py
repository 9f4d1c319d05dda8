from __future__ import annotations

import gc
import json
import re

import pytest
from typer.testing import CliRunner

from coordinator import cli
from plutino.assets import TINY_LLAMA_DIR
from plutino.data.formats import Row
from plutino.data.preview import preview_rows
from plutino.data.readers import scan_rows
from plutino.data.tokenisation import Reading, tokenise
from plutino.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_LLAMA_DIR)


def written(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_preview_names_the_lines_that_are_unreadable_unusable_cut_and_duplicate(tmp_path, tokenizer):
    long = " ".join(map(str, range(40)))
    path = written(
        tmp_path / "rows.jsonl",
        pair("a b", "c"),
        "no json\n",
        "\n",
        pair("a b", "d"),
        pair("a b", "c"),
        pair(long, "never reached"),
        {"prompt": "no answer"},
        pair("a", long),
        pair("a b", "c"),
    )
    seen = preview_rows(scan_rows(path), tokenizer, Reading(max_tokens=24))
    assert (seen.format, seen.use, seen.num_rows) == ("prompt_completion", "answers", 6)
    assert [problem.lines.first for problem in seen.unreadable] == [(2,), (7,)]
    assert [problem.lines.first for problem in seen.unusable] == [(6,)]
    assert seen.truncated.first == (6, 8)
    assert seen.duplicate_of == {5: 1, 9: 1} and seen.duplicates.num_rows == 2
    assert seen.lengths.longest > 40 and sum(bar.num_rows for bar in seen.lengths.histogram) == 6


def test_preview_counts_the_tokens_that_a_job_would_train_on(tmp_path, tokenizer):
    path = written(tmp_path / "rows.jsonl", pair("a b", "c d e"), pair("what", "é 漢字"))
    rows = scan_rows(path)
    seen = preview_rows(rows, tokenizer, Reading(max_tokens=64))
    samples = tokenise(rows, tokenizer, max_tokens=64)
    assert seen.num_tokens == len(samples.input_ids)
    assert seen.num_label_tokens == int(samples.label_mask.sum()) == sum(samples.num_labels(i) for i in (0, 1))
    for index, shown in enumerate(seen.shown):
        assert [token.carries_loss for token in shown.tokens] == samples.mask(index).astype(bool).tolist()
    assert "".join(t.text for t in seen.shown[1].tokens if t.carries_loss) == "é 漢字<|end|>"


def test_preview_of_text_and_of_classes_says_what_becomes_of_rows(tmp_path, tokenizer):
    text = written(tmp_path / "rows.txt", "one two three four five six seven eight\n\n", "x\n\n", "one two\n")
    seen = preview_rows(scan_rows(text), tokenizer, Reading(max_tokens=4, use="text"))
    assert seen.num_samples > seen.num_rows == 3 and seen.truncated.first == (1,)
    table = written(tmp_path / "rows.csv", "text,label\n", "good,yes\n", "bad,no\n", "fine,yes\n")
    of_classes = preview_rows(scan_rows(table), tokenizer, Reading(max_tokens=8, use="label"), has_classes=True)
    assert of_classes.classes == {"no": 1, "yes": 2} and of_classes.shown[0].label == "yes"


def test_preview_holds_few_rows_however_many_there_are(tmp_path, tokenizer, monkeypatch):
    path = written(tmp_path / "rows.jsonl", *(pair(f"question {i}", f"answer {i}") for i in range(4000)))
    rows = scan_rows(path)
    most = 0
    encode = type(tokenizer).encode

    def counting(self, texts):
        nonlocal most
        most = max(most, sum(isinstance(thing, Row) for thing in gc.get_objects()))
        return encode(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode", counting)
    assert preview_rows(rows, tokenizer, Reading(max_tokens=64)).num_rows == 4000
    assert 0 < most <= 520


def test_preview_command_shows_files_and_jobs_and_fails_where_a_job_would(tmp_path):
    good = written(tmp_path / "good.jsonl", pair("a b", "c"), pair("d e", "f"))
    written(tmp_path / "bad.jsonl", pair("a b", "c"), "no json\n")
    job = tmp_path / "job.yaml"
    job.write_text(f"model: {TINY_LLAMA_DIR}\ndata: {{train: good.jsonl, eval: bad.jsonl, max_tokens: 32}}\n")
    run = CliRunner().invoke

    shown = run(cli.app, ["data", "preview", str(good)])
    assert shown.exit_code == 0 and "«c<|end|>»" in shown.stdout
    told = run(cli.app, ["data", "preview", str(job), "--set", "data.max_tokens=16", "--json"])
    assert told.exit_code == 2
    training, held_out = json.loads(told.stdout)
    assert training["max_tokens"] == 16 and not training["unreadable"]
    assert held_out["unreadable"][0]["lines"] == {"num_rows": 1, "first": [2]}
    plain = run(cli.app, ["data", "preview", str(job)]).stdout
    assert re.search(r"cannot be read, 1 row, line 2: not JSON", plain) and "(held-out)" in plain


def test_preview_of_a_job_counts_held_out_rows_in_the_classes_that_are_trained(tmp_path):
    rows = ("a", "b", "c"), ("a", "d")
    for name, labels in zip(("train", "eval"), rows, strict=True):
        written(tmp_path / f"{name}.jsonl", *(json.dumps({"text": f"text of {k}", "label": k}) + "\n" for k in labels))
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {TINY_LLAMA_DIR}\nobjective: {{type: classification}}\n"
        "data: {train: train.jsonl, eval: eval.jsonl}\n"
    )

    told = CliRunner().invoke(cli.app, ["data", "preview", str(job), "--json"])

    training, held_out = json.loads(told.stdout)
    assert training["classes"] == {"a": 1, "b": 1, "c": 1}
    assert held_out["unusable"][0]["lines"] == {"num_rows": 1, "first": [2]} and told.exit_code == 2
