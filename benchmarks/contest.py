"""Several trainers take the same steps on the same attempts, in turns, and each says where its seconds went.

One contestant takes its step, then the next: whatever else the machine does falls on all of them, and every ratio is
one of neighbours. Each has a process of its own: two in one process have more threads than there are cores, and OpenMP
then lets them sleep between any two products. The attempts are written down beforehand, in a script. They are
`prescribed` (nobody draws any), `replaced` (everybody draws its own, which costs what it costs, and then goes on with
the script's) or `own`.
"""

import argparse
import ctypes
import json
import logging
import multiprocessing
import random
import resource
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from peers import NO_ROOM, Student, our_trainer, peak_memory, stamp, trl_trainer
from scripts import Script, Shape, beginnings, random_script, student_of
from sdpo_nb.core.adapters import add_adapter
from sdpo_nb.core.demo import Codebook, load_demo
from sdpo_nb.core.models import render
from sdpo_nb.core.records import Rollout, Task
from sdpo_nb.experience.feedback import judge_all
from sdpo_nb.experience.prompting import Prompting
from sdpo_nb.experience.rollouts import Sampling, sampler_for
from sdpo_nb.learn.loop import LoopConfig, rows_of, update
from sdpo_nb.learn.methods import SDPO
from sdpo_nb.learn.teachers import EMA
from sdpo_nb.loss.objectives import Objective
from sdpo_nb.run.demo import DEMO_SIZE

PHASES = ("sample", "teacher", "student", "optimizer", "rest")  # student: its reading, the loss and its gradient
NAMED = {name: name for name in PHASES} | {"update": "optimizer"}  # what others call them; anything else is rest
ATTEMPTS = ("prescribed", "replaced", "own")
Step = dict[str, float]  # the seconds of each phase, the loss, and perhaps extra: bytes above what was held before
Over = Callable[[Step], None]  # told of each step when it is over; returns when it is one's turn again
Contestant = partial  # of `ours`, `trl` or `loop`, with its match; it is pickled, for it plays in a process of its own
LIMIT = 16 * 2**30  # bytes that a process which is weighed may hold
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Phases:
    "Seconds of named phases; what is inside another phase does not count for the outer."

    weighs = False  # whether the bytes of this process are looked at

    def __init__(self, device: str = "cpu"):
        self.device, self.names, self.seconds, self.since = device, ["rest"], Counter(), time.perf_counter()
        self.held: int | None = None  # bytes

    def tick(self) -> None:
        "What has passed goes to the innermost phase."
        if self.device != "cpu": torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.names[-1]] += now - self.since
        self.since = now

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        "Count the seconds inside the block."
        self.tick()
        self.names.append(NAMED.get(phase, "rest"))
        try: yield
        finally:
            self.tick()
            self.names.pop()

    def become(self, phase: str) -> None:
        "From now on, where no block says otherwise, it is this phase."
        self.tick()
        self.names[0] = phase

    def take(self) -> Step:
        "The seconds since the last time."
        self.become("rest")
        taken, self.seconds = {name: self.seconds[name] for name in PHASES}, Counter()
        if self.weighs:
            peak = peak_memory(self.device)
            if self.held is None: self.held = peak_memory(self.device)  # since a moment ago: what is held now
            taken["extra"] = peak - self.held
        return taken

    def of(self, owner: Any, name: str, phase: Callable[[], str]) -> None:
        "Count one of somebody's methods, from now on."
        run = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self(phase()): return run(*args, **kwargs)

        setattr(owner, name, counted)


def in_turns(
    contestants: Mapping[str, Contestant], threads: int, weighs: bool = False
) -> dict[str, list[Step]]:  # of each, in order
    "Let everybody take one step after the other: the first of each, the second of each, and so on to the end."
    found: dict[str, list[Step]] = {name: [] for name in contestants}
    context, playing, processes = multiprocessing.get_context("forkserver"), {}, {}
    context.set_forkserver_preload(["sdpo_nb.learn.trainer", "trl.experimental.sdpo"])  # once for all, for it is slow
    try:
        for name, contestant in contestants.items():
            playing[name], end = context.Pipe()
            processes[name] = context.Process(target=take_part, args=(contestant, threads, weighs, end), daemon=True)
            processes[name].start()
            end.close()
        turn = 0
        while playing:
            for name in [*playing][:: -1 if turn % 2 else 1]:  # nobody is always first
                step = asked_for_a_step(name, playing[name], processes[name])
                if step: found[name].append(step)
                else: del playing[name]
            turn += 1
        for process in processes.values(): process.join()
    finally:
        for process in processes.values(): process.terminate()
    return found


