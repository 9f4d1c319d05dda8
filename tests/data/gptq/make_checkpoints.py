"""Makes the tiny GPTQ checkpoints beside this file with a public library, and what it dequantises them to.

    pip install auto-round && python tests/data/gptq/make_checkpoints.py

auto-round (0.16.1 made these) exports AutoGPTQ's format and needs no compiler. The weights are random, so the
checkpoints serve the format alone. expected.json holds the sha256 of each layer's fp16 weight [out, in], computed by
the library's own layer from what it saved; its product with the identity turns -0.0 into 0.0.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as ShiftedLinear
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parents[2] / "plutino" / "assets" / "models" / "tiny-llama-7m"
FORMATS = {"w4g32-asym": (4, 32, False), "w4g16-sym": (4, 16, True), "w8g-1-sym": (8, -1, True)}


def main() -> None:
    expected = {name: make(name, *values) for name, values in FORMATS.items()}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def make(name: str, bits: int, group_size: int, is_symmetric: bool) -> dict[str, str]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    rows = [torch.randint(2, 61, (1, 32)) for _ in range(8)]
    rounding = AutoRound(
        LlamaForCausalLM(config),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        bits=bits,
        group_size=group_size,
        sym=is_symmetric,
        iters=4,
        nsamples=8,
        seqlen=32,
        batch_size=4,
        dataset=rows,
        device_map="cpu",
        enable_torch_compile=False,
    )
    with tempfile.TemporaryDirectory() as made:
        rounding.quantize_and_save(made, format="auto_gptq")
        (saved,) = Path(made).rglob("model.safetensors")
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(saved.parent / file, folder / file)
    return dequantised_hashes(folder, bits, group_size)


def dequantised_hashes(folder: Path, bits: int, group_size: int) -> dict[str, str]:
    tensors = load_file(folder / "model.safetensors")
    hashes = {}
    for layer in sorted(key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        in_features = tensors[f"{layer}.qweight"].shape[0] * 32 // bits
        out_features = tensors[f"{layer}.qweight"].shape[1]
        # Zero points in AutoGPTQ's format are stored minus 1: that is the library's "zp" layer.
        linear = ShiftedLinear(bits, group_size, in_features, out_features, bias=False)
        for part in ("qweight", "qzeros", "scales"):
            setattr(linear, part, tensors[f"{layer}.{part}"])
        weight = linear(torch.eye(in_features, dtype=torch.float16)).t().contiguous()
        hashes[layer] = hashlib.sha256(weight.half().numpy().tobytes()).hexdigest()
    return hashes


if __name__ == "__main__":
    main()
