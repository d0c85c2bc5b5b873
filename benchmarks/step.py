"""One training step of this trainer, of TRL's SDPO trainer and of the plain loop, on the same attempts, in turns.

Shapes: `omega` and `zeta`, 40 steps of the demo whose attempts the plain loop drew beforehand: everybody draws its
own too, which is timed, and learns from those. `large`, a Qwen3-like random model of 55 million weights, attempts of
64 to 128 tokens behind 512, an adapter of rank 16, 8 x 8 attempts in the long form and 1 x 8 in the short; a success
and a remark, about 150 tokens, stand in the teacher's prompts. `0.6B` is the same in Qwen3-0.6B's shape, for a GPU;
`toy` is for tests. Everybody reads as many rows in a pass as a sweep found best for it, which the long form repeats.
Layers are computed twice, as trainers of TRL's kind do unless they are told not to (gradient checkpointing). Memory is
the peak of a process of its own above what it held when its trainer stood there; what it frees goes back at once, so
that no peak is made of gaps.

Ratios of seconds are theirs over ours: above 1, ours is faster. Those of memory, and of ours with ours, say so.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from contest import (
    ATTEMPTS, PHASES, Contestant, Match, Ratios, Step, begin, demo_match, finish, in_turns, loop, means, ours, quiet,
    random_match, rate_of, ratio_of, seconds_of, show_phases, to_read, trl, warm,
)
from scripts import SHAPES, operations
from sdpo_nb.loss.objectives import Objective

ROWS = {"TRL": "1", "ours": "8", "loop": "4"}  # in a pass of a large model, where no sweep says it
SWEEP = {"TRL": ("1", "2", "4", "8"), "ours": ("2", "8", "8/1024")}  # rows, or rows/tokens
WHO = ("TRL", "ours", "ours, plain", "loop")  # plain: share_prompts=False
OBJECTIVES = {
    "top-k": Objective(alpha=1.0, support="student_topk", k=20), "full": Objective(alpha=1.0, support="full"),
}
LEARNING = tuple(phase for phase in PHASES if phase != "sample")


def contestant(name: str, match: Match, rows: str | None, options: argparse.Namespace) -> Contestant:
    "Who takes the steps, by name, with so many rows in a pass, and of ours perhaps so many tokens: 8/1024."
    count, _, tokens = (rows or "").partition("/")
    about = dict(match=match, rows=int(count) if count else None)
    if name in ("TRL", "loop"): return partial(trl if name == "TRL" else loop, **about)
    settings = {} if name == "ours" else {"share_prompts": False}
    if tokens: settings["tokens_per_pass"] = int(tokens)
    return partial(ours, **about, **dict(map(setting, options.set)) | settings)


def setting(words: str) -> tuple[str, Any]:
    "One of our settings, as NAME=VALUE."
    name, _, value = words.partition("=")
    try: return name, json.loads(value)
    except ValueError: return name, value


def match_of(shape: str, objective: str, tasks: int | None, steps: int, options: argparse.Namespace) -> Match:
    "Random attempts of a shape, for so many tasks in a step."
    sized = replace(SHAPES[shape], tasks=tasks or SHAPES[shape].tasks)
    is_eased = steps > 1 and options.device == "cpu"  # the warm-up is what takes so long
    match = random_match(sized, steps, OBJECTIVES[objective], options.device, options.dtype, is_eased=is_eased)
    return replace(match, attempts=options.attempts or match.attempts, is_checkpointed=True)


def threads(options: argparse.Namespace) -> int:
    "Of a random model's contestants."
    return options.threads or os.cpu_count()


def weighed(
    name: str, shape: str, objective: str, rows: str, tasks: int, options: argparse.Namespace
) -> int | None:  # None where 16 GB do not suffice
    "The extra bytes of one contestant, in a process that gives back at once what it frees."
    match = match_of(shape, objective, tasks, 2, options)
    try: steps = in_turns({name: contestant(name, match, rows, options)}, threads(options), weighs=True)[name]
    except MemoryError: return None
    return int(max(step["extra"] for step in steps))


def swept(shape: str, objective: str, options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    "Each contestant at each number of rows: seconds for each attempt, and extra bytes."
    each, found, steps = SHAPES[shape].attempts, {}, {}
    for name, sizes in SWEEP.items():
        for rows in options.sweep or sizes:
            tasks = max(options.sweep_tasks, int(rows.partition("/")[0]) // each)
            extra = weighed(name, shape, objective, rows, tasks, options)
            if extra is None: print(f"  {name:8}{rows:>8}  more than 16 GB", flush=True)
            else: found.setdefault(tasks, {})[name, rows] = extra
    for tasks, sizes in found.items():  # those who take equal steps take them in turns
        match = match_of(shape, objective, tasks, 1 + options.large_steps, options)
        playing = {pair: contestant(pair[0], match, pair[1], options) for pair in sizes}
        for pair, taken in warm(in_turns(playing, threads(options))).items():
            steps[pair] = {"seconds": statistics.mean(seconds_of(taken)) / (tasks * each), "extra": sizes[pair]}
    print(f"  rows in a pass, {objective}: milliseconds for each attempt, extra GB")
    for (name, rows), one in steps.items():
        print(f"  {name:8}{rows:>8}{one['seconds'] * 1e3:9.0f} ms {one['extra'] / 1e9:6.2f} GB", flush=True)
    return {name: {rows: one for (who, rows), one in steps.items() if who == name} for name in SWEEP}


def best_of(sizes: Mapping[str, Mapping[str, Any]]) -> str:
    "The quickest."
    return min(sizes, key=lambda rows: sizes[rows]["seconds"])


def random_bout(shape: str, objective: str, options: argparse.Namespace, ratios: Ratios) -> dict[str, Any]:
    "A random model's step: the sweep, the seconds in turns, the memory of each alone."
    tasks = options.tasks or SHAPES[shape].tasks
    print(f"{shape}, {objective}: {tasks} x {SHAPES[shape].attempts} attempts, {options.device}, {options.dtype}")
    sweep = swept(shape, objective, options) if options.sweeps else {}
    found_best = {name: best_of(sizes) for name, sizes in sweep.items()}
    best = ROWS | found_best | dict(pair.split("=") for pair in options.rows)
    best["ours, plain"] = best["ours"]
    match = match_of(shape, objective, tasks, 1 + options.large_steps, options)
    names = options.contestants or ["TRL", "ours", "ours, plain"]
    found = in_turns({name: contestant(name, match, best[name], options) for name in names}, threads(options))
    losses, found = {name: [step["loss"] for step in steps] for name, steps in found.items()}, warm(found)
    show_phases(found)
    tail = "" if objective == "top-k" else f"_{objective}"
    if {"TRL", "ours"} <= set(names):
        ratios.add(f"{shape}_step_vs_trl{tail}", ratio_of(found["TRL"], found["ours"]), "seconds, TRL / ours")
    if {"ours, plain", "ours"} <= set(names):
        plainly = ratio_of(found["ours"], found["ours, plain"], ["teacher"])
        ratios.add(f"teacher_vs_plain{tail}", plainly, "seconds of the teacher, shared / row by row, both ours")
    of_weight = [name for name in names if name != "ours, plain"] if options.weighs else []
    extra = {name: weighed(name, shape, objective, best[name], tasks, options) for name in of_weight}
    if extra: print("  extra GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in extra.items() if size))
    if extra.get("TRL") and extra.get("ours"):
        reads = "extra bytes, ours / TRL, each at its quickest"
        ratios.add(f"{shape}_memory_vs_trl{tail}", {"ratio": extra["ours"] / extra["TRL"]}, reads)
    if sweep.get("TRL") and sweep.get("ours"):
        least = {name: min(found["extra"] for found in sizes.values()) for name, sizes in sweep.items()}
        reads = "extra bytes, ours / TRL, each where it needs the least"
        ratios.add(f"{shape}_least_memory_vs_trl{tail}", {"ratio": least["ours"] / least["TRL"]}, reads)
    return {
        "phases": {name: means(steps) for name, steps in found.items()}, "losses": losses, "rows": best, "extra": extra,
        "sweep": sweep, "floor": floors(match, shape, options),
    }


def floors(match: Match, shape: str, options: argparse.Namespace) -> dict[str, float]:
    "What teacher and student would take if nothing were read twice and all went at the rate of square products."
    sized = replace(SHAPES[shape], tasks=match.size.tasks)
    rate, read = rate_of(options.device, options.dtype), to_read(match, -1)
    floor = {name: needed / rate for name, needed in operations(sized, read).items()}
    shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in floor.items())
    print(f"  floor at {rate / 1e9:,.0f} billion operations a second: {shown}", flush=True)
    return floor | {"rate": rate} | {f"{name} tokens": count for name, count in read.items()}


def demo_bout(book: str, options: argparse.Namespace, ratios: Ratios) -> dict[str, Any]:
    "A run of the demo, seed by seed."
    print(f"{book}: {options.steps} steps of 64 attempts, {options.seeds} seed{'s' * (options.seeds > 1)}")
    kept: dict[str, list[Step]] = {}
    torch.set_num_threads(options.threads or 1)
    for seed in range(options.seeds):
        match = demo_match(book, options.steps, seed)
        match = replace(match, attempts=options.attempts or match.attempts)
        usual = ["TRL", "ours"] + ["loop"] * (options.is_long or book == "omega")
        names = options.contestants or usual
        found = in_turns({name: contestant(name, match, None, options) for name in names}, options.threads or 1)
        for name, steps in warm(found).items(): kept.setdefault(name, []).extend(steps)
    show_phases(kept)
    if {"TRL", "ours"} <= kept.keys():
        ratios.add(f"demo_step_vs_trl_{book}", ratio_of(kept["TRL"], kept["ours"]), "seconds, TRL / ours")
        learned = ratio_of(kept["TRL"], kept["ours"], LEARNING)
        ratios.add(f"demo_learning_vs_trl_{book}", learned, "the same without drawing the attempts")
    if book == "omega" and {"loop", "ours"} <= kept.keys():
        ratios.add("demo_step_vs_loop", ratio_of(kept["loop"], kept["ours"]), "seconds, the plain loop / ours")
    return {"phases": {name: means(steps) for name, steps in kept.items()}}


def main(words: Sequence[str] | None = None) -> None:
    "Measure, and print tables and ratios."
    parser = begin(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["omega", "zeta", "large"], choices=["omega", "zeta", *SHAPES])
    parser.add_argument("--contestants", nargs="+", choices=WHO, help="of a random model, all but the loop")
    parser.add_argument("--steps", type=int, help="of a demo; the first is a warm-up")
    parser.add_argument("--seeds", type=int, help="of a demo")
    parser.add_argument("--large-steps", type=int, help="of a random model, behind a warm-up")
    parser.add_argument("--tasks", type=int, help="in a step of a random model")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, help="of a random model")
    parser.add_argument("--attempts", choices=ATTEMPTS, help="replaced for the demo, prescribed for a random model")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME=ROWS", help="in a pass, without a sweep")
    parser.add_argument("--sweep", nargs="*", help="rows in a pass to try, for everybody; nothing: each its own")
    parser.add_argument("--sweep-tasks", type=int, default=1, help="in the steps of the sweep, at least")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one of our settings")
    parser.add_argument("--seconds-only", dest="weighs", action="store_false", help="leave the memory out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args(words)
    usual = dict(steps=40, seeds=3, large_steps=3, tasks=0, objectives=["top-k", "full"]) if options.is_long else dict(
        steps=40, seeds=1, large_steps=1, tasks=1, objectives=["top-k"])
    usual["dtype"] = "bfloat16" if options.device == "cuda" else "float32"
    for name, value in usual.items():
        if getattr(options, name) is None: setattr(options, name, value)
    options.sweeps = options.sweep is not None or options.is_long
    quiet()
    ratios, shapes = Ratios(), {}
    for shape in options.shapes:
        if shape in SHAPES:
            for objective in options.objectives:
                shapes[f"{shape}, {objective}"] = random_bout(shape, objective, options, ratios)
        else: shapes[shape] = demo_bout(shape, options, ratios)
    finish(ratios.as_json() | {"shapes": shapes}, options)


if __name__ == "__main__": main()
