"The demo trained with ready environments: each run into stamped JSON, which an experiment page draws."

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers import stamp
from sdpo_nb.core.demo import BOOKS, Codebook, decode, encode, load_demo
from sdpo_nb.core.records import Task
from sdpo_nb.experience.environments import Demonstrations, ExactMatch, HumanFeedback, Remark, TaskSet
from sdpo_nb.experience.prompting import Prompting
from sdpo_nb.experience.rollouts import sampler_for
from sdpo_nb.learn.loop import pass_rate, steps
from sdpo_nb.learn.methods import SDPO
from sdpo_nb.learn.teachers import EMA, Frozen
from sdpo_nb.loss.objectives import Objective
from sdpo_nb.run.demo import DEMO_SIZE

PATH = Path(__file__).parent.parent / "nbs" / "experiments" / "data" / "environments" / "runs.json"
ASKED, ANSWERS = 64, 64  # questions that people were asked about, and answers to each that they saw
READER = Objective(alpha=1.0, support="full")  # the demo's
FORWARD = Objective(alpha=0.0, support="full")  # SDFT's and OPSD's
WORDS = Prompting(feedback_only_without_solution=False)  # what is said is always shown


def people(book: str, questions: list[Task], of_answers: bool) -> HumanFeedback:
    "What somebody who knows the book says of answers that the untrained model gave, or of each question as a whole."
    if not of_answers:
        return HumanFeedback([
            Remark(task.question, f"Use {encode(BOOKS[book], decode(task.info['answer']))}.") for task in questions
        ])
    rollouts = sampler_for(*load_demo(), DEMO_SIZE.sampling).sample(questions, ANSWERS, seed=7)
    seen = {(rollout.task.question, rollout.text): rollout.task for rollout in rollouts}
    said = {key: Codebook(book).judge(task, key[1]) for key, task in seen.items()}
    return HumanFeedback([Remark(asked, f.text, f.score == 1, given) for (asked, given), f in said.items()])


@dataclass(frozen=True)
class Setting:
    "What one curve was trained with."

    book: str  # which book is learned
    judge: Callable[[str, list[Task]], Any]  # given the book and the questions, who judges
    method: SDPO = SDPO(READER, WORDS)
    teacher: type = EMA
    questions: int = 2000  # to learn from
    steps: int = 40


SETTINGS = {
    "ExactMatch": Setting("zeta", lambda *_: ExactMatch(), steps=60),
    "ExactMatch, quotes the answer": Setting("zeta", lambda *_: ExactMatch(quotes_answer=True), steps=60),
    "ExactMatch, score alone": Setting(
        "zeta", lambda *_: ExactMatch(), SDPO(READER, Prompting(use_feedback=False)), steps=60
    ),
    "ExactMatch, names the answer": Setting("omega", lambda *_: ExactMatch(names_answer=True)),
    "ExactMatch, shows the solution": Setting(
        "omega", lambda *_: ExactMatch(solution="answer"), SDPO(READER, Prompting(use_feedback=False))
    ),
    "HumanFeedback on questions": Setting("omega", lambda book, asked: people(book, asked, False), questions=ASKED),
    "HumanFeedback on answers": Setting("omega", lambda book, asked: people(book, asked, True), questions=ASKED),
    "HumanFeedback on answers, zeta": Setting("zeta", lambda book, asked: people(book, asked, True), questions=ASKED),
    "Demonstrations": Setting("omega", lambda *_: Demonstrations("answer")),
    "Demonstrations, forward (SDFT)": Setting("omega", lambda *_: Demonstrations("answer"), SDPO(FORWARD, WORDS)),
    "Demonstrations, forward, frozen (OPSD)": Setting(
        "omega", lambda *_: Demonstrations("answer"), SDPO(FORWARD, WORDS), Frozen
    ),
}


def execute(name: str, seed: int, look: int = 5) -> dict[str, Any]:
    "One run, measured by an exact match whoever judged it, with its curve and its seconds of training."
    setting = SETTINGS[name]
    book = Codebook(setting.book)
    train, held_out = book.tasks(setting.questions), book.tasks(DEMO_SIZE.held_out, "held_out")
    environment = TaskSet(train, setting.judge(setting.book, train), held_out)
    size = replace(DEMO_SIZE, steps=setting.steps, seed=seed, evaluate_every=0)
    model, tokenizer = load_demo()

    def measured() -> float:
        return round(pass_rate(model, tokenizer, TaskSet(train, ExactMatch()), held_out, size.sampling, seed=seed), 4)

    curve, spoken_of, seconds = [(0, measured())], [], 0.0
    start = time.perf_counter()
    for report in steps(model, tokenizer, environment, setting.method, setting.teacher(), size):
        spoken_of.append(round(report.metrics.get("judged_heard", 1.0), 3))
        if report.step % look: continue
        seconds += time.perf_counter() - start
        curve.append((report.attempts, measured()))
        start = time.perf_counter()
    about = dict(book=setting.book, judge=repr(environment.judge), questions=len(train), steps=setting.steps)
    return dict(name=name, seed=seed, **about, seconds=round(seconds, 2), curve=curve, heard=spoken_of, stamp=stamp())


def main() -> None:
    "Run what is not there yet; each finished run is written at once."
    parser = argparse.ArgumentParser(description=__doc__)
    about = f"of {'; '.join(SETTINGS)}. All when none is named"
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), help=about)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--again", action="store_true", help="forget the runs that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore"), logging.disable(logging.WARNING)
    PATH.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(PATH.read_text())["runs"] if PATH.exists() and not options.again else []
    for name in options.settings:
        for seed in range(options.seeds):
            if any((run["name"], run["seed"]) == (name, seed) for run in runs): continue
            runs.append(execute(name, seed))
            PATH.write_text("\n".join(["{\"runs\": [", ",\n".join(map(json.dumps, runs)), "]}", ""]))
            print(name, seed, [rate for _, rate in runs[-1]["curve"]], runs[-1]["seconds"], flush=True)


if __name__ == "__main__": main()
