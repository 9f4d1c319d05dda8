"""All packed tensors of a model in files, for devices that shall get them packed: the coordinator runs this.

``python -m edge_node.stage.pack_model --model DIR --out DIR --packing JSON`` packs block by block, with the code that
packs on a device, and prints a line of JSON after each. Whoever starts it holds its standard input open: when that
ends, so does this.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edge_node.stage.architecture import build_meta_model, list_block_linears, parse_config, rebuild_buffers
from edge_node.stage.packing import StagePacker
from edge_node.stage.stored_names import StoredNames
from edge_node.stage.weights import LocalSource, TensorSource
from plutino.errors import PlutinoError
from plutino.families import family_of
from plutino.job.model import Packing
from plutino.manifest import packed_name
from plutino.safetensors_index import INDEX_FILE


def main() -> int:
    """Command line; gives the process's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--packing", required=True, help="plutino.job.model.Packing as JSON")
    options = parser.parse_args()
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        for done, total in pack_model(
            LocalSource(options.model), Packing.model_validate_json(options.packing), options.out
        ):
            print(json.dumps({"done": done, "total": total}), flush=True)
    except PlutinoError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0


def pack_model(source: TensorSource, packing: Packing, out_dir: Path) -> Iterator[tuple[int, int]]:
    """Write packed tensors, and at last the index that makes their folder whole; memory holds one block's.

    Yields:
        Blocks done, and blocks in all.

    Raises:
        ModelError, QuantizationError: the model cannot be read, or not be packed so.
    """
    config = parse_config(source.config())
    family = family_of(config.model_type)
    model = build_meta_model(config, dtype=torch.float32, attention=family.attention)
    linears = list_block_linears(model, family)
    rebuild_buffers(model)
    is_tied = bool(family.head) and bool(config.tie_word_embeddings)
    stored_names = StoredNames(model, source.names(), family, is_tied=is_tied)
    kept = _Kept()
    packer = StagePacker(
        source, stored_names.find, packing, dtype=torch.float32, device=torch.device("cpu"), cache=kept
    )
    num_blocks: int = config.num_hidden_layers
    weight_map: dict[str, str] = {}

    def write(number: int) -> None:
        if kept.tensors:
            file = f"packed-{number:05d}.safetensors"
            save_file(kept.tensors, out_dir / file)
            weight_map.update(dict.fromkeys(kept.tensors, file))
            kept.tensors.clear()

    for block in range(num_blocks):
        own = [name for name in linears if name.startswith(f"{family.block_prefix}{block}.")]
        packer.pack_linears(model, own)
        for name in own:
            model.set_submodule(name, nn.Identity())  # lets go of what was packed
        write(block)
        yield block + 1, num_blocks
    packer.pack_outer(
        model, family.embedding[0].removesuffix(".weight"), family.head.removesuffix(".weight") if family.head else None
    )
    write(num_blocks)
    (out_dir / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class _Kept:
    """Takes what is packed, and has nothing."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def load(self, name: str, scheme: str) -> dict[str, Tensor] | None:
        return None

    def holds(self, name: str, scheme: str) -> bool:
        return False

    def prepare(self, name: str, scheme: str) -> None:
        pass

    def save(self, name: str, scheme: str, packed: Mapping[str, Tensor]) -> None:
        self.tensors |= {packed_name(name, scheme, part): tensor.contiguous() for part, tensor in packed.items()}


def _end_with_stdin() -> None:
    # Not by way of sys.stdin, whose lock the interpreter wants when it ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
