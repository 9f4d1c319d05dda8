"""What packed layers cost: time against a bf16 layer, bits, errors. ``python -m benchmarks.quantize``.

Every contender takes turns with a bf16 ``nn.Linear`` in one process, and what counts is the ratio to that layer's time
of the same turn. A second bf16 layer shows what this machine calls no difference (A/A). Libraries are compared where
they can be imported; ``--peers DIR`` names a folder filled by ``pip install --no-deps --target DIR bitsandbytes
torchao hqq optimum-quanto termcolor ninja``, which keeps them out of the environment.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.goals import Goal, goal_table
from benchmarks.measure import MIN_TURNS, RESULTS_DIR, machine_facts, write_results
from benchmarks.quantize_peers import REFERENCE, Layer, builders

SHAPES = ((2048, 2048), (2048, 8192))
"""(in_features, out_features)."""
NUM_TOKENS = (256, 2048)
QUALITY_SIZE = 2048
"""Rows and columns of the weight whose bits and errors are told."""
NUM_THREADS = (1, 2)
GOAL_TOKENS = 2048
MOST_RATIO = {"int8": 1.3, "nf4, bitsandbytes' kernel": 1.3, "nf4, torch alone": 1.6}
MOST_BITS = {"int8": 8.1, "nf4, torch alone": 4.13 + 32 / 2048**2}
"""Goals; nf4's mean constant is one fp32 a matrix."""
SLOWER_IN_GRAPH_BYTES = 0.5
"""A layer that keeps more bytes a weight than this for the backward pass has paid for its speed with memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured situation."""

    in_features: int
    out_features: int
    num_tokens: int
    num_threads: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.in_features}->{self.out_features}, {self.num_tokens} tokens, {self.num_threads} thread(s)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One contender in one case; seconds by turn."""

    case: Case
    contender: str
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    reference_forward_s: tuple[float, ...]
    reference_backward_s: tuple[float, ...]

    @property
    def forward_ratio(self) -> float:
        """Median over turns of the forward pass's ratio to bf16."""
        return _median_ratio(self.forward_s, self.reference_forward_s)

    @property
    def ratio(self) -> float:
        """The same of forward and backward together."""
        both = [one + other for one, other in zip(self.forward_s, self.backward_s, strict=True)]
        reference = zip(self.reference_forward_s, self.reference_backward_s, strict=True)
        return _median_ratio(both, [one + other for one, other in reference])


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one contender makes of a square Gaussian bf16 weight."""

    contender: str
    bits_per_weight: float
    graph_bytes_per_weight: float
    """Kept from the forward to the backward pass, beside input and packed weight."""
    output_error: float
    """Relative to the product in fp32, for bf16 activations."""
    gradient_cosine: float
    """Of the input's gradient after an evaluation pass with that of the fp32 layer."""
    weight_error: float
    """Of the weight seen through the product with the identity."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    if options.peers is not None:
        sys.path.append(str(options.peers))
    contenders, missing = builders()
    if options.only:
        contenders = {name: build for name, build in contenders.items() if name in (REFERENCE, *options.only)}
    for library, reason in missing.items():
        print(f"without {library}: {reason}")
    torch.manual_seed(0)
    qualities = [quality(name, build) for name, build in contenders.items()]
    print(quality_table(qualities), flush=True)
    timings: list[Timing] = []
    clock = time.process_time if options.cpu_time else time.perf_counter
    for case in _cases(options):
        torch.set_num_threads(case.num_threads)
        weight = _gaussian(case.out_features, case.in_features)
        layers = {name: build(weight) for name, build in contenders.items()}
        timings += time_in_turns(case, layers, num_turns=options.turns, clock=clock)
        print(timing_table(timings[-len(layers) :]), flush=True)
    goals = quantize_goals(qualities, timings)
    if goals:
        print(goal_table(goals))
    packages = ("torch", "bitsandbytes", "torchao", "hqq", "optimum-quanto")
    document: dict[str, object] = {
        "machine": {**machine_facts(packages), "capability": torch.backends.cpu.get_cpu_capability()},
        "clock": "process CPU time" if options.cpu_time else "wall",
        "missing": missing,
        "qualities": [asdict(each) for each in qualities],
        "timings": [
            {**asdict(each), "forward_ratio": each.forward_ratio, "forward_and_backward_ratio": each.ratio}
            for each in timings
        ],
        "goals": [goal.to_dict() for goal in goals],
    }
    write_results(options.out, document)
    print(f"all figures: {options.out}")
    return 0


def time_in_turns(
    case: Case, layers: Mapping[str, Layer], *, num_turns: int, clock: Callable[[], float]
) -> list[Timing]:
    """Let the layers take turns; the order is reversed every round."""
    x = _gaussian(case.num_tokens, case.in_features).mul(50).requires_grad_()
    gradient = _gaussian(case.num_tokens, case.out_features)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    names = list(layers)
    for turn in range(num_turns + 1):
        for name in names if turn % 2 == 0 else reversed(names):
            x.grad = None
            started_s = clock()
            y = layers[name].module(x)
            forward_s = clock() - started_s
            started_s = clock()
            y.backward(gradient)
            # The first round warms up.
            if turn:
                seconds[name].append((forward_s, clock() - started_s))
    forwards = {name: tuple(turn[0] for turn in turns) for name, turns in seconds.items()}
    backwards = {name: tuple(turn[1] for turn in turns) for name, turns in seconds.items()}
    return [
        Timing(
            case=case,
            contender=name,
            forward_s=forwards[name],
            backward_s=backwards[name],
            reference_forward_s=forwards[REFERENCE],
            reference_backward_s=backwards[REFERENCE],
        )
        for name in names
    ]


def quality(name: str, build: Callable[[Tensor], Layer]) -> Quality:
    """Bits, memory, errors and the gradient after an evaluation pass of one contender."""
    weight = _gaussian(QUALITY_SIZE, QUALITY_SIZE)
    layer = build(weight)
    x = _gaussian(256, QUALITY_SIZE).mul(50)
    exact = x.float().requires_grad_()
    exact_y = exact @ weight.float().t()
    gradient = _gaussian(256, QUALITY_SIZE)
    exact_y.backward(gradient.float())
    layer.module.eval()
    with torch.no_grad():
        layer.module(x)
        seen = layer.module(torch.eye(QUALITY_SIZE, dtype=torch.bfloat16)).t().float()
    layer.module.train()
    own = {tensor.data_ptr() for tensor in (*layer.module.parameters(), *layer.module.buffers()) if tensor.numel()}
    kept: dict[int, int] = {}
    x.requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        # Of another type is a library's packed weight itself, which may have no storage to ask for.
        if type(tensor) in (Tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer.module(x)
    y.backward(gradient)
    assert x.grad is not None and exact.grad is not None
    graph_bytes = sum(size for pointer, size in kept.items() if pointer not in own | {x.data_ptr()})
    cosine = torch.cosine_similarity(x.grad.float().flatten(), exact.grad.flatten(), dim=0)
    return Quality(
        contender=name,
        bits_per_weight=8 * layer.held_bytes / weight.numel(),
        graph_bytes_per_weight=graph_bytes / weight.numel(),
        output_error=_relative_error(y.detach().float(), exact_y.detach()),
        gradient_cosine=float(cosine),
        weight_error=_relative_error(seen, weight.float()),
    )


def quantize_goals(qualities: Sequence[Quality], timings: Sequence[Timing]) -> list[Goal]:
    """Bits, times, and no slower than a library's layer that keeps as little in the graph."""
    goals = [
        Goal(name=f"{each.contender}: bits a weight", measured=each.bits_per_weight, at_most=MOST_BITS[each.contender])
        for each in qualities
        if each.contender in MOST_BITS
    ]
    lean = {each.contender for each in qualities if each.graph_bytes_per_weight <= SLOWER_IN_GRAPH_BYTES}
    for timing in timings:
        most = MOST_RATIO.get(timing.contender)
        if most is None or timing.case.num_tokens != GOAL_TOKENS:
            continue
        name = f"{timing.contender}, {timing.case.name}"
        goals.append(Goal(name=f"{name}: time / bf16", measured=timing.ratio, at_most=most))
        peers = [
            peer.ratio
            for peer in timings
            if peer.case == timing.case and peer.contender in lean and _is_peer_of(timing.contender, peer.contender)
        ]
        if peers:
            goals.append(Goal(name=f"{name}: time / best peer's", measured=timing.ratio / min(peers), at_most=1.0))
    return goals


