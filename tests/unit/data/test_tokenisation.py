from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.data.readers import Message, Row, RowFormat, Rows, read_rows
from plutino.data.tokenisation import tokenise
from plutino.data.tokenizer import ModelTokenizer, load_tokenizer
from plutino.errors import DataError, ModelError

VOCABULARY = ["<s>", "</s>", "<end>", "a", "b", ":", "Ġ", "Ġa", "Ġb", "Ã", "©"]


@pytest.fixture(scope="module")
def shipped() -> ModelTokenizer:
    return load_tokenizer(TINY_LLAMA_DIR)


def plain_model(folder: Path, *, template: str | None = None, trims_offsets: bool = False) -> ModelTokenizer:
    """A byte-level tokenizer of eleven tokens that puts <s> before plain text."""
    vocab = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in VOCABULARY[:3]])
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trim = processors.ByteLevel(trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([trim, bos]) if trims_offsets else bos
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    return load_tokenizer(folder)


def rows(*pairs: tuple[str, str], row_format: RowFormat = "prompt_completion") -> Rows:
    made = tuple(
        Row(line, (Message("user", prompt), Message("assistant", answer, carries_loss=True)))
        for line, (prompt, answer) in enumerate(pairs, start=1)
    )
    return Rows(path=Path("data.jsonl"), format=row_format, sha256="", rows=made)


def test_load_tokenizer_of_the_shipped_model_stops_at_eos_and_end_of_turn(shipped: ModelTokenizer) -> None:
    end_of_turn = shipped.tokenizer.token_to_id("<|end|>")

    assert shipped.stop_token_ids == (shipped.eos_token_id, end_of_turn)
    assert (shipped.eos_token_id, shipped.pad_token_id, shipped.prefix_ids) == (2, 0, ())
    assert shipped.vocab_size == 4096


def test_load_tokenizer_takes_every_eos_of_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))

    model = plain_model(tmp_path)

    assert model.stop_token_ids == (1, 2)
    assert model.pad_token_id == model.eos_token_id == 1


def test_load_tokenizer_ordinary_text_after_an_answer_is_no_stop_token(tmp_path: Path) -> None:
    model = plain_model(tmp_path, template="{% for m in messages %}{{ m.content }}:b{% endfor %}")

    assert model.stop_token_ids == (1,)


