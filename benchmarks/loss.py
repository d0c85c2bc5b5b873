"""The fused loss beside TRL's functions and the bare matrix products: seconds and extra memory, from hidden states.

Each variant runs in a process of its own, so that no allocator's leftovers count for another. Extra memory is the peak
of the measured call above what stood before it: inputs, heads and, where the code is compiled, the compiler.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable

import torch
from peers import apart, peak_memory, stamp
from torch import Tensor

OBJECTIVES = {
    "full JSD": dict(alpha=0.5, support="full"),
    "full reverse KL": dict(alpha=1.0, support="full"),
    "top-100 JSD, tail": dict(alpha=0.5, support="student_topk", k=100),
    "sampled token": dict(alpha=1.0, support="sampled"),
}
LIMIT = 22 * 10**9  # bytes of address space a variant may take; TRL's full JSD of 4,096 tokens wants 35


def inputs(options: argparse.Namespace) -> dict[str, Tensor]:
    "Hidden states of both readers, one frozen head, the sampled tokens."
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    to = lambda x: x.to(options.device, getattr(torch, options.dtype))
    student = normal(1, options.tokens, options.width)
    return dict(
        student=to(student).requires_grad_(), teacher=to(student + 0.3 * normal(*student.shape)),
        weight=to(normal(options.words, options.width).mul_(0.02)).requires_grad_("trains" in options.variant),
        ids=torch.randint(options.words, (1, options.tokens), generator=draw).to(options.device),
    )


def bare(student: Tensor, teacher: Tensor, weight: Tensor, ids: Tensor) -> None:
    "The products that a frozen head cannot do without: both readers' logits, the gradient of the hidden states."
    with torch.no_grad():
        linear = torch.nn.functional.linear
        _, logits = linear(teacher[0], weight), linear(student[0], weight)
        student.grad = (logits @ weight)[None]


def trl(which: str) -> Callable[..., None]:
    "One of TRL's functions, from hidden states to their gradient."
    from trl.experimental.sdpo import loss_utils

    def run(student: Tensor, teacher: Tensor, weight: Tensor, ids: Tensor) -> None:
        objective = OBJECTIVES[which]
        logits = torch.nn.functional.linear(student, weight)
        with torch.no_grad(): teacher_logits = torch.nn.functional.linear(teacher, weight)
        if objective["support"] == "full":
            per_token = loss_utils.compute_full_logit_self_distillation_loss(
                logits, teacher_logits, distillation_alpha=objective["alpha"]
            )
        elif objective["support"] == "sampled":
            per_token = loss_utils.compute_sampled_token_self_distillation_loss(
                logits, teacher_logits, ids, distillation_alpha=1.0
            )
        else:
            per_token = loss_utils.compute_topk_self_distillation_loss(
                logits, teacher_logits, distillation_topk=objective["k"],
                distillation_alpha=objective["alpha"], distillation_add_tail=True,
            )
        per_token.mean().backward()

    return run


def trl_tiled(which: str) -> Callable[..., None]:
    "The tiled divergence of TRL's trainer for external teachers."
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def run(student: Tensor, teacher: Tensor, weight: Tensor, ids: Tensor) -> None:
        mask, beta = torch.ones_like(ids), OBJECTIVES[which]["alpha"]
        _chunked_divergence_loss(student, teacher, weight, weight.detach(), mask, beta)[0].backward()

    return run


def ours(which: str, is_compiled: bool) -> Callable[..., None]:
    "The fused loss of this package."
    from sdpo_nb.loss import Objective, fused_distillation_loss

    def run(student: Tensor, teacher: Tensor, weight: Tensor, ids: Tensor) -> None:
        objective = Objective(**OBJECTIVES[which])
        fused_distillation_loss(
            student, weight, teacher, weight.detach(), ids, torch.ones_like(ids), objective, is_compiled=is_compiled
        ).loss.backward()

    return run


def variant(name: str) -> Callable[..., None]:
    "What to run, by its name."
    way, _, which = name.partition(": ")
    if way == "bare products": return bare
    if way == "TRL": return trl(which)
    if way == "TRL tiled": return trl_tiled(which)
    return ours(which, is_compiled="compiled" in way)


def measure(options: argparse.Namespace) -> dict[str, float]:
    "Seconds and extra bytes of one variant, in this process."
    if options.device == "cpu": resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    run, given = variant(options.variant), inputs(options)
    cut = lambda x: x.detach()[:, :64].requires_grad_(x.requires_grad)
    few = {name: x if name == "weight" else cut(x) for name, x in given.items()}
    run(**few)
    seconds, extra = [], 0
    for _ in range(options.repeats):
        given["student"].grad = given["weight"].grad = None
        peak_memory(options.device), peak_memory(options.device)
        before, start = peak_memory(options.device), time.perf_counter()
        run(**given)
        if options.device != "cpu": torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        returned = 0 if given["weight"].grad is None else given["weight"].grad.nbytes
        extra = max(extra, peak_memory(options.device) - before - returned)
    return {"seconds": min(seconds), "extra": extra}


def alone(name: str, tokens: int, options: argparse.Namespace) -> dict[str, float] | None:
    "The same in a process of its own; None where the memory does not suffice."
    return apart(__file__, [
        "--variant", name, "--tokens", str(tokens), "--words", str(options.words),
        "--width", str(options.width), "--device", options.device, "--dtype", options.dtype,
        "--repeats", str(options.repeats),
    ])


def table(tokens: int, names: list[str], options: argparse.Namespace) -> dict[str, dict[str, float] | None]:
    "Measure variants, and print a line for each as it comes."
    print(f"{tokens:,} tokens, {options.words:,} words, width {options.width:,}, {options.dtype}, {options.device}")
    found = {}
    for name in names:
        found[name] = result = alone(name, tokens, options)
        if result is None:
            print(f"  {name:36} needs more memory than there is", flush=True)
            continue
        bare = found.get("bare products")
        beside = f"  {result['seconds'] / bare['seconds']:5.2f}x the bare products" if bare else ""
        print(f"  {name:36} {result['seconds']:7.2f} s  {result['extra'] / 1e6:8,.0f} MB{beside}", flush=True)
    return found


def ratios(tokens: int, found: dict[str, dict[str, float] | None]) -> dict[str, float]:
    "Ours over the bare products in time, ours over TRL in time and memory."
    result = {}
    for name, ours in found.items():
        way, _, which = name.partition(": ")
        if not way.startswith("ours") or ours is None: continue
        key, peer = f"{tokens} tokens, {which}, {way.removeprefix('ours, ')}", found.get(f"TRL: {which}")
        result[f"{key}: time over bare products"] = ours["seconds"] / found["bare products"]["seconds"]
        if peer is None: continue
        result[f"{key}: time over TRL"] = ours["seconds"] / peer["seconds"]
        result[f"{key}: memory over TRL"] = ours["extra"] / peer["extra"]
    return result


def main() -> None:
    "Measure, and print tables and ratios."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--words", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=3, help="the quickest counts")
    parser.add_argument("--growth", type=int, nargs="*", default=[256, 16_384], help="tokens for memory alone")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--variant", help="measure this one alone, in this process")
    parser.add_argument("--json", action="store_true", help="print the result last, as one JSON object")
    options = parser.parse_args()
    if options.variant:
        options.tokens = options.tokens[0]
        print(json.dumps(measure(options)))
        return
    tables, found_ratios = {}, {}
    for tokens in options.tokens:
        names = ["bare products"]
        for which in options.objectives:
            names += [f"TRL: {which}", f"ours, eager: {which}", f"ours, compiled: {which}"]
        names += ["ours, eager, the head trains: full JSD"] + ["TRL tiled: full JSD"] * (tokens == min(options.tokens))
        tables[tokens] = table(tokens, names, options)
        found_ratios |= ratios(tokens, tables[tokens])
    for tokens in options.growth:
        peers = [f"TRL: {which}" for which in options.objectives] * (tokens < min(options.tokens))
        tables[tokens] = table(tokens, [*peers, "ours, eager: full JSD"], options)
    if options.json: print(json.dumps({"ratios": found_ratios, "tables": tables} | stamp()))


if __name__ == "__main__": main()