def _is_peer_of(ours: str, contender: str) -> bool:
    # Of nf4, the fastest way that this machine has is the one to compare.
    return ours != "nf4, torch alone" and contender.endswith(f" {ours.partition(',')[0]}")


def quality_table(qualities: Sequence[Quality]) -> str:
    """Plain text: a line a contender."""
    lines = [f"{'contender':<26} {'bits':>6} {'kept B':>7} {'W error':>8} {'y error':>8} {'cosine':>7}"]
    lines += [
        f"{each.contender:<26} {each.bits_per_weight:>6.3f} {each.graph_bytes_per_weight:>7.2f} "
        f"{each.weight_error:>8.4f} {each.output_error:>8.4f} {each.gradient_cosine:>7.4f}"
        for each in qualities
    ]
    return "\n".join(lines)


def timing_table(timings: Sequence[Timing]) -> str:
    """Plain text: a line a contender of one case."""
    reference = next(each for each in timings if each.contender == REFERENCE)
    lines = [
        f"{timings[0].case.name}: bf16 takes {1e3 * statistics.median(reference.forward_s):.1f} ms forward, "
        f"{1e3 * statistics.median(reference.backward_s):.1f} ms backward",
        f"  {'ratio to bf16':<26} {'forward':>8} {'both':>6}",
    ]
    lines += [
        f"  {each.contender:<26} {each.forward_ratio:>8.2f} {each.ratio:>6.2f}"
        for each in timings
        if each.contender != REFERENCE
    ]
    return "\n".join(lines)


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(in_features=in_features, out_features=out_features, num_tokens=num_tokens, num_threads=num_threads)
        for num_threads in options.threads
        for in_features, out_features in SHAPES
        for num_tokens in options.tokens
    ]


def _gaussian(*shape: int) -> Tensor:
    return (torch.randn(*shape) * 0.02).bfloat16()


def _median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(seconds, reference, strict=True))


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _num_turns(text: str) -> int:
    num_turns = int(text)
    if num_turns < MIN_TURNS:
        raise argparse.ArgumentTypeError(f"{num_turns} turns give no figure worth quoting; take at least {MIN_TURNS}")
    return num_turns


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--turns", type=_num_turns, default=9, help="turns of each contender in each case")
    parser.add_argument("--threads", type=int, nargs="+", default=list(NUM_THREADS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(NUM_TOKENS))
    parser.add_argument("--only", nargs="+", help="only these contenders beside the reference")
    parser.add_argument("--peers", type=Path, default=None, help="folder with the libraries to compare")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for a machine that others use too")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "quantize.json", help="where the figures go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
