"""The trainer learns the same from a batch, however that is cut: into passes, into slices, into two processes."""
import multiprocessing
import os
import socket
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from sdpo_nb.core.adapters import add_adapter
from sdpo_nb.core.demo import BOOKS, DEMO, ask, encode
from sdpo_nb.core.models import as_reader, pad
from sdpo_nb.core.records import Feedback
from sdpo_nb.experience.batches import Batch, Prompts
from sdpo_nb.learn.config import SDPOConfig
from sdpo_nb.learn.reading import read, undressed
from sdpo_nb.learn.selves import FullCopy, whole
from sdpo_nb.learn.trainer import SDPOTrainer
from sdpo_nb.loss.objectives import token_logps
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

BOOK, TOKENIZER = BOOKS["omega"], AutoTokenizer.from_pretrained(DEMO)
ATTEMPTS = {  # at each question, in one group: r is right, w is wrong and hears why, ? is no answer and hears nothing
    "ba ki": "r???????",  # all but the first are shown a success; half of them sit in another process than it
    "mu re fo": "????w?w?",  # the first four, which one process gets, have no signal
    "go pa ve": "?wr?wrww",
    "so": "????????",  # nobody has
}
LOUD = tuple(ATTEMPTS)[:3]
STEP = dict(num_generations=8, per_device_train_batch_size=8)  # eight rows, one group
TRAINED, AGGREGATIONS = ("all weights", "adapter"), ("token-mean", "seq-mean-token-mean")
WRAPS = {"layer by layer": "TRANSFORMER_BASED_WRAP", "as one": "NO_WRAP"}


def answer(question: str, kind: str, place: int) -> str:
    "What an attempt says; some that say nothing say it in the same words."
    right = encode(BOOK, question.split())
    if kind == "w": return right.translate({ord(BOOK[syllable]): "ABCDEFGH"[place] for syllable in question.split()})
    return right if kind == "r" else "ba " * (place // 2 + 1)


def retold(prompts: list[Any], trainer: SDPOTrainer) -> dict[str, Any]:
    "A `rollout_func` that draws nothing: the attempts stand in the table."
    ids, start = [], trainer.accelerator.process_index * len(prompts)
    for i, prompt in enumerate(prompts):
        question, place = prompt[-1]["content"].split(": ")[1], (start + i) % trainer.num_generations
        text = answer(question, ATTEMPTS[question][place], place)
        ids.append(TOKENIZER(text).input_ids + [TOKENIZER.eos_token_id])
    return dict(prompt_ids=trainer._tokenize_prompts(prompts)[0], completion_ids=ids, logprobs=None)


def judge(completions: list[Any], question: list[str], **columns: Any) -> list[Feedback]:
    "Words for those who gave a wrong answer."
    texts, rights = [one[-1]["content"] for one in completions], [encode(BOOK, one.split()) for one in question]
    said = [f"Use {right}." if "=" in text and text != right else "" for text, right in zip(texts, rights)]
    return [Feedback(float(text == right), words) for text, right, words in zip(texts, rights, said)]


def student(trained: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    "All weights, or an adapter that has been trained before; sure of itself, so that its teacher has something to say."
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    special = dict(pad_token_id=TOKENIZER.pad_token_id, eos_token_id=TOKENIZER.eos_token_id, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), initializer_range=0.3, **sizes, **special))
    if trained == "adapter":
        model, _ = add_adapter(model, rank=2)
        for weight in model.parameters():
            if weight.requires_grad: torch.nn.init.normal_(weight, std=0.1)
    return model.to(dtype)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    "What is trained, as one process would hold it."
    named = {name.removeprefix("module."): weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: whole(weight) for name, weight in named.items()}