def asked_for_a_step(name: str, player: Connection, process: BaseProcess) -> Step | None:
    "The next step; None behind the last."
    try:
        player.send("your turn")
        step = player.recv()
    except (EOFError, OSError) as error:
        process.join()
        killed = process.exitcode == -9  # as whoever takes too much memory
        raise (MemoryError if killed else RuntimeError)(f"{name} is gone, with {process.exitcode}") from error
    if not isinstance(step, str): return step
    raise (MemoryError if any(phrase in step for phrase in NO_ROOM) else RuntimeError)(f"{name}:\n{step}")


def take_part(contestant: Contestant, threads: int, weighs: bool, end: Connection) -> None:
    "Play, in a process of its own; where that is weighed, memory goes back at once, and there is a limit."
    if weighs:
        Phases.weighs = True
        if sys.platform == "linux":
            for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD): ctypes.CDLL(None).mallopt(option, 2**16)
        if contestant.keywords["match"].device == "cpu": resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))

    def over(step: Step) -> None:
        end.send(step)
        end.recv()

    quiet()
    torch.set_num_threads(threads)
    end.recv()
    try:
        with redirect_stdout(StringIO()): contestant(over)
        end.send(None)
    except BaseException: end.send(traceback.format_exc())


@dataclass(frozen=True)
class Match:
    "What everybody does: on whose attempts, from which model, for which objective."

    script: Script
    size: LoopConfig  # steps, tasks, attempts, learning rate, seed
    student: Callable[[], Student] = load_demo
    objective: Objective = Objective(alpha=1.0, support="full")
    rank: int = 0  # of a LoRA adapter; 0 trains all weights
    attempts: str = "replaced"  # one of ATTEMPTS
    aggregation: str = "token-mean"  # TRL has seq-mean-token-mean alone
    device: str = "cpu"
    dtype: str = "float32"
    is_checkpointed: bool = False  # whether layers are computed twice, as trainers of TRL's kind do by themselves

    @property
    def method(self) -> SDPO:
        "In our words: successes and remarks are both shown."
        objective = self.objective if self.script.is_drawn else replace(self.objective, is_clip=None)
        return SDPO(objective, Prompting(feedback_only_without_solution=False), self.aggregation)

    def common(self, rows: int | None) -> dict[str, Any]:
        "Settings of both configs: so many rows in a pass."
        whole = self.size.tasks * self.size.attempts
        if whole % (rows or whole): raise ValueError(f"{whole} attempts do not fall into passes of {rows}")
        return dict(
            per_device_train_batch_size=rows or whole, gradient_accumulation_steps=whole // (rows or whole),
            shuffle_dataset=False, use_cpu=self.device == "cpu", bf16=self.dtype == "bfloat16",
            gradient_checkpointing=self.is_checkpointed,
        )


def ours(over: Over, match: Match, rows: int | None = None, **settings: Any) -> None:
    "This package's trainer, with so many rows in a pass."
    answers = match.script.answers()

    def host(kind: type) -> type:
        class Answering(kind):
            def _generate_single_turn(self, prompt_ids, *args, **kwargs):
                if match.attempts == "replaced": super()._generate_single_turn(prompt_ids, *args, **kwargs)
                return next(answers)

        return kind if match.attempts == "own" else Answering

    objective = match.objective
    kept = dict(distillation_topk=objective.k, distillation_add_tail=objective.tail)
    trainer = our_trainer(
        match.script, match.size, rank=match.rank, student=match.student(), host=host,
        **dict(
            match.common(rows), alpha=objective.alpha, support=objective.support, aggregation=match.aggregation,
            **{} if objective.support == "full" else kept,
        ) | settings,
    )
    trainer.clock = Phases(match.device)
    watch(trainer, trainer.clock, over)
    trainer.train()


def trl(over: Over, match: Match, rows: int | None = None, **settings: Any) -> None:
    "TRL's SDPO trainer, with so many rows in a pass."
    answers = match.script.answers()

    def host(kind: type) -> type:
        class Answering(kind):
            def _generate(self, prompt_ids):
                if match.attempts == "replaced": super()._generate(prompt_ids)
                return prompt_ids, next(answers)[0]

        return kind if match.attempts == "own" else Answering

    objective, is_full = match.objective, match.objective.support == "full"
    if objective.support not in ("full", "student_topk"): raise ValueError(f"TRL has no {objective.support}")
    trainer = trl_trainer(
        match.script, "sdpo", match.size, rank=match.rank, host=host,
        student=None if match.student is load_demo else match.student(),  # its teacher comes from the disk
        **dict(
            match.common(rows), distillation_alpha=objective.alpha,
            distillation_mode="full_logits" if is_full else "topk_logits",
            **{} if is_full else dict(distillation_topk=objective.k, distillation_add_tail=objective.tail),
        ) | settings,
    )
    phases = Phases(match.device)
    phases.of(trainer, "_generate", lambda: "sample")
    phases.of(trainer, "_forward_logits", lambda: "student" if torch.is_grad_enabled() else "teacher")
    watch(trainer, phases, over)
    trainer.train()


