"The demo's hardest questions at test time, four ways: each run into stamped JSON, which an experiment page draws."

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import stamp
from sdpo_nb.core.demo import Codebook, load_demo
from sdpo_nb.core.models import render
from sdpo_nb.core.records import Task
from sdpo_nb.experience.prompting import Prompting
from sdpo_nb.experience.rollouts import sampler_for
from sdpo_nb.learn.teachers import EMA
from sdpo_nb.learn.testtime import Search, SearchConfig, best_of, discovery, multi_turn, refine, solve
from sdpo_nb.run.demo import DEMO_SIZE

DATA = Path(__file__).parent.parent / "nbs" / "experiments" / "data" / "test_time"
BUDGET, HARDEST, OF = 192, 30, 256  # attempts at a question; how many questions, of how many
LOOKS = range(0, BUDGET + 1, 4)  # attempts at which a curve is kept
HOW = DEMO_SIZE.sampling


def likelihood(model: Any, tokenizer: Any, task: Task) -> float:
    "The logarithm of the probability that the untrained model gives the right answer, exactly."
    (asked,) = render(tokenizer, [task.messages])
    answer = [*tokenizer(task.info["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad(): logps = model(torch.tensor([[*asked, *answer]])).logits[0].log_softmax(-1)
    return sum(logps[len(asked) - 1 + place, token].item() for place, token in enumerate(answer))


def hardest(split: str, count: int) -> tuple[list[Task], list[float]]:
    "The questions of a split that the untrained model is least likely to answer, and how likely that is."
    model, tokenizer = load_demo()
    rated = [(likelihood(model, tokenizer, task), task) for task in Codebook().tasks(OF, split)]
    rated = sorted(rated, key=lambda pair: pair[0])[:count]
    return [task for _, task in rated], [logp for logp, _ in rated]


def trained(rate: float, learning_rate: float, **settings: Any) -> Callable[..., Search]:
    "SDPO on one question, with a teacher of this rate; the model is as it came afterwards."
    def way(model, tokenizer, environment, task, config):
        return solve(
            model, tokenizer, environment, task, config, teacher=EMA(rate), learning_rate=learning_rate,
            sampling=HOW, restore=True, **settings,
        )
    return way


def asked(how: Callable[..., Search], **settings: Any) -> Callable[..., Search]:
    "A way that trains nothing."
    return lambda model, tokenizer, environment, task, config: how(
        sampler_for(model, tokenizer, HOW), environment, task, config, **settings
    )


WAYS: dict[str, Callable[..., Search]] = {
    "best of k": asked(best_of), "multi-turn": asked(multi_turn, turns=1), "multi-turn, 8 turns": asked(multi_turn),
    "refine": asked(refine, prompting=Prompting()), "refine, attempt shown": asked(refine),
    "solve": trained(0.8, 1e-3),
} | {
    f"solve, EMA {rate}, rate {learning_rate}": trained(rate, learning_rate)
    for rate, learning_rate in ((0.01, 1e-3), (0.5, 1e-3), (0.8, 2e-3))
}


@dataclass(frozen=True)
class Job:
    "One way, tried on every question with one seed."

    way: str  # of WAYS
    feedback: str  # what the judge says, of the demo's KINDS
    seed: int = 0
    split: str = "held_out"  # the questions of the comparison; those of "train" chose the settings
    questions: int = HARDEST


def execute(job: Job, made_with: dict[str, Any]) -> dict[str, Any]:
    "All searches of one job: when each was solved, and their common curve; and the stamp of the code that is running."
    tasks, logps = hardest(job.split, job.questions)
    model, tokenizer = load_demo()
    config = SearchConfig(BUDGET, BUDGET if job.way == "best of k" else 16, seed=job.seed)
    start, searches = time.perf_counter(), []
    cpu = time.process_time()
    for task in tasks:
        searches.append(WAYS[job.way](model, tokenizer, Codebook(feedback=job.feedback), task, config))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return vars(job) | {
        "budget": BUDGET, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "found_at": [search.found_at for search in searches], "attempts": [search.attempts for search in searches],
        "curve": [(k, round(share, 4)) for k, share in discovery(searches, LOOKS)],
        "logps": [round(logp, 2) for logp in logps], "stamp": made_with,
    }


EXPERIMENTS: dict[str, list[Job]] = {
    "runs": [
        Job(way, feedback, seed)
        for way, feedback in (
            ("best of k", "none"), *((way, "full") for way in ("multi-turn", "refine", "solve")),
            *((way, "neg") for way in ("solve", "multi-turn", "refine")),
        )
        for seed in range(3)
    ],
    "settings": [
        Job(way, feedback, split="train", questions=4)
        for way in WAYS if way != "best of k"
        for feedback in ("neg", *["full"] * (not way.startswith("solve,")))
    ],
}


def main() -> None:
    "Run what is not there yet; each finished run is written at once."
    parser = argparse.ArgumentParser(description=__doc__)
    about = f"of {', '.join(EXPERIMENTS)}; all when none is named"
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), help=about)
    parser.add_argument("--again", action="store_true", help="forget the runs that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore"), logging.disable(logging.WARNING)
    DATA.mkdir(parents=True, exist_ok=True)
    made_with = stamp()  # the commit may move on while this runs; what was imported does not
    for name in options.experiments:
        path = DATA / f"{name}.json"
        known = json.loads(path.read_text())["runs"] if path.exists() and not options.again else []
        for job in EXPERIMENTS[name]:
            if any(vars(job).items() <= run.items() for run in known): continue
            known.append(execute(job, made_with))
            path.write_text("\n".join(["{\"runs\": [", ",\n".join(map(json.dumps, known)), "]}", ""]))
            solved = sum(found is not None for found in known[-1]["found_at"])
            print(job, f"{solved} of {job.questions} solved in {known[-1]['seconds']} s", flush=True)


if __name__ == "__main__": main()
