"""Models of the shapes that PAC was measured on, with random weights, and rows as long as MRPC's and STS-B's."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

Task = Literal["mrpc", "stsb"]

_T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32128,
    "d_kv": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "is_encoder_decoder": True,
}
_BART = {
    "model_type": "bart",
    "architectures": ["BartForConditionalGeneration"],
    "vocab_size": 50265,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "dropout": 0.0,
    "max_position_embeddings": 1024,
    "is_encoder_decoder": True,
}
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model without its weights' values."""

    name: str
    config: Mapping[str, Any]

    @property
    def family(self) -> str:
        """The family's name."""
        return str(self.config["model_type"])

    @property
    def is_seq2seq(self) -> bool:
        """Whether it has an encoder and a decoder."""
        return bool(self.config.get("is_encoder_decoder"))

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return int(self.config.get("d_model") or self.config["hidden_size"])

    @property
    def num_blocks(self) -> int:
        """Blocks, of both halves where there are two."""
        config = self.config
        if self.family == "bart":
            return int(config["encoder_layers"] + config["decoder_layers"])
        if self.family == "t5":
            return 2 * int(config["num_layers"])
        return int(config["num_hidden_layers"])

    @property
    def query_and_value(self) -> tuple[str, str]:
        """What the layers are called that LoRA's paper adapts."""
        return ("q", "v") if self.family == "t5" else ("q_proj", "v_proj")


def _t5(num_layers: int, d_model: int, d_ff: int, num_heads: int, **more: int) -> dict[str, Any]:
    return {**_T5, "num_layers": num_layers, "d_model": d_model, "d_ff": d_ff, "num_heads": num_heads, **more}


def _bart(layers: int, d_model: int, ffn: int, heads: int, **more: int) -> dict[str, Any]:
    sizes = {
        f"{half}_{what}": size
        for half in ("encoder", "decoder")
        for what, size in (("layers", layers), ("ffn_dim", ffn), ("attention_heads", heads))
    }
    return {**_BART, "d_model": d_model, **sizes, **more}


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, **more: int) -> dict[str, Any]:
    return {
        **_LLAMA,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


SHAPES: dict[str, Shape] = {
    name: Shape(name=name, config=config)
    for name, config in {
        "t5-base": _t5(12, 768, 3072, 12),
        "bart-large": _bart(12, 1024, 4096, 16),
        "t5-large": _t5(24, 1024, 4096, 16),
        # Those of SmolLM2.
        "decoder-135m": _llama(30, 576, 1536, 9, 3),
        "decoder-360m": _llama(32, 960, 2560, 15, 5),
        "quick-t5": _t5(2, 64, 128, 4, d_kv=16, vocab_size=600),
        "quick-decoder": _llama(4, 64, 128, 4, 4, vocab_size=600),
    }.items()
}

_LENGTHS: dict[Task, tuple[float, float, int, int]] = {"mrpc": (44.0, 10.5, 16, 81), "stsb": (20.0, 10.5, 5, 99)}
"""Words of both sentences: mean, deviation, least, most, of the training rows."""
_DRAWN_WORDS = 4000
_ANSWERS: dict[Task, tuple[str, ...]] = {
    "mrpc": ("no", "yes"),
    "stsb": tuple(f"{value / 5:.1f}" for value in range(26)),
}
_SPECIAL: dict[str, tuple[str, ...]] = {
    "t5": ("<pad>", "</s>"),
    "bart": ("<s>", "<pad>", "</s>"),
    "llama": ("<pad>", "</s>", "<s>"),
}
_UNKNOWN = "<unk>"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """Two sentences and what is to be said of them."""

    prompt: str
    completion: str

    @property
    def words(self) -> list[str]:
        """All its words."""
        return f"{self.prompt} {self.completion}".split()


def pair_rows(task: Task, num_rows: int, data: Path | None) -> list[PairRow]:
    """Rows of a task, or generated ones as long as its own.

    Args:
        task: which.
        num_rows: how many; the first of the training rows.
        data: folder that may hold ``mrpc/train.jsonl`` and ``stsb/train.jsonl``.

    Raises:
        ValueError: there are fewer rows.
    """
    path = None if data is None else data / task / "train.jsonl"
    if path is None or not path.is_file():
        draw = random.Random(0)
        return [_drawn_row(task, draw) for _ in range(num_rows)]
    lines = path.read_text(encoding="utf-8").splitlines()[:num_rows]
    if len(lines) < num_rows:
        raise ValueError(f"{path} has {len(lines)} rows, {num_rows} are wanted; ask for fewer")
    return [_pair(row["s1"], row["s2"], _answer(task, row)) for row in map(json.loads, lines)]


def _answer(task: Task, row: Mapping[str, Any]) -> str:
    return _ANSWERS[task][int(row["label"]) if task == "mrpc" else round(5 * float(row["score"]))]


def _drawn_row(task: Task, draw: random.Random) -> PairRow:
    mean, deviation, least, most = _LENGTHS[task]
    num_words = min(max(round(draw.gauss(mean, deviation)), least), most)
    words = [f"w{draw.randrange(_DRAWN_WORDS)}" for _ in range(num_words)]
    cut = num_words // 2
    return _pair(" ".join(words[:cut]), " ".join(words[cut:]), draw.choice(_ANSWERS[task]))


def _pair(first: str, second: str, answer: str) -> PairRow:
    return PairRow(prompt=f"{first} = {second} ?", completion=f" {answer}")


def write_rows(rows: Sequence[PairRow], path: Path) -> Path:
    """As a job reads them."""
    lines = (json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_model(shape: Shape, folder: Path, rows: Sequence[PairRow]) -> Path:
    """Random weights as they would be published, in fp32, and a tokenizer that knows the rows' words."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape.config)
    # transformers does not type its own constructors.
    kind: Any = AutoModelForSeq2SeqLM if shape.is_seq2seq else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(str(folder))
    _write_tokenizer(shape, folder, rows)
    return folder


def _write_tokenizer(shape: Shape, folder: Path, rows: Sequence[PairRow]) -> None:
    special = _SPECIAL[shape.family]
    known = dict.fromkeys([*special, _UNKNOWN, *(word for row in rows for word in row.words)])
    # A small vocabulary calls the rest unknown; a large one is full, so that every id is a word's.
    words = [*known, *(f"filler{i}" for i in range(shape.config["vocab_size"]))][: shape.config["vocab_size"]]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*special, _UNKNOWN)])
    if shape.is_seq2seq:
        single = "<s> $A </s>" if shape.family == "bart" else "$A </s>"
        ends = [(token, ids[token]) for token in ("<s>", "</s>") if token in single]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "unk_token": _UNKNOWN}), encoding="utf-8")