def watch(trainer: Any, phases: Phases, over: Over) -> None:
    "Let a trainer of TRL's kind say where its seconds go."
    from transformers import PrinterCallback, TrainerCallback

    train, losses = trainer.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> Any:
        with phases("student"): loss = train(*args, **kwargs)
        losses.append(loss.item())
        if trainer.accelerator.sync_gradients: phases.become("optimizer")  # and whoever follows it
        return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, *args, **kwargs): phases.take()

        def on_step_end(self, *args, **kwargs):
            over(phases.take() | {"loss": sum(losses)})
            losses.clear()
            phases.take()

    trainer.training_step = training_step
    phases.of(trainer, "_prepare_inputs", lambda: "rest")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())  # the last, behind the teacher's


def loop_steps(
    match: Match, asked: Sequence[Sequence[Task]], rows: int | None, phases: Phases
) -> Iterator[tuple[list[Rollout], float]]:  # the attempts that each step drew, none where it drew none; the loss
    "The plain loop of the package; where the script has attempts, it learns from those."
    model, tokenizer = match.student()
    if match.rank: model, _ = add_adapter(model, rank=match.rank, alpha=2.0 * match.rank)
    if match.is_checkpointed: model.gradient_checkpointing_enable({"use_reentrant": False})
    size, teacher, sampler = match.size, EMA().attach(model), sampler_for(model, tokenizer, match.size.sampling)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=size.learning_rate, weight_decay=0.0, fused=True)
    size = replace(size, rows_per_pass=rows or size.tasks * size.attempts)
    model.train()
    phases.take()
    for step, tasks in enumerate(asked, 1):
        drawn: list[Rollout] = []
        if match.attempts != "prescribed":
            with phases("sample"): drawn = sampler.sample(tasks, size.attempts, seed=size.seed * 1_000_003 + step)
        attempts = match.script.answered[step - 1] if match.attempts != "own" else drawn
        said = judge_all(match.script, attempts)
        optimizer.param_groups[0]["lr"] = size.learning_rate_at(step)
        learned = rows_of(match.method, attempts, said, tokenizer)
        loss, _ = update(model, tokenizer, teacher, optimizer, match.method, learned, size, phases)
        yield drawn, loss


def loop(over: Over, match: Match, rows: int | None = None) -> None:
    "The plain loop, with so many rows in a pass."
    phases = Phases(match.device)
    for _, loss in loop_steps(match, match.script.asked, rows, phases):
        over(phases.take() | {"loss": loss})
        phases.take()


def demo_match(book: str, steps: int, seed: int = 0) -> Match:
    "A run of the demo by the plain loop, whose attempts everybody then learns from at the same point of the same run."
    environment = Codebook(book, "full" if book == "omega" else "none")
    size, chance = replace(DEMO_SIZE, steps=steps, seed=seed), random.Random(seed)
    tasks = environment.tasks(size.train_tasks)
    asked = [chance.sample(tasks, size.tasks) for _ in range(steps)]
    bare = Match(Script(environment, asked, [], True, environment.feedback), size, attempts="own")
    answered = [drawn for drawn, _ in loop_steps(bare, asked, None, Phases())]
    return replace(bare, script=replace(bare.script, answered=answered), attempts="replaced")


def random_match(
    shape: Shape, steps: int, objective: Objective, device: str = "cpu", dtype: str = "float32", seed: int = 0,
    is_eased: bool = False,
) -> Match:
    "Attempts of random words, to be learned from with an adapter of rank 16."
    size = LoopConfig(
        steps=steps, tasks=shape.tasks, attempts=shape.attempts, sampling=Sampling(shape.longest), learning_rate=1e-4,
        seed=seed,
    )
    return Match(
        random_script(shape, steps, seed, is_eased), size, partial(student_of, shape, device, dtype), objective,
        rank=16, attempts="prescribed", aggregation="seq-mean-token-mean", device=device, dtype=dtype,
    )


