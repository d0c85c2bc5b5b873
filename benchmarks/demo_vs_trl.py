"Seconds of training: this package's loop against TRL's SDPO trainer, on the demo, in one run and in turns."

import argparse
import json
import logging
import statistics
import warnings
from dataclasses import replace

import torch
from peers import final_rate, run_ours, run_trl, stamp
from sdpo_nb.core.demo import Codebook, load_demo
from sdpo_nb.run.demo import DEMO_SIZE, METHODS


def main() -> None:
    "Measure, and print a table and the ratio."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--env", default="omega", choices=("omega", "zeta"))
    parser.add_argument("--threads", type=int, default=1, help="two wait for each other when anything else runs")
    parser.add_argument("--json", action="store_true", help="print the result last, as one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore"), logging.disable(logging.WARNING)

    environment, (_, tokenizer) = Codebook(options.env, "full" if options.env == "omega" else "none"), load_demo()
    warm = replace(DEMO_SIZE, steps=2, evaluate_every=0)
    run_ours(environment, METHODS["sdpo"], warm), run_trl(environment, "sdpo", warm)
    seconds, rates, ratios = {"sdpo-nb": [], "TRL": []}, {"sdpo-nb": [], "TRL": []}, []
    for seed in range(options.repeats):
        size = replace(DEMO_SIZE, steps=options.steps, seed=seed, evaluate_every=0)
        runs = {"sdpo-nb": run_ours(environment, METHODS["sdpo"], size), "TRL": run_trl(environment, "sdpo", size)}
        for name, run in runs.items():
            seconds[name].append(run["seconds"])
            rates[name].append(final_rate(run, environment, tokenizer))
        ratios.append(seconds["sdpo-nb"][-1] / seconds["TRL"][-1])
    print(
        f"{options.steps} steps of 64 attempts on {options.env}, reverse KL over all words, EMA teacher; "
        f"{options.repeats} seeds"
    )
    for name in seconds:
        at_the_end = ", ".join(f"{rate:.1%}" for rate in rates[name])
        print(f"  {name:8} {statistics.median(seconds[name]):6.2f} s   held-out pass rate at the end {at_the_end}")
    print(f"  ratio    {statistics.median(ratios):6.2f}     ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    if options.json:
        result = {"ratios": {"demo_vs_trl": statistics.median(ratios)}, "each": ratios}
        print(json.dumps(result | {"seconds": seconds, "rates": rates} | stamp()))


if __name__ == "__main__": main()
