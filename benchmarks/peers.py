"""The same task on this package and on TRL's trainers, in the same process and the same size.

It is what benchmarks and experiments compare.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from sdpo_nb.core.demo import DEMO, Codebook, load_demo
from sdpo_nb.core.records import Task
from sdpo_nb.experience.feedback import Environment
from sdpo_nb.experience.rollouts import Sampling
from sdpo_nb.learn.loop import LoopConfig, fit, pass_rate
from sdpo_nb.learn.methods import Method
from sdpo_nb.learn.teachers import Teacher

Curve = list[tuple[int, float]]  # attempts made, held-out pass rate
Student = tuple[Any, Any]  # a model and its tokenizer
unchanged = lambda kind: kind  # a trainer's class, as it is
NO_ROOM = "can't allocate memory", "MemoryError", "OutOfMemoryError", "Cannot allocate memory"


def stamp() -> dict[str, Any]:
    "Where and with what a figure was measured."
    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    is_dirty = git("status", "--porcelain", "--", ":/sdpo_nb", ":/benchmarks", ":(top,exclude)benchmarks/results")
    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("-dirty" if is_dirty else ""),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def peak_memory(device: str) -> int:
    "The most bytes that were held since the last call, and now begin again."
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak


def apart(script: str, words: Sequence[str]) -> dict[str, Any] | None:
    "What a script prints last when it runs in a process of its own; None where the memory does not suffice."
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    if done.returncode == 0: return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -9 or any(phrase in done.stderr for phrase in NO_ROOM): return None
    raise RuntimeError(done.stderr)


def run_ours(
    environment: Codebook,  # asks and judges
    method: Method,  # what is minimised
    size: LoopConfig,  # steps, seed, learning rate, how often to look
    teacher: Teacher | None = None,  # EMA(0.05) when not given
) -> dict[str, Any]:  # seconds without the looking, and the curves: student, teacher when told, their distance
    "Train the demo with this package."
    model, tokenizer = load_demo()
    start = time.perf_counter()
    reports = fit(model, tokenizer, environment, method, teacher, size)
    wall = time.perf_counter() - start
    curve = [(r.attempts, r.held_out) for r in reports if r.held_out is not None]
    taught = [(r.attempts, r.teacher_pass_rate) for r in reports if r.teacher_pass_rate is not None]
    apart = [(r.attempts, r.metrics["teacher_distance"]) for r in reports if "teacher_distance" in r.metrics]
    seconds = sum(r.seconds for r in reports) if curve else wall
    return {"seconds": seconds, "curve": curve, "taught": taught, "apart": apart, "model": model}


def talking(kind: type, environment: Any) -> type:
    "TRL's SDPO trainer, told what was said of each attempt: by itself it reads that from a column, before the attempt."
    class TalkingSDPO(kind):
        def _calculate_rewards(self, inputs, prompts, completions, ids):
            for row, completion in zip(inputs, completions):
                said = environment.judge(task_of(row), completion[0]["content"])
                row["privileged_context"], row["score"] = said.text or None, said.score
            return super()._calculate_rewards(inputs, prompts, completions, ids)

        def _prepare_training_batch(self, inputs):
            rows = [dict(row) for row in inputs]  # rows of a group are one object
            build = self.teacher_context_builder.build

            def with_feedback(output, prompts, rewards, feedbacks=None):
                return build(output, prompts, rewards, feedbacks=[row["privileged_context"] for row in rows])

            self.teacher_context_builder.build = with_feedback
            try: return super()._prepare_training_batch(rows)
            finally: self.teacher_context_builder.build = build

    return TalkingSDPO


def task_of(row: Mapping[str, Any]) -> Task:
    "A row of a dataset as the task that it was."
    return Task(tuple(row["prompt"]), {name: value for name, value in row.items() if name != "prompt"})


def trl_trainer(
    environment: Environment,  # asks and judges
    name: str,  # sdpo or grpo
    size: LoopConfig,  # the same numbers as for run_ours
    callbacks: Sequence[Any] = (),  # transformers callbacks
    rank: int = 0,  # of a LoRA adapter; 0 trains all weights
    student: Student | None = None,  # who learns; the demo when not given
    host: Callable[[type], type] = unchanged,  # what to make of the trainer's class
    **settings: Any,  # of its config, that differ
):
    "TRL's trainer for the same job."
    from datasets import Dataset
    from peft import LoraConfig
    from sdpo_nb.learn.hosting import as_rows
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    def score(prompts, completions, score=None, **columns):
        if score is not None: return score  # the talking trainer has asked already
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, columns["answer"])]
        return [environment.judge(task_of(row), said[0]["content"]).score for row, said in zip(rows, completions)]

    common = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size.tasks * size.attempts,
        num_generations=size.attempts, max_completion_length=size.sampling.max_new_tokens,
        learning_rate=size.learning_rate, weight_decay=0.0, lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(size.steps * size.cooldown), "decay_type": "linear"},
        max_steps=size.steps, seed=size.seed, temperature=size.sampling.temperature,
        logging_steps=10_000, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False,
    )
    if student is None: common["model_init_kwargs"] = {"dtype": "float32"}
    if name == "sdpo":
        config = SDPOConfig(**dict(
            common, distillation_mode="full_logits", distillation_alpha=1.0, teacher_model_kind="ema",
            teacher_update_rate=0.05, include_environment_feedback=environment.feedback != "none",
            max_prompt_length=None,
        ) | settings)
    else: config = GRPOConfig(**common | settings)
    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    ) if rank else None
    kind = host(talking(SDPOTrainer, environment) if name == "sdpo" else GRPOTrainer)
    model, tokenizer = student or (str(DEMO), load_demo()[1])
    return kind(
        model=model, reward_funcs=score, args=config,
        train_dataset=Dataset.from_list(as_rows(environment.tasks(size.train_tasks))),
        processing_class=tokenizer, callbacks=list(callbacks), peft_config=adapter,
    )


def our_trainer(
    environment: Environment,  # asks and judges
    size: LoopConfig,  # the same numbers as for run_ours
    callbacks: Sequence[Any] = (),  # transformers callbacks
    rank: int = 0,  # of a LoRA adapter; 0 trains all weights
    student: Student | None = None,  # who learns; the demo when not given
    host: Callable[[type], type] = unchanged,  # what to make of the trainer's class
    **settings: Any,  # of SDPOConfig, that differ
):
    "This package's trainer for the same job."
    from datasets import Dataset
    from sdpo_nb.core.adapters import add_adapter
    from sdpo_nb.learn.hosting import as_reward, as_rows
    from sdpo_nb.learn.presets import demo
    from sdpo_nb.learn.trainer import SDPOTrainer

    model, tokenizer = student or load_demo()
    if rank: model, _ = add_adapter(model, rank=rank, alpha=2.0 * rank)
    config = demo(**dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size.tasks * size.attempts,
        num_generations=size.attempts, max_completion_length=size.sampling.max_new_tokens,
        learning_rate=size.learning_rate, max_steps=size.steps, seed=size.seed,
        logging_steps=10_000, save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    ) | settings)
    return host(SDPOTrainer)(
        model, as_reward(environment), config, Dataset.from_list(as_rows(environment.tasks(size.train_tasks))),
        processing_class=tokenizer, callbacks=list(callbacks),
    )


def watched(
    build: Callable[[list], Any],  # makes a trainer of callbacks
    environment: Codebook,  # asks and judges
    size: LoopConfig,  # how often to look
    enough: float = 2.0,  # the pass rate at which to stop; above 1: never
) -> dict[str, Any]:  # seconds without the looking, the curve, and the seconds at each of its looks
    "Train with a trainer of TRL's kind."
    from transformers import TrainerCallback

    curve, times, spent = [], [], [0.0]
    tokenizer, held_out = load_demo()[1], environment.tasks(size.held_out, "held_out")

    class Look(TrainerCallback):
        def look(self, model, step):
            begin, was_training = time.perf_counter(), model.training
            times.append(begin - start - spent[0])
            rate = pass_rate(model.eval(), tokenizer, environment, held_out, size.sampling, seed=size.seed)
            model.train(was_training)
            curve.append((step * size.tasks * size.attempts, rate))
            spent[0] += time.perf_counter() - begin

        def on_train_begin(self, args, state, control, model=None, **_): self.look(model, 0)

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step % size.evaluate_every == 0 or state.global_step == size.steps:
                self.look(model, state.global_step)
                control.should_training_stop |= curve[-1][1] >= enough

    trainer = build([Look()] if size.evaluate_every else [])
    start = time.perf_counter()
    with redirect_stdout(StringIO()): trainer.train()
    return {"seconds": time.perf_counter() - start - spent[0], "curve": curve, "times": times, "model": trainer.model}


def run_trl(
    environment: Codebook,  # asks and judges
    name: str,  # sdpo or grpo
    size: LoopConfig,  # the same numbers as for run_ours
) -> dict[str, Any]:  # seconds without the looking, and the curve
    "Train the demo with TRL."
    return watched(lambda callbacks: trl_trainer(environment, name, size, callbacks), environment, size)


def run_trainer(
    environment: Codebook,  # asks and judges
    size: LoopConfig,  # the same numbers as for run_ours
    rank: int = 0,  # of a LoRA adapter; 0 trains all weights
) -> dict[str, Any]:  # seconds without the looking, and the curve
    "Train the demo with this package's trainer."
    return watched(lambda callbacks: our_trainer(environment, size, callbacks, rank), environment, size)


def final_rate(
    run: dict[str, Any],  # of run_ours or run_trl
    environment: Codebook,  # asks and judges
    tokenizer,  # the demo's
) -> float:
    "The held-out pass rate at the end of a run that was not looked at on the way."
    return pass_rate(run["model"].eval(), tokenizer, environment, environment.tasks(256, "held_out"), Sampling(20))