def to_read(match: Match, step: int = 0) -> dict[str, int]:
    "Tokens that a step's readers have to read at least, those of whoever reads row by row, and those compared."
    attempts, (_, tokenizer) = match.script.answered[step], match.student()
    learned = rows_of(match.method, attempts, judge_all(match.script, attempts), tokenizer)
    rows = [row for row in learned if row.has_signal]
    told = render(tokenizer, [row.view.messages for row in rows])
    ids = [row.rollout.completion_ids[:-1] for row in rows]
    readers = {"student": [row.rollout.prompt_ids for row in rows], "teacher": told}
    whole = {name: [(*prompt, *rest) for prompt, rest in zip(prompts, ids)] for name, prompts in readers.items()}
    return {name: beginnings(read) for name, read in whole.items()} | {
        f"{name}, row by row": sum(map(len, read)) for name, read in whole.items()
    } | {"compared": sum(len(row.rollout.completion_ids) for row in rows)}


def rate_of(device: str, dtype: str) -> float:  # operations in a second
    "How fast this machine multiplies square matrices, at its best."
    side, seconds = 8192 if device != "cpu" else 2048, []
    left, right = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    for _ in range(15):
        phases = Phases(device)
        left @ right
        seconds.append(phases.take()["rest"])
    return 2 * side**3 / min(seconds)


def warm(found: Mapping[str, Sequence[Step]]) -> dict[str, list[Step]]:
    "Without the first step of each, in which whatever is made once was made."
    return {name: list(steps[1:]) for name, steps in found.items()}


def seconds_of(steps: Sequence[Step], phases: Sequence[str] = PHASES) -> list[float]:
    "What these phases took in each step."
    return [sum(step[phase] for phase in phases) for step in steps]


def ratio_of(
    above: Sequence[Step], below: Sequence[Step], phases: Sequence[str] = PHASES
) -> dict[str, Any]:  # of all steps together, and the middle half of the steps' own
    "How much longer one contestant took than another."
    pairs = list(zip(seconds_of(above, phases), seconds_of(below, phases)))
    each = [one / other for one, other in pairs]
    whole = {"ratio": sum(one for one, _ in pairs) / sum(other for _, other in pairs)}
    if len(each) == 1: return whole
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return whole | {"spread": [low, high]}


def means(steps: Sequence[Step]) -> Step:
    "Seconds of a step in the mean, by phase."
    return {phase: round(statistics.mean(seconds_of(steps, [phase])), 5) for phase in PHASES}


def show_phases(found: Mapping[str, Sequence[Step]]) -> None:
    "Print a table of seconds by phase."
    print(f"  {'':24}{'step':>9}  " + "".join(f"{phase:>11}" for phase in PHASES))
    for name, steps in found.items():
        mean = means(steps)
        each = "".join(f"{mean[phase]:11.3f}" for phase in PHASES)
        print(f"  {name:24}{sum(mean.values()):9.3f} s{each}", flush=True)


class Ratios:
    "The ratios of a benchmark: printed as they come, and kept."

    def __init__(self):
        self.kept: dict[str, dict[str, Any]] = {}

    def add(self, name: str, found: Mapping[str, Any], reads: str) -> None:
        "One ratio, the middle half of its parts where there are parts, and which way it reads."
        self.kept[name] = {**found, "reads": reads}
        spread = f"({' to '.join(f'{x:.2f}' for x in found['spread'])})" if "spread" in found else ""
        print(f"  {name:30}{found['ratio']:7.2f}   {spread:16}  {reads}", flush=True)

    def as_json(self) -> dict[str, Any]:
        "Three tables by the same names."
        pick = lambda key: {name: found[key] for name, found in self.kept.items() if key in found}
        return {"ratios": pick("ratio"), "spreads": pick("spread"), "reads": pick("reads")}


def finish(result: Mapping[str, Any], options: Any, prints: bool = True) -> None:
    "Stamp a result, write it where it belongs, and print it where it is asked for."
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "json")}
    line = json.dumps({**result, "asked": asked} | stamp())
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(line + "\n", encoding="utf-8")
    if options.json and prints: print(line)


def begin(about: str) -> argparse.ArgumentParser:
    "The options that all share."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", dest="is_long", action="store_false", help="minutes; so it is when nothing is said")
    form.add_argument("--long", dest="is_long", action="store_true", help="what the page of the site is drawn from")
    parser.set_defaults(is_long=False)
    parser.add_argument("--threads", type=int, help="one for the demo, whose work is small; else one a core")
    parser.add_argument("--json", action="store_true", help="print the result last, as one JSON object")
    parser.add_argument("--out", help="write it there")
    return parser


def quiet() -> None:
    "Nothing but tables."
    warnings.simplefilter("ignore"), logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
