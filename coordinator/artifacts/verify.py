"""Verifies a staged adapter with stock peft and transformers; runs as ``python -m coordinator.artifacts.verify``.

JSON of a :class:`VerifyRequest` comes on standard input, JSON of a :class:`VerifyReport` goes to standard output. It
imports torch and peft, so no other module may import it: ``verify_process.py`` starts it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import peft
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from coordinator.artifacts.probe_loss import loss_sum_of, padded
from coordinator.artifacts.verify_process import Check, Probe, VerifyReport, VerifyRequest
from plutino.errors import ExportError, PlutinoError
from plutino.job.objective_part import LENGTH_DISCOUNTS
from plutino.load_adapter import expected_shapes, has_own_layout, load_adapter
from plutino.safetensors_index import INDEX_FILE, SINGLE_FILE, read_safetensors_headers
from plutino.sizes import format_size

# Shape suffixes: B rows, T padded tokens, V vocabulary, N label tokens.

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of the reloaded loss sum from the pipeline's.

The two add the same numbers up in another order (other kernels, another batch composition). In fp32 that moves a loss
by about 1e-6, so 1e-4 is far from chance. bf16 rounds every activation to 2**-9 of itself; over the blocks the
roundings partly cancel, and five of them all in one direction are 1e-2.
"""

_SHOWN_NAMES = 3

TensorKind = tuple[tuple[int, ...], str]
"""Shape, and dtype by the name that the safetensors format uses."""


def main() -> NoReturn:
    """Answer one request and end the process; the exit code is 0 whenever there is a verdict."""
    # Libraries print to standard output; only the report may stand there.
    report_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if len(sys.argv) > 1:
        import_ahead(Path(sys.argv[1]))
    request = VerifyRequest.model_validate_json(sys.stdin.read())
    # Unhandled, it ends the process, inside a long call into a library too.
    signal.alarm(request.time_limit_s)
    try:
        report = verify_adapter(request)
    except PlutinoError as error:
        report = VerifyReport(failure=str(error))
    with os.fdopen(report_fd, "w", encoding="utf-8") as stdout:
        stdout.write(report.model_dump_json())
    sys.stderr.flush()
    # Somebody waits for this process's end, and the interpreter would take a second to take torch and the model apart.
    os._exit(0)


def import_ahead(base_dir: Path) -> None:
    """Import a base model's family, which transformers does when one of its models is first made.

    Of whatever class: what the adapter is for is known with the request, and not every family has a model for it.
    """
    config = AutoConfig.from_pretrained(base_dir, local_files_only=True)
    with torch.device("meta"):
        AutoModel.from_config(config, dtype=torch.float32)


def verify_adapter(request: VerifyRequest) -> VerifyReport:
    """Check names, shapes and dtypes; where the base fits the budget, reload it and compare the probe's loss.

    Raises:
        ExportError: a check failed.
        ModelError: the base's files cannot be read.
    """
    base_dir, adapter_dir = Path(request.base_dir), Path(request.adapter_dir)
    probe = request.probe
    checks = [check_tensors(base_dir, adapter_dir, probe)]
    if probe is None:
        return VerifyReport(checks=(*checks, ("reload", "not done: there are no probe rows")))
    if probe.packing.scheme == "gptq":
        outcome = "not done: transformers runs a GPTQ checkpoint only with a library beside it"
        return VerifyReport(checks=(*checks, ("reload", outcome)))
    needed_bytes = reload_bytes(base_dir, adapter_dir, probe)
    if needed_bytes > request.reload_budget_bytes:
        allowed = format_size(request.reload_budget_bytes)
        outcome = f"not done: base and adapter in {probe.dtype} need {format_size(needed_bytes)}, allowed are {allowed}"
        return VerifyReport(checks=(*checks, ("reload", outcome)))
    checks.append(check_reload(base_dir, adapter_dir, probe))
    return VerifyReport(checks=tuple(checks), was_reloaded=True)


