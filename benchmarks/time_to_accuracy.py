"""Seconds and attempts until the demo answers 80 and 90 % of its held-out questions: ours, TRL's SDPO, TRL's GRPO.

Everybody has a grid of learning rates and several seeds, and is judged at its best rate, by the median over the seeds
of the seconds to 90 %. Contestants run in turns, seed by seed and rate by rate. Looking is not timed; a run ends when
it has seen 90 %. Learning rates are constant for half of the steps that a run may take, and fall over the rest. What
`--out` holds already is not run again, so a long form may be stopped and go on. The short form is `omega` at one
rate, one seed.

Seconds and attempts are theirs over ours: above 1, ours needs fewer.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contest import Ratios, begin, finish, quiet
from peers import our_trainer, trl_trainer, watched
from sdpo_nb.core.demo import Codebook
from sdpo_nb.run.demo import DEMO_SIZE

SHARES = (0.8, 0.9)
WHO = {  # steps that a run may take, and steps between looks
    "ours": {"omega": (40, 2), "zeta": (60, 2)}, "TRL SDPO": {"omega": (40, 2), "zeta": (60, 2)},
    "TRL GRPO": {"omega": (300, 5), "zeta": (60, 2)},
}
RATES = {  # the first is the short form's
    "ours": (6e-4, 3e-4, 1e-3, 1.5e-3), "TRL SDPO": (6e-4, 3e-4, 1e-3, 1.5e-3), "TRL GRPO": (3e-4, 1.5e-4, 6e-4, 1e-3),
}


def job(who: str, book: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    "What makes a run this run."
    steps, look = WHO[who][book]
    size = dict(steps=options.steps or steps, look=look, held_out=options.held_out)
    return dict(who=who, book=book, rate=rate, seed=seed, **size)


def run(job: dict[str, Any]) -> dict[str, Any]:
    "One run, to its end or to 90 %."
    who, book = job["who"], job["book"]
    environment = Codebook(book, "full" if book == "omega" else "none")
    size = replace(
        DEMO_SIZE, steps=job["steps"], seed=job["seed"], learning_rate=job["rate"], evaluate_every=job["look"],
        held_out=job["held_out"],
    )
    if who == "ours": build = lambda callbacks: our_trainer(environment, size, callbacks)
    else:
        name = "sdpo" if who == "TRL SDPO" else "grpo"
        build = lambda callbacks: trl_trainer(environment, name, size, callbacks)
    found = watched(build, environment, size, max(SHARES))
    result = job | {"curve": found["curve"], "times": [round(seconds, 3) for seconds in found["times"]]}
    for share in SHARES:
        at = next((i for i, (_, passed) in enumerate(found["curve"]) if passed >= share), None)
        result[f"seconds to {share}"] = None if at is None else found["times"][at]
        result[f"attempts to {share}"] = None if at is None else found["curve"][at][0]
    return result


def middle(runs: Sequence[dict[str, Any]], what: str) -> float:
    "The median over the seeds; infinite where most never came there."
    return statistics.median(math.inf if one[what] is None else one[what] for one in runs)


def judged(runs: Sequence[dict[str, Any]]) -> dict[str, dict[float, dict[str, float]]]:
    "Of each contestant and each rate, the medians."
    table: dict[str, dict[float, dict[str, float]]] = {}
    sought = [f"{what} to {share}" for what in ("seconds", "attempts") for share in SHARES]
    for who in dict.fromkeys(one["who"] for one in runs):
        rates = sorted({one["rate"] for one in runs if one["who"] == who})
        chosen = {rate: [one for one in runs if (one["who"], one["rate"]) == (who, rate)] for rate in rates}
        table[who] = {rate: {what: middle(some, what) for what in sought} for rate, some in chosen.items()}
    return table


def best_of(table: dict[float, dict[str, float]]) -> float:
    "The rate at which 90 % were reached soonest; where they never were, 80."
    return min(table, key=lambda rate: (table[rate]["seconds to 0.9"], table[rate]["seconds to 0.8"]))


def compare(book: str, runs: Sequence[dict[str, Any]], ratios: Ratios) -> dict[str, Any]:
    "Print a book's table; ratios where both came to 90 %."
    table, chosen = judged(runs), {}
    print(f"{book}: median seconds to 80 and 90 %, attempts to 80 and 90 %")
    for who, rates in table.items():
        chosen[who] = best_of(rates)
        for rate, found in rates.items():
            mark = "  <- its best" if rate == chosen[who] else ""
            print(f"  {who:10}{rate:9.1e}" + "".join(f"{value:10.1f}" for value in found.values()) + mark, flush=True)
    at = lambda who, what: {one["seed"]: one[what] for one in runs if (one["who"], one["rate"]) == (who, chosen[who])}
    for name, who, what in (
        ("time_to_90_vs_trl", "TRL SDPO", "seconds"), ("attempts_to_90_vs_trl", "TRL SDPO", "attempts"),
        ("time_to_90_vs_grpo", "TRL GRPO", "seconds"), ("attempts_to_90_vs_grpo", "TRL GRPO", "attempts"),
    ):
        if not {who, "ours"} <= chosen.keys(): continue
        theirs, mine = (table[one][chosen[one]][f"{what} to 0.9"] for one in (who, "ours"))
        pairs = [(at(who, f"{what} to 0.9")[seed], value) for seed, value in at("ours", f"{what} to 0.9").items()]
        each = [one / other for one, other in pairs if one and other]
        reads = f"{what} to 90 % on {book}, {who} / ours, each at its best learning rate"
        if math.isinf(mine): continue
        if math.isinf(theirs): print(f"  {name}_{book}: {who} did not come there")
        else:
            ratio = {"ratio": theirs / mine} | ({"spread": [min(each), max(each)]} if len(each) > 1 else {})
            ratios.add(name if book == "omega" else f"{name}_{book}", ratio, reads)
    return {"best": chosen, "table": [
        {"who": who, "rate": rate, **{what: None if math.isinf(x) else x for what, x in found.items()}}
        for who, rates in table.items() for rate, found in rates.items()
    ]}


def known(options: argparse.Namespace) -> list[dict[str, Any]]:
    "The runs that were made already."
    path = Path(options.out or "")
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() and not options.again else []


def main(words: Sequence[str] | None = None) -> None:
    "Run, and print tables and ratios."
    parser = begin(__doc__)
    parser.add_argument("--books", nargs="+", choices=("omega", "zeta"))
    parser.add_argument("--who", nargs="+", default=list(WHO), choices=WHO)
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to try, for everybody")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int, help="that a run may take, whoever's")
    parser.add_argument("--held-out", type=int, default=256, help="questions to look at")
    parser.add_argument("--again", action="store_true", help="forget the runs that are there")
    options = parser.parse_args(words)
    if options.seeds is None: options.seeds = 3 if options.is_long else 1
    options.books = options.books or (["omega", "zeta"] if options.is_long else ["omega"])
    quiet()
    torch.set_num_threads(options.threads or 1)
    grids = {who: options.rates or RATES[who][: None if options.is_long else 1] for who in options.who}
    jobs = [
        job(who, book, rates[place], seed, options)
        for book in options.books for seed in range(options.seeds) for place in range(max(map(len, grids.values())))
        for who, rates in grids.items() if place < len(rates)
    ]
    runs = [one for one in known(options) if any(asked.items() <= one.items() for asked in jobs)]
    for asked in jobs:
        if any(asked.items() <= one.items() for one in runs): continue
        runs.append(run(asked))
        if options.out: finish({"runs": runs}, options, prints=False)  # so that nothing is lost
    ratios = Ratios()
    books = {book: compare(book, [one for one in runs if one["book"] == book], ratios) for book in options.books}
    finish(ratios.as_json() | {"books": books, "runs": runs}, options)


if __name__ == "__main__": main()
