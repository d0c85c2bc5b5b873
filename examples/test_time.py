"""One hard question, until it is solved: ask again, ask with what was said, or train on it.

    python test_time.py --demo                 # no network, no GPU, some ten seconds: the embedded model
    python test_time.py                        # the problem below, in Python: needs Linux, a GPU and the hub
    python test_time.py --task problem.json    # your own: {"prompt": ..., "tests": [{"input": ..., "output": ...}]}

Prints how many attempts each way took. `refine` changes no weight and works with any model; `solve` is SDPO with a
batch of one question, and puts the weights back. Only the demo was run where this was written.
"""
import argparse
import json
from pathlib import Path

from sdpo_nb.run.cli import count, seed  # which imports nothing that is slow

MODEL = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--demo", action="store_true", help="ask the embedded model, offline")
parser.add_argument("--model", default=MODEL, help="a name on the hub, or a folder (%(default)s)")
parser.add_argument("--task", type=Path, help="a file with a problem and its tests")
parser.add_argument("--budget", type=count, default=128, help="attempts of each way (%(default)s)")
parser.add_argument("--seed", type=seed, default=0, help="of the attempts (%(default)s)")
PROBLEM = {
    "prompt": "Read a line with a positive integer n. Print how many ways there are to write n as a sum of consecutive "
    "positive integers, n alone included. n is up to 10**12. Answer with one ```python block.",
    "tests": [
        {"input": "15", "output": "4"}, {"input": "1", "output": "1"},
        {"input": "1000000000000", "output": "13", "public": False},
        {"input": "999999999989", "output": "2", "public": False},
    ],
}


def main() -> None:
    options = parser.parse_args()
    from sdpo_nb import (
        EMA, Codebook, CodeTests, Prompting, Sampling, SearchConfig, TaskSet, add_adapter, best_of, load_demo,
        load_model, refine, sampler_for, solve,
    )

    if options.demo:
        (model, tokenizer), environment = load_demo(), Codebook("omega")  # says what would have been right
        sampling, training = Sampling(20), dict(learning_rate=1e-3, teacher=EMA(0.8))
    else:
        base, tokenizer = load_model(options.model)
        model, _ = add_adapter(base)
        row = json.loads(options.task.read_text(encoding="utf-8")) if options.task else PROBLEM
        environment = TaskSet.from_rows([row], CodeTests())
        sampling, training = Sampling(1024), dict(learning_rate=1e-4, rows_per_pass=2)
    (task,), size = environment.tasks(1), SearchConfig(options.budget, seed=options.seed)
    sampler = sampler_for(model, tokenizer, sampling)
    ways = {
        "ask again": lambda: best_of(sampler, environment, task, size),
        "ask with what was said": lambda: refine(sampler, environment, task, size, Prompting()),
        "train on it": lambda: solve(
            model, tokenizer, environment, task, size, sampling=sampling, restore=True, **training),
    }
    print(task.question)
    for name, search in ways.items():
        found = search()
        end = f"solved by attempt {found.found_at}" if found.is_solved else f"not solved in {found.attempts} attempts"
        print(f"  {name}: {end}; the best scored {found.best.feedback.score:g}:\n    {found.best.text!r}")


if __name__ == "__main__": main()