def check_tensors(base_dir: Path, adapter_dir: Path, probe: Probe | None = None) -> Check:
    """Compare names, shapes and dtypes with what the adapter's loader expects for this base; loads no weight.

    Raises:
        ExportError: they differ.
    """
    base_class, settings = _base_class(base_dir, probe)
    config = AutoConfig.from_pretrained(base_dir, local_files_only=True, **settings)
    with torch.device("meta"):
        base = base_class.from_config(config, dtype=torch.float32)
    if _is_model(adapter_dir):
        stored = read_safetensors_headers(adapter_dir)
        found = {name: (entry.shape, entry.dtype) for name, entry in stored.items()}
        expected = {name: _kind(parameter) for name, parameter in base.named_parameters()}
        # Buffers, and a head that its model ties unless the checkpoint has one.
        expected |= {name: _kind(tensor) for name, tensor in base.state_dict().items() if name in found}
        _require_equal_kinds(expected, found, "transformers")
        return "stock transformers", f"expects the same {len(found)} tensors with the same shapes and dtypes"
    found = _kinds_in_file(adapter_dir / "adapter_model.safetensors")
    num_parameters = sum(math.prod(shape) for shape, _ in found.values())
    same = f"expects the same {len(found)} tensors with the same shapes and dtypes, {num_parameters} parameters"
    if has_own_layout(adapter_dir):
        expected_own = {name: (shape, "F32") for name, shape in expected_shapes(base, adapter_dir).items()}
        _require_equal_kinds(expected_own, found, "load_adapter")
        return "layout", f"plutino.load_adapter, on the base without its weights, {same}"
    adapter_config = peft.PeftConfig.from_pretrained(str(adapter_dir))
    # It may name the model on the hub that lies in the folder; peft would look there for the vocabulary's size.
    adapter_config.base_model_name_or_path = str(base_dir)
    model = peft.get_peft_model(base, adapter_config, low_cpu_mem_usage=True)
    expected_by_peft = {name: _kind(tensor) for name, tensor in get_peft_model_state_dict(model).items()}
    _require_equal_kinds(expected_by_peft, found, "peft")
    return "stock peft", f"peft {peft.__version__}, on the base without its weights, {same}"


def reload_bytes(base_dir: Path, adapter_dir: Path, probe: Probe) -> int:
    """Memory that a reloaded base with the adapter takes, and one micro-batch's logits in fp32 twice."""
    element_bytes = DTYPES[probe.dtype].itemsize
    base_bytes = sum(math.prod(entry.shape) for entry in read_safetensors_headers(base_dir).values()) * element_bytes
    vocab_size = int(AutoConfig.from_pretrained(base_dir, local_files_only=True).vocab_size)
    logits_bytes = max(len(rows.lengths) * rows.padded_tokens for rows in probe.micro_batches) * vocab_size * 4 * 2
    if _is_model(adapter_dir):
        # One of the two at a time, which is fp32.
        return base_bytes + logits_bytes
    return base_bytes + (adapter_dir / "adapter_model.safetensors").stat().st_size + logits_bytes


@torch.inference_mode()
def check_reload(base_dir: Path, adapter_dir: Path, probe: Probe) -> Check:
    """Load base and adapter as any user would, and compare the probe's loss with the pipeline's.

    Where the pipeline quantised the base the two losses differ by what that rounds: they are told, and only that the
    reloaded one is finite is asked for.

    Raises:
        ExportError: the loss sums differ by more than the tolerance, logits are not finite, or the probe has another
            number of label tokens than the pipeline counted.
    """
    _require_count(probe)
    loss_sum, first_loss, first_base_loss = _losses(base_dir, adapter_dir, probe)
    difference = abs(loss_sum - probe.loss_sum) / max(abs(probe.loss_sum), 1e-12)
    tolerance = LOSS_TOLERANCE[probe.dtype]
    compared = (
        f"loss sum {loss_sum:.6f} over {probe.num_counted:g} {probe.counted} in {probe.dtype}, the pipeline's "
        f"{probe.loss_sum:.6f}, relative difference {difference:.1e}, tolerance {tolerance:.0e}"
    )
    if not probe.packing.is_plain:
        compared = (
            f"loss sum {loss_sum:.6f} over {probe.num_counted:g} {probe.counted} on the base in {probe.dtype}, "
            f"{probe.loss_sum:.6f} in the pipeline, whose base was held in {probe.packing.scheme}: not comparable"
        )
    # Written so that a difference that is not a number fails too.
    elif not difference <= tolerance:
        raise ExportError(
            f"the reloaded adapter does not do what was trained: {compared}; nothing was published: a "
            "tensor is wrong or in the wrong place, please report this with the job's log"
        )
    # How much the comparison could have noticed: an adapter that changes less than the tolerance cannot fail it.
    effect = abs(first_base_loss - first_loss) / max(abs(first_loss), 1e-12)
    power = "" if effect > tolerance else ", too little for this check to tell a wrong adapter from the right one"
    first = f"of the first row {first_loss:.6f}, without the adapter {first_base_loss:.6f}"
    return "reload", f"{compared}; {first} (relative difference {effect:.1e}{power})"


