"""What objectives make of rows: labels, pairs, pieces of documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plutino.assets import TINY_LLAMA_DIR
from plutino.data.batches import cut_micro_batches
from plutino.data.readers import read_rows
from plutino.data.samples import JoinedSamples, Samples
from plutino.data.sequences import class_names_of
from plutino.data.tokenisation import tokenise
from plutino.data.tokenizer import ModelTokenizer, load_tokenizer
from plutino.errors import DataError


@pytest.fixture(scope="module")
def shipped() -> ModelTokenizer:
    return load_tokenizer(TINY_LLAMA_DIR)


def made(folder: Path, tokenizer: ModelTokenizer, *rows: dict[str, Any], max_tokens: int = 64, **use: Any) -> Samples:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return tokenise(read_rows(path), tokenizer, max_tokens=max_tokens, **use)


def chat(*answers: str) -> dict[str, Any]:
    turns = [[{"role": "user", "content": "more"}, {"role": "assistant", "content": answer}] for answer in answers]
    return {"messages": [message for turn in turns for message in turn]}


def labelled_text(samples: Samples, tokenizer: ModelTokenizer, sequence: int = 0) -> str:
    return tokenizer.tokenizer.decode(samples.ids(sequence)[samples.mask(sequence) == 1].tolist())


def test_all_assistant_turns_carry_loss_or_only_the_last(tmp_path: Path, shipped: ModelTokenizer) -> None:
    row = chat("play music", "add this song", "find the weather")

    every = labelled_text(made(tmp_path, shipped, row), shipped)
    last = labelled_text(made(tmp_path, shipped, row, train_on="last"), shipped)

    assert "play" in every and "song" in every and "weather" in every
    assert "weather" in last and "song" not in last and "play" not in last


def test_a_document_is_cut_into_pieces_that_lose_no_token_but_each_first_label(
    tmp_path: Path, shipped: ModelTokenizer
) -> None:
    text = "Play some music by the band, then find the weather in the city. " * 5

    samples = made(tmp_path, shipped, {"text": text}, {"text": "Play it."}, max_tokens=20, use="text")

    whole = [*shipped.encode([text])[0].ids, shipped.eos_token_id]
    pieces = [samples.ids(i).tolist() for i in range(len(samples)) if samples.line_numbers[i] == 1]
    assert [token for piece in pieces for token in piece] == whole
    assert {len(piece) for piece in pieces[:-1]} == {20}
    assert all(samples.mask(i).tolist() == [0] + [1] * (len(samples.ids(i)) - 1) for i in range(len(samples)))
    assert samples.line_numbers[-1] == 2 and samples.num_truncated == 0


def test_classes_are_sorted_by_value_or_name_and_labels_become_their_numbers(
    tmp_path: Path, shipped: ModelTokenizer
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in (10, 9, -1, 9)))
    rows = read_rows(path)

    names = class_names_of(rows)
    samples = tokenise(rows, shipped, max_tokens=9, use="label", counted="rows", class_names=names)

    assert names == ("-1", "9", "10")
    assert samples.labels is not None and samples.labels.tolist() == [2, 1, 0, 1]
    assert not samples.label_mask.any()
    # As transformers' tokenizer gives a text: nothing ends it.
    assert samples.ids(0)[-1] != shipped.eos_token_id
    batch = cut_micro_batches(samples, [0, 1, 2], 2)
    assert (batch.loss_weight, batch.micro_batches[0].labels.tolist()) == (3, [2, 1])  # type: ignore[union-attr]


def test_an_unknown_class_and_a_label_that_is_no_number_are_named_with_their_lines(
    tmp_path: Path, shipped: ModelTokenizer
) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]

    with pytest.raises(DataError, match="line 2: the class 'y' is not among x, z"):
        made(tmp_path, shipped, *rows, use="label", class_names=("x", "z"))
    with pytest.raises(DataError, match="line 1: the label 'x' is no number; use"):
        made(tmp_path, shipped, *rows, use="label")


def test_both_answers_of_a_pair_are_in_one_micro_batch_and_count_once(tmp_path: Path, shipped: ModelTokenizer) -> None:
    pairs = [
        {"prompt": f"Intent {n}?", "chosen": "PlayMusic", "rejected": "I do not know"}
        | {"reference_chosen_logps": -n, "reference_rejected_logps": -2.5}
        for n in range(3)
    ]

    samples = made(tmp_path, shipped, *pairs, use="pairs", counted="rows")
    batch = cut_micro_batches(samples, [2, 0, 1], 2)

    assert len(samples) == 3 and batch.loss_weight == 3
    first, second = batch.micro_batches
    assert first.pair_ids is not None and first.pair_ids.tolist() == [0, 0, 1, 1]
    assert (len(first.lengths), len(first.sample_indices)) == (4, 2)
    assert first.reference_logps is not None
    assert first.reference_logps.tolist() == [-first.sample_indices[0], -2.5, -first.sample_indices[1], -2.5]
    assert (len(second.lengths), second.sample_indices) == (2, (2,)) if first.sample_indices == (0, 1) else True
    chosen = first.input_ids[: first.lengths[0]][first.label_mask[: first.lengths[0]] == 1]
    assert "PlayMusic" in shipped.tokenizer.decode(chosen.tolist())


def test_rows_of_the_wrong_format_say_what_the_objective_takes(tmp_path: Path, shipped: ModelTokenizer) -> None:
    with pytest.raises(DataError, match="rows of the format text, this objective takes preference; change"):
        made(tmp_path, shipped, {"text": "a"}, use="pairs")


def test_reference_log_probabilities_of_some_rows_only_are_refused(tmp_path: Path, shipped: ModelTokenizer) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    known = pair | {"reference_chosen_logps": -1.0, "reference_rejected_logps": -2.0}

    with pytest.raises(DataError, match="1 of 2 rows have reference_chosen_logps"):
        made(tmp_path, shipped, pair, known, use="pairs")


def test_joined_data_sets_are_found_by_their_positions(tmp_path: Path, shipped: ModelTokenizer) -> None:
    (tmp_path / "other").mkdir()
    one = made(tmp_path, shipped, chat("play"), chat("music"))
    other = made(tmp_path / "other", shipped, chat("weather"))

    joined = JoinedSamples([one, other])

    assert (len(joined), joined.starts) == (3, (0, 2, 3))
    assert np.array_equal(joined.rows(2)[0].ids, other.ids(0)) and np.array_equal(joined.rows(1)[0].ids, one.ids(1))
    assert joined.loss_weight(2, "label tokens") == other.loss_weight(0, "label tokens") > 1


_READ_UNDER_LIMIT = """
import resource, sys
from pathlib import Path
from plutino.data.batches import batch_indices, cut_micro_batches
from plutino.data.readers import read_rows
from plutino.data.tokenisation import tokenise
from plutino.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[2]))
tokenise(read_rows(Path(sys.argv[1]), limit=1200), tokenizer, max_tokens=512, use="text")
data_kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData:"))
limit = data_kib * 1024 + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
rows = read_rows(Path(sys.argv[1]))
samples = tokenise(rows, tokenizer, max_tokens=512, use="text")
batch = cut_micro_batches(samples, batch_indices(0, 8, len(samples), 0), 4)
print(len(samples), batch.loss_weight, samples.input_ids.nbytes)
"""


def test_a_file_larger_than_the_memory_allowed_is_read_and_tokenised(tmp_path: Path) -> None:
    """A limit on the process's data below the size of what it makes: only what is on the disk can hold that."""
    path = tmp_path / "big.jsonl"
    text = json.dumps({"text": "Find the weather in the city, then play some music by the band. " * 12})
    with path.open("w") as file:
        for _ in range(6_000):
            file.write(text + "\n")
    limit_bytes = 3 * 2**20
    assert path.stat().st_size > limit_bytes

    done = subprocess.run(
        [sys.executable, "-c", _READ_UNDER_LIMIT, str(path), str(TINY_LLAMA_DIR), str(limit_bytes)],
        capture_output=True,
        text=True,
        timeout=50,
        # The first rows' memory stays with the process, so that the limit is about what further rows add to it.
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"},
    )

    assert done.returncode == 0, done.stderr
    num_samples, loss_weight, ids_bytes = (int(word) for word in done.stdout.split())
    assert num_samples == 6_000 and loss_weight > 0
    assert ids_bytes > limit_bytes
