"The seed tables of the demo: every run of an experiment, in turn, into stamped JSON that an experiment page draws."

import argparse
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers import run_ours, run_trainer, run_trl, stamp
from sdpo_nb.core.demo import Codebook
from sdpo_nb.learn.teachers import EMA, Frozen, Live, Restart, TrustRegion
from sdpo_nb.run.demo import DEMO_SIZE, METHODS

DATA = Path(__file__).parent.parent / "nbs" / "experiments" / "data"
RATES = (1.5e-4, 3e-4, 6e-4, 1e-3)
CURVES = ("curve", "taught", "apart")  # held-out pass rate; the teacher's, told; its distance from the student
TEACHERS = {
    "live": Live, "frozen": Frozen, "ema": EMA, "trust region": TrustRegion, "restart": lambda: Restart(10),
    "ema 0.01": lambda: EMA(0.01), "ema 0.2": lambda: EMA(0.2), "trust region 0.3": lambda: TrustRegion(0.3),
}


def job(
    package: str, method: str, book: str, feedback: str, steps: int, seeds: int,
    rates: tuple = (6e-4,), teacher: str = "ema", look: int = 5, **more: Any,
) -> list[dict]:
    "The runs of one curve: every learning rate with every seed."
    return [
        dict(
            package=package, method=method, book=book, feedback=feedback, teacher=teacher, rate=rate,
            steps=steps, seed=seed, look=look, **more,
        )
        for rate in rates
        for seed in range(seeds)
    ]


EXPERIMENTS: dict[str, list[dict[str, Any]]] = {
    "feedback": job("sdpo-nb", "sdpo", "omega", "full", 40, seeds=5)
    + [run for kind in ("first", "neg") for run in job("sdpo-nb", "sdpo", "omega", kind, 80, seeds=3)],
    "grpo": job("sdpo-nb", "grpo", "omega", "full", 300, seeds=3, rates=RATES, look=10),
    "trl": job("TRL", "sdpo", "omega", "full", 40, seeds=3)
    + job("TRL", "grpo", "omega", "full", 300, seeds=3, rates=RATES, look=10),
    "zeta": [
        run
        for package in ("sdpo-nb", "TRL")
        for method in ("sdpo", "grpo")
        for run in job(package, method, "zeta", "none", 60, seeds=3)
    ],
    "teachers": [
        run
        for kind in ("ema", "frozen", "live")
        for run in job("sdpo-nb", "sdpo", "zeta", "none", 60, seeds=3, teacher=kind)
    ],
    "teachers/all": [
        run
        for kind in TEACHERS
        for book, feedback, steps in (("zeta", "none", 60), ("omega", "full", 40))
        for run in job("sdpo-nb", "sdpo", book, feedback, steps, seeds=3, teacher=kind)
    ],
    "trainer/rates": job("trainer", "sdpo", "omega", "full", 45, seeds=1, rates=(1e-3, 2e-3, 4e-3, 8e-3), rank=16),
    "trainer/seeds": job("trainer", "sdpo", "omega", "full", 45, seeds=5, rank=0)
    + job("trainer", "sdpo", "omega", "full", 45, seeds=5, rates=(4e-3,), rank=16)
    + job("TRL", "sdpo", "omega", "full", 45, seeds=5)
    + job("TRL", "grpo", "omega", "full", 45, seeds=5),
}


def execute(run: dict[str, Any]) -> dict[str, Any]:
    "One run, with its curve and its seconds of training."
    environment = Codebook(run["book"], run["feedback"])
    size = replace(
        DEMO_SIZE, steps=run["steps"], seed=run["seed"], learning_rate=run["rate"], evaluate_every=run["look"], shown=0
    )
    if run["package"] == "TRL": result = run_trl(environment, run["method"], size)
    elif run["package"] == "trainer": result = run_trainer(environment, size, run["rank"])
    else:
        result = run_ours(environment, METHODS[run["method"]], size, TEACHERS[run["teacher"]]())
    curves = {
        name: [(attempts, round(value, 4)) for attempts, value in result[name]]
        for name in CURVES if name in result
    }
    return run | {"seconds": round(result["seconds"], 2), **curves, "stamp": stamp()}


def main() -> None:
    "Run what is not there yet; each finished run is written at once."
    parser = argparse.ArgumentParser(description=__doc__)
    about = f"of {', '.join(EXPERIMENTS)}; all when none is named"
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), help=about)
    parser.add_argument("--again", action="store_true", help="forget the runs that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore"), logging.disable(logging.WARNING)
    for name in options.experiments:
        path = DATA / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text())["runs"] if path.exists() and not options.again else []
        done = [{key: value for key, value in run.items() if key not in ("seconds", "stamp", *CURVES)} for run in known]
        for run in EXPERIMENTS[name]:
            if run in done: continue
            known.append(execute(run))
            path.write_text("\n".join(["{\"runs\": [", ",\n".join(map(json.dumps, known)), "]}", ""]))
            print(name, run, known[-1]["curve"][-1], known[-1]["seconds"], flush=True)


if __name__ == "__main__": main()