def _losses(base_dir: Path, adapter_dir: Path, probe: Probe) -> tuple[float, float, float]:
    """Loss sum of the trained model, and of its first row with and without what was trained, as users load them.

    One row tells whether the adapter changes anything; all of them would double the passes through the whole base.
    """
    first = probe.model_copy(update={"micro_batches": (probe.micro_batches[0].first,)})

    def load(folder: Path) -> Any:
        base_class, settings = _base_class(base_dir, probe)
        dtype = DTYPES[probe.dtype]
        if "num_labels" in settings:
            # A base that was trained to score has a head of its own, which the adapter's replaces.
            settings = settings | {"ignore_mismatched_sizes": True}
        return base_class.from_pretrained(folder, dtype=dtype, local_files_only=True, **settings).eval()

    def with_first(model: Any, without_adapter: Callable[[], AbstractContextManager[Any]]) -> tuple[float, float]:
        return loss_sum_of(model, probe, without_adapter), loss_sum_of(model, first, without_adapter)

    if _is_model(adapter_dir):
        # One of the two at a time.
        trained = with_first(load(adapter_dir), nullcontext)
        return *trained, loss_sum_of(load(base_dir), first, nullcontext)
    model, without_adapter = _with_adapter(load(base_dir), adapter_dir)
    trained = with_first(model, without_adapter)
    with without_adapter():
        return *trained, loss_sum_of(model, first, without_adapter)


def _is_model(folder: Path) -> bool:
    """Whether the folder holds a whole model in an adapter's place."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def _with_adapter(base: Any, adapter_dir: Path) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The base with the adapter, as its users load it, and what switches the adapter off for a while."""
    if has_own_layout(adapter_dir):
        return base.eval(), load_adapter(base, adapter_dir).disable_adapter
    if not hasattr(base, "prepare_inputs_for_generation"):
        # peft 0.21 exchanges it to switch virtual tokens off, also of models that score and never generate.
        base.prepare_inputs_for_generation = None
    model = peft.PeftModel.from_pretrained(base, str(adapter_dir)).eval()
    return model, model.disable_adapter


def _require_count(probe: Probe) -> None:
    num_pairs = sum(len(rows.pair_ids) // 2 for rows in probe.micro_batches)
    if probe.counted != "rows":
        num_labels_B = torch.cat([padded(rows)[2][:, 1:].sum(dim=1) for rows in probe.micro_batches])
        weights_B = num_labels_B[num_labels_B > 0].double() ** (1 - LENGTH_DISCOUNTS.get(probe.counted, 0.0))
        num_counted = float(weights_B.sum())
    else:
        num_counted = num_pairs or sum(len(rows.lengths) for rows in probe.micro_batches)
    if not math.isclose(num_counted, probe.num_counted):
        raise ExportError(
            f"the probe has {num_counted:g} {probe.counted} but the pipeline counted {probe.num_counted:g}; "
            "nothing was published: the loss sums cannot be compared, please report this"
        )


def _base_class(base_dir: Path, probe: Probe | None) -> tuple[Any, dict[str, int]]:
    """The class of transformers that the adapter is for, and what it is made with."""
    if AutoConfig.from_pretrained(base_dir, local_files_only=True).is_encoder_decoder:
        return AutoModelForSeq2SeqLM, {}
    if probe is None or probe.objective is None or not probe.objective.has_score_head:
        return AutoModelForCausalLM, {}
    return AutoModelForSequenceClassification, {"num_labels": probe.objective.num_outputs}


def _kind(tensor: Tensor) -> TensorKind:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype))


def _kinds_in_file(path: Path) -> dict[str, TensorKind]:
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        return {name: (tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()}


def _require_equal_kinds(expected: Mapping[str, TensorKind], found: Mapping[str, TensorKind], loader: str) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unknown to {loader}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {_text(found[name])}, {loader} expects {_text(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if problems:
        raise ExportError(
            f"the joined adapter is not what {loader} would load: {len(problems)} of "
            f"{len(expected)} tensors differ: {'; '.join(problems[:_SHOWN_NAMES])}; nothing was published: please "
            "report this with the job's method settings"
        )


def _text(kind: TensorKind) -> str:
    return f"{kind[1]} {list(kind[0])}"


if __name__ == "__main__":
    main()