def test_load_tokenizer_model_without_eos_says_what_to_set(tmp_path: Path) -> None:
    plain_model(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()

    with pytest.raises(ModelError, match="no end-of-sequence token; set eos_token"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; write one"):
        load_tokenizer(tmp_path)

    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_ignores_truncation_stored_in_the_file(tmp_path: Path) -> None:
    shutil.copytree(TINY_LLAMA_DIR, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    stored = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    stored.enable_truncation(3)
    stored.save(str(tmp_path / "model" / "tokenizer.json"))

    samples = tokenise(rows(("a long question", "a long answer")), load_tokenizer(tmp_path / "model"), max_tokens=99)

    assert len(samples.ids(0)) > 6


def test_tokenise_chat_row_labels_the_answer_and_its_end(shipped: ModelTokenizer) -> None:
    samples = tokenise(rows(("Play jazz", "PlayMusic")), shipped, max_tokens=64)

    labels = samples.ids(0)[samples.mask(0) == 1]
    prompt = shipped.tokenizer.decode(samples.prompt(0).tolist(), skip_special_tokens=False)
    assert shipped.tokenizer.decode(labels.tolist(), skip_special_tokens=False) == "PlayMusic<|end|>"
    assert prompt == "<|user|>Play jazz<|end|><|assistant|>"


def test_tokenise_plain_row_gets_the_tokenizers_bos_and_an_eos_to_learn(tmp_path: Path) -> None:
    samples = tokenise(rows(("a:", "b")), plain_model(tmp_path), max_tokens=64)

    assert samples.ids(0).tolist() == [0, 3, 5, 4, 1]
    assert samples.mask(0).tolist() == [0, 0, 0, 1, 1]
    assert samples.prompt(0).tolist() == [0, 3, 5]


@pytest.mark.parametrize("trims_offsets", [False, True])
def test_tokenise_token_across_the_border_is_learned_and_not_prompt(tmp_path: Path, trims_offsets: bool) -> None:
    """Offsets that leave out a token's leading space must not move the border."""
    model = plain_model(tmp_path, trims_offsets=trims_offsets)

    samples = tokenise(rows(("a: ", "b")), model, max_tokens=64)

    assert samples.ids(0).tolist() == [0, 3, 5, 8, 1]
    assert samples.mask(0).tolist() == [0, 0, 0, 1, 1]
    assert samples.prompt(0).tolist() == [0, 3, 5]


def test_tokenise_character_of_several_tokens_is_learned_whole(tmp_path: Path) -> None:
    samples = tokenise(rows(("a:", "é")), plain_model(tmp_path), max_tokens=64)

    assert samples.ids(0).tolist() == [0, 3, 5, 9, 10, 1]
    assert samples.mask(0).tolist() == [0, 0, 0, 1, 1, 1]


def test_tokenise_train_on_all_labels_everything_but_the_first_token(tmp_path: Path) -> None:
    samples = tokenise(rows(("a:", "b")), plain_model(tmp_path), max_tokens=64, train_on="all")

    assert samples.mask(0).tolist() == [0, 1, 1, 1, 1]


def test_tokenise_long_rows_are_cut_at_the_end_and_counted(tmp_path: Path) -> None:
    samples = tokenise(rows(("a", "bbbb"), ("a", "b")), plain_model(tmp_path), max_tokens=4)

    assert samples.lengths.tolist() == [4, 4]
    assert samples.ids(0).tolist() == [0, 3, 4, 4]
    assert samples.num_truncated == 1


def test_tokenise_rows_without_a_label_left_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl, lines 2, 3: no answer token within max_tokens = 4"):
        tokenise(rows(("a", "b"), ("aaaa", "b"), ("aaaaa", "b")), plain_model(tmp_path), max_tokens=4)


def test_tokenise_template_trouble_names_file_and_line(tmp_path: Path) -> None:
    model = plain_model(tmp_path, template="{% for m in messages %}{{ m.content | replace('b', '') }};{% endfor %}")

    with pytest.raises(DataError, match=r"data\.jsonl, line 2: .*changes what the assistant says"):
        tokenise(rows(("a", "a"), ("a", "b")), model, max_tokens=64)


def test_tokenise_flat_arrays_hold_the_rows_in_order(shipped: ModelTokenizer) -> None:
    data = read_rows(SNIPS_DIR / "validation.jsonl", limit=50)

    samples = tokenise(data, shipped, max_tokens=512)

    assert len(samples) == 50
    assert samples.line_numbers.tolist() == list(range(1, 51))
    assert samples.starts[-1] == len(samples.input_ids) == len(samples.label_mask)
    assert (samples.input_ids.dtype, samples.label_mask.dtype) == (np.int32, np.uint8)
    for index, row in enumerate(data.rows):
        assert shipped.decode(samples.ids(index)[samples.prompt_tokens[index] :]) == row.answer


def test_decode_ends_before_the_first_stop_token(shipped: ModelTokenizer) -> None:
    (encoding,) = shipped.encode(["PlayMusic<|end|>GetWeather<|eos|>"])

    assert shipped.decode(encoding.ids) == "PlayMusic"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tokenise_equals_transformers_chat_template(shipped: ModelTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA_DIR)
    data = read_rows(SNIPS_DIR / "validation_json.jsonl", limit=20)

    samples = tokenise(data, shipped, max_tokens=512)

    for index, row in enumerate(data.rows):
        chat = [{"role": message.role, "content": message.content} for message in row.messages]
        prompt = theirs.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
        assert samples.ids(index).tolist() == theirs.apply_chat_template(chat, return_dict=False)
        assert samples.prompt(index).tolist() == prompt