class Watch(TrainerCallback):
    "Keeps gradients, weights and what was read, step by step."

    def __init__(self):
        self.gradients, self.weights, self.teachers, self.moments = [], [], [], []
        self.read, self.reads = Counter(), []  # rows that each reader has read, and in how many passes

    def follow(self, trainer: SDPOTrainer) -> None:
        "Look over the shoulders of student and teacher."
        self.trainer, second = trainer, trainer.teacher.second
        readers = {"student": trainer.model} | ({"teacher": second.model} if isinstance(second, FullCopy) else {})
        for name, reader in readers.items():
            look = lambda layer, args, name=name: self.read.update({name: len(args[0]), f"{name}'s passes": 1})
            undressed(reader).get_decoder().register_forward_pre_hook(look)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        named = {name.removeprefix("module."): weight.grad for name, weight in model.named_parameters()}
        self.gradients.append({name: whole(grad) for name, grad in named.items() if grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(self.trainer.model))
        self.teachers.append(self.trainer.teacher.state_dict()["weights"])
        kept = [state for state in optimizer.state.values() if state]
        self.moments.append([whole(state[name]) for state in kept for name in ("step", "exp_avg", "exp_avg_sq")])
        self.reads.append(self.read)
        self.read = Counter()


class Noting(SDPOTrainer):
    "Also keeps the rows that it learns from, pass by pass."

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.noted = getattr(self, "noted", []) + [rows_of(inputs)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def rows_of(inputs: dict[str, Any]) -> list[tuple[tuple[int, ...], ...]]:
    "The rows of a slice that have a signal: prompt, what the teacher reads, attempt."
    real = lambda name, mask: [tuple(ids[seen.bool()].tolist()) for ids, seen in zip(inputs[name], inputs[mask])]
    prompts, attempts = real("prompt_ids", "prompt_mask"), real("completion_ids", "completion_mask")
    told = [ids[: -len(own)] for ids, own in zip(real("teacher_input_ids", "teacher_attention_mask"), attempts)]
    return [row for row, active in zip(zip(prompts, told, attempts), inputs["self_distillation_mask"]) if active]


def run(
    trained: str, questions: tuple[str, ...] = LOUD, dtype: torch.dtype = torch.float64, **settings: Any
) -> dict[str, Any]:
    "Train, and say all there is to say about it."
    sizes = dict(max_steps=3, learning_rate=0.01, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=1e6)
    quiet = dict(logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    where = dict(output_dir="unused", max_completion_length=16, bf16=False, fp16=False, ddp_timeout=120)
    args = SDPOConfig(**STEP | sizes | quiet | where | settings)
    columns = [dict(prompt=[dict(role="user", content=ask("omega", one.split()))], question=one) for one in questions]
    watch = Watch()
    trainer = Noting(
        student(trained, dtype), judge, args, train_dataset=Dataset.from_list(columns), processing_class=TOKENIZER,
        rollout_func=retold, callbacks=[watch],
    )
    watch.follow(trainer)
    begun = trainer.teacher.state_dict()["weights"]
    trainer.train()
    logs = trainer.state.log_history[:-1]
    return dict(
        gradients=watch.gradients, weights=watch.weights, teachers=watch.teachers, moments=watch.moments,
        reads=watch.reads, noted=trainer.noted, begun=begun, wrapper=type(trainer.model_wrapped).__name__,
        **{name: [log.get(key) for log in logs] for name, key in dict(
            losses="loss", norms="grad_norm", silent="sdpo/silent_steps", heard="sdpo/signal_fraction",
            behind="sdpo/teacher_distance",
        ).items()},
    )


@cache
def alone(trained: str, aggregation: str) -> dict[str, Any]:
    "Three steps, each in one pass of one process."
    return run(trained, aggregation=aggregation)


def apart(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    "The largest difference of any weight, or gradient, in any step."
    assert len(found) == len(expected) and all(list(a) == list(b) for a, b in zip(found, expected))
    return max((a[name] - b[name]).abs().max().item() for a, b in zip(found, expected) for name in a)


def check_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    "Losses, gradients, weights and the teacher, step by step."
    if isinstance(found, str): pytest.fail(found)
    for what in ("gradients", "weights", "teachers"): assert apart(found[what], expected[what]) < tolerance, what
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)  # Transformers keeps it in single precision
    assert found["norms"] == pytest.approx(expected["norms"], abs=tolerance)
    assert found["behind"] == pytest.approx(expected["behind"], abs=1e-6)
    assert found["heard"] == expected["heard"] and found["silent"] == expected["silent"]


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_how_often_gradients_are_gathered_does_not_matter(trained: str, aggregation: str):
    expected = alone(trained, aggregation)
    assert sorted(expected["heard"]) == [2 / 8, 6 / 8, 7 / 8]  # so that slices differ in how much they say
    assert min(expected["norms"]) > 0.01 and apart(expected["teachers"][-1:], [expected["begun"]]) > 1e-4
    for times in (2, 4):
        cut = dict(per_device_train_batch_size=8 // times, gradient_accumulation_steps=times)
        check_same(run(trained, aggregation=aggregation, **cut), expected)
