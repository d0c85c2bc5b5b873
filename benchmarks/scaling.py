"""What a step of this trainer costs against the size of everything, attempts prescribed: teacher and student alone.

One size is varied at a time, on a Qwen3-like random model with an adapter; all its values take their steps in turns.
A slope is that of the logarithm of seconds over the logarithm of the size: 0 costs nothing, 1 is linear. Beside it
stand the slopes of what there is to compute, when each beginning that rows share is read once, and when each row is
read by itself.

Half of the rows may have no signal in two ways: whole tasks, whose attempts all failed without a word, or half of the
attempts at every task, whose prompts then have to be read all the same.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from contest import (
    Ratios, Step, begin, finish, in_turns, ours, quiet, random_match, ratio_of, seconds_of, to_read, warm,
)
from scripts import Shape, operations
from sdpo_nb.loss.objectives import Objective

OBJECTIVE = Objective(alpha=1.0, support="student_topk", k=20)
READ = ("teacher", "student")
BASE = Shape(
    hidden=128, layers=4, heads=4, head_size=32, words=16_384, tasks=4, attempts=8, prompt=256, shortest=32, longest=32,
    remark=16,
)
SMALL = Shape(
    hidden=32, layers=2, heads=2, head_size=16, words=512, tasks=2, attempts=2, prompt=24, shortest=6, longest=6,
    remark=4,
)


def sweeps(base: Shape, by: Sequence[int]) -> dict[str, dict[int, Shape]]:
    "Each size with its values. Where it would drown, the prompt is short, as are attempts at a task behind a long one."
    times = lambda x: [x * factor for factor in by]
    attempt = lambda size: replace(base, shortest=size, longest=size)
    behind = replace(attempt(base.longest // 2), prompt=2 * base.prompt, remark=base.remark // 2)
    return {
        "attempts at a task": {n: replace(behind, attempts=n) for n in times(max(4, base.attempts // 2))},
        "prompt": {n: replace(base, prompt=n) for n in times(base.prompt // 2)},
        "attempt": {n: replace(attempt(n), prompt=16) for n in times(base.longest)},
        "words": {n: replace(base, words=n, prompt=16) for n in times(base.words)},
        "tasks with a signal": {
            n: replace(base, tasks=max(by), silent_tasks=max(by) - n) for n in by
        },
    }


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    "Of the line through logarithms that is nearest."
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys)]
    across, up = (sum(values) / len(points) for values in zip(*points))
    return sum((x - across) * (y - up) for x, y in points) / sum((x - across) ** 2 for x, _ in points)


def taken(shapes: dict[Any, Shape], options: argparse.Namespace, **settings: Any) -> dict[Any, list[Step]]:
    "The steps of each shape, in turns."
    matches = {name: random_match(shape, 1 + options.steps, OBJECTIVE) for name, shape in shapes.items()}
    contestants = {name: partial(ours, match=match, **settings) for name, match in matches.items()}
    return warm(in_turns(contestants, options.threads or 1))


def swept(shapes: dict[int, Shape], options: argparse.Namespace) -> dict[str, Any]:
    "Seconds of teacher and student at each value, and three slopes."
    found = taken(shapes, options)
    seconds = {value: min(seconds_of(steps, READ)) for value, steps in found.items()}
    shared, alone = [], []
    for shape in shapes.values():
        read = to_read(random_match(shape, 1, OBJECTIVE))
        by_rows = read | {name: read[f"{name}, row by row"] for name in READ}
        shared.append(sum(operations(shape, read).values()))
        alone.append(sum(operations(shape, by_rows).values()))
    slopes = {"measured": [*seconds.values()], "each beginning once": shared, "row by row": alone}
    return {"seconds": seconds, "slopes": {name: round(slope([*shapes], ys), 3) for name, ys in slopes.items()}}


def main(words: Sequence[str] | None = None) -> None:
    "Measure, and print tables and ratios."
    parser = begin(__doc__)
    parser.add_argument("--steps", type=int, help="that count, at each value")
    parser.add_argument("--toy", action="store_true", help="a model that is there to be tested")
    options = parser.parse_args(words)
    if options.steps is None: options.steps = 7 if options.is_long else 2
    quiet()
    base, by = (SMALL, (1, 2)) if options.toy else (BASE, (1, 2, 4, 8) if options.is_long else (1, 2, 4))
    tables, ratios = {}, Ratios()
    print(f"  {'':22}{'measured':>10}{'once':>8}{'by rows':>9}   seconds")
    for name, shapes in sweeps(base, by).items():
        tables[name] = table = swept(shapes, options)
        measured, once, alone = table["slopes"].values()
        shown = ", ".join(f"{value}: {seconds:.3f}" for value, seconds in table["seconds"].items())
        print(f"  {name:22}{measured:10.2f}{once:8.2f}{alone:9.2f}   {shown}", flush=True)
    halves = {
        "full": base, "half": replace(base, silent_tasks=base.tasks // 2),
        "spread": replace(base, successes=0, silent_attempts=base.attempts // 2),
        "all spoken of": replace(base, successes=0),
    }
    found = taken(halves, options)
    reads = "seconds of teacher and student, ours / ours"
    half = ratio_of(found["half"], found["full"], READ)
    ratios.add("half_active_vs_full", half, f"{reads}, half of the tasks silent")
    spread = ratio_of(found["spread"], found["all spoken of"], READ)
    ratios.add("half_active_vs_full_spread", spread, f"{reads}, half of the attempts at each task silent")
    finish(ratios.as_json() | {"slopes": tables}, options)


if __name__ == "__main__": main()
