"""The demo's task on this package and on TRL's trainers, in the same process and the same size.

It is what benchmarks and experiments compare.
"""

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from sdpo_nb.core.demo import DEMO, Codebook, load_demo
from sdpo_nb.core.records import Task
from sdpo_nb.experience.rollouts import Sampling
from sdpo_nb.learn.loop import LoopConfig, fit, pass_rate
from sdpo_nb.learn.methods import Method
from sdpo_nb.learn.teachers import Teacher

Curve = list[tuple[int, float]]  # attempts made, held-out pass rate


def stamp() -> dict[str, Any]:
    "Where and with what a figure was measured."
    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    is_dirty = git("status", "--porcelain", "--", ":/sdpo_nb", ":/benchmarks")  # results being written do not count
    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("-dirty" if is_dirty else ""),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


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


def trl_trainer(
    environment: Codebook,  # asks and judges
    name: str,  # sdpo or grpo
    size: LoopConfig,  # the same numbers as for run_ours
    callbacks: list = [],  # transformers callbacks
):
    "TRL's trainer for the same job. Its SDPO reads feedback from a column, so a subclass hands it the attempt's own."
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    def judged(task_prompt, answer, completion):
        return environment.judge(Task(task_prompt, {"answer": answer}), completion[0]["content"])

    def score(prompts, completions, answer, **_):
        return [judged(p, a, c).score for p, c, a in zip(prompts, completions, answer)]

    class TalkingSDPO(SDPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, ids):
            for row, completion in zip(inputs, completions):
                row["privileged_context"] = judged(row["prompt"], row["answer"], completion).text or None
            return super()._calculate_rewards(inputs, prompts, completions, ids)

        def _prepare_training_batch(self, inputs):
            rows = [dict(row) for row in inputs]  # rows of a group are one object
            build = self.teacher_context_builder.build

            def with_feedback(output, prompts, rewards, feedbacks=None):
                return build(output, prompts, rewards, feedbacks=[row["privileged_context"] for row in rows])

            self.teacher_context_builder.build = with_feedback
            try: return super()._prepare_training_batch(rows)
            finally: self.teacher_context_builder.build = build

    common = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size.tasks * size.attempts,
        num_generations=size.attempts, max_completion_length=size.sampling.max_new_tokens,
        learning_rate=size.learning_rate, weight_decay=0.0, lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(size.steps * size.cooldown), "decay_type": "linear"},
        max_steps=size.steps, seed=size.seed, temperature=size.sampling.temperature,
        logging_steps=10_000, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "float32"},
    )
    if name == "sdpo":
        config = SDPOConfig(
            **common, distillation_mode="full_logits", distillation_alpha=1.0, teacher_model_kind="ema",
            teacher_update_rate=0.05, include_environment_feedback=environment.feedback != "none",
        )
    else: config = GRPOConfig(**common)
    rows = [{"prompt": list(task.messages), "answer": task.info["answer"]} for task in environment.tasks(2000)]
    _, tokenizer = load_demo()
    kind = TalkingSDPO if name == "sdpo" else GRPOTrainer
    return kind(
        model=str(DEMO), reward_funcs=score, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=callbacks,
    )


def our_trainer(
    environment: Codebook,  # asks and judges
    size: LoopConfig,  # the same numbers as for run_ours
    callbacks: list = [],  # transformers callbacks
    rank: int = 0,  # of a LoRA adapter; 0 trains all weights
    **settings: Any,  # of SDPOConfig
):
    "This package's trainer for the same job."
    from datasets import Dataset
    from sdpo_nb.core.adapters import add_adapter
    from sdpo_nb.learn.presets import demo
    from sdpo_nb.learn.hosting import as_reward, as_rows
    from sdpo_nb.learn.trainer import SDPOTrainer

    model, tokenizer = load_demo()
    if rank: model, _ = add_adapter(model, rank=rank, alpha=2.0 * rank)
    config = demo(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size.tasks * size.attempts,
        num_generations=size.attempts, max_completion_length=size.sampling.max_new_tokens,
        learning_rate=size.learning_rate, max_steps=size.steps, seed=size.seed,
        logging_steps=10_000, save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        **settings,
    )
    return SDPOTrainer(
        model, as_reward(environment), config, Dataset.from_list(as_rows(environment.tasks(2000))),
        processing_class=tokenizer, callbacks=callbacks,
    )


def watched(
    build: Callable[[list], Any],  # makes a trainer of callbacks
    environment: Codebook,  # asks and judges
    size: LoopConfig,  # how often to look
) -> dict[str, Any]:  # seconds without the looking, and the curve
    "Train with a trainer of TRL's kind."
    from transformers import TrainerCallback

    curve, spent = [], [0.0]
    tokenizer, held_out = load_demo()[1], environment.tasks(size.held_out, "held_out")

    class Look(TrainerCallback):
        def look(self, model, step):
            start, was_training = time.perf_counter(), model.training
            rate = pass_rate(model.eval(), tokenizer, environment, held_out, size.sampling, seed=size.seed)
            model.train(was_training)
            curve.append((step * size.tasks * size.attempts, rate))
            spent[0] += time.perf_counter() - start

        def on_train_begin(self, args, state, control, model=None, **_): self.look(model, 0)

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step % size.evaluate_every == 0 or state.global_step == size.steps:
                self.look(model, state.global_step)

    trainer = build([Look()] if size.evaluate_every else [])
    start = time.perf_counter()
    with redirect_stdout(StringIO()): trainer.train()
    return {"seconds": time.perf_counter() - start - spent[0], "curve": curve, "model": trainer.model}


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
