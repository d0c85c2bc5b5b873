"""What is asked, answered and said, written down beforehand; and models of random weights that are to read it."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peers import Student
from sdpo_nb.core.models import render
from sdpo_nb.core.records import Feedback, Rollout, Task


@dataclass(frozen=True)
class Script:
    "What is asked in each step, what is answered, and who judges: an environment whose tasks come in this order."

    judging: Any  # the environment that says what is said
    asked: list[list[Task]]  # in each step
    answered: list[list[Rollout]]  # the attempts at the first task of the step, then those at the second, ...
    is_drawn: bool  # whether a model drew them, and it is known how likely each token was
    feedback: str = "full"  # none, where nothing is said

    def tasks(self, count: int, split: str = "train") -> list[Task]:
        "All that is asked."
        return [task for step in self.asked for task in step]

    def judge(self, task: Task, answer: str) -> Feedback:
        "What is said of an answer."
        return self.judging.judge(task, answer)

    def answers(self) -> Iterator[tuple[list[list[int]], list[list[float]] | None]]:
        "Each step's attempts, as trainers know them."
        for attempts in self.answered:
            ids, logps = [list(one.completion_ids) for one in attempts], [list(one.logps) for one in attempts]
            yield ids, logps if self.is_drawn else None


@dataclass(frozen=True)
class Shape:
    "A Qwen3-like model of random weights, and the attempts that it is to read."

    hidden: int = 256  # width
    layers: int = 16
    heads: int = 8  # half as many keys and values
    head_size: int = 64
    words: int = 151_936  # Qwen3's
    tasks: int = 8
    attempts: int = 8  # at each
    prompt: int = 512  # tokens
    shortest: int = 64  # tokens of an attempt, at least
    longest: int = 128  # and at most
    successes: int = 2  # of the attempts at each task: so everybody has a sibling's to be shown
    remark: int = 40  # words that are said of each failure
    silent_tasks: int = 0  # whose attempts all fail without a word
    silent_attempts: int = 0  # of each task, of whom nothing is said

    @property
    def weights(self) -> dict[str, int]:
        "How many numbers the layers hold, and how many the head, which is the embedding too."
        inner, wide = 3 * self.hidden, self.heads * self.head_size
        return {
            "layers": self.layers * self.hidden * (2 * wide + wide + 3 * inner), "head": self.words * self.hidden
        }


SHAPES = {
    "large": Shape(),
    "0.6B": Shape(hidden=1024, layers=28, heads=16, head_size=128, shortest=256, longest=512),
    "toy": Shape(
        hidden=32, layers=2, heads=4, head_size=8, words=400, tasks=2, attempts=4, prompt=24, shortest=6, longest=12,
        remark=8,
    ),
}
SPECIAL = ("<|pad|>", "<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>")
TURNS = "{% for turn in messages %}<|{{ turn.role }}|> {{ turn.content }} {% endfor %}<|assistant|>"


def tokenizer_of(shape: Shape) -> Any:
    "One token for each word w5, w6, ...; whatever else is said is one unknown word after the other."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), shape.words))])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<|unknown|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, end, unknown, *others = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, eos_token=end, unk_token=unknown, additional_special_tokens=others,
        chat_template=TURNS, padding_side="left",
    )


def student_of(shape: Shape, device: str = "cpu", dtype: str = "float32") -> Student:
    "The model, always the same one, and its tokenizer."
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.words, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        intermediate_size=3 * shape.hidden, num_attention_heads=shape.heads, num_key_value_heads=shape.heads // 2,
        head_dim=shape.head_size, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        initializer_range=0.06,  # so that words differ, and readers too
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    return model.to(device, getattr(torch, dtype)).eval(), tokenizer_of(shape)


@dataclass(frozen=True)
class Verdicts:
    "A judge who knows beforehand what to say of each answer."

    said: Mapping[str, Feedback]

    def judge(self, task: Task, answer: str) -> Feedback:
        "What is written of it."
        return self.said[answer]


def random_script(shape: Shape, steps: int, seed: int = 0, is_eased: bool = False) -> Script:
    "Questions, attempts and remarks of random words, as the shape says; an eased script begins with a short step."
    chance, tokenizer, said = random.Random(seed), tokenizer_of(shape), {}
    draw = lambda count: [chance.randrange(len(SPECIAL), shape.words) for _ in range(count)]
    write = lambda ids: " ".join(f"w{i}" for i in ids)
    asked, answered, whole = [], [], shape
    for step in range(steps):
        shape = replace(whole, prompt=32, shortest=8, longest=8, remark=8) if is_eased and not step else whole
        tasks, attempts = [Task.ask(write(draw(shape.prompt - 2))) for _ in range(shape.tasks)], []
        for group, (task, prompt) in enumerate(zip(tasks, render(tokenizer, [task.messages for task in tasks]))):
            for i in range(shape.attempts):
                ids = draw(chance.randint(shape.shortest, shape.longest) - 1)
                is_silent = group < shape.silent_tasks or i >= shape.attempts - shape.silent_attempts
                has_passed = i < shape.successes and group >= shape.silent_tasks
                words = "" if has_passed or is_silent else write(draw(shape.remark))
                said[write(ids)] = Feedback(float(has_passed), words)
                logps = (0.0,) * (len(ids) + 1)
                attempts.append(Rollout(task, group, tuple(prompt), (*ids, 1), logps, write(ids)))
        asked.append(tasks), answered.append(attempts)
    return Script(Verdicts(said), asked, answered, is_drawn=False)


def beginnings(rows: Sequence[Sequence[int]]) -> int:
    "How many tokens there are to read when each beginning that rows share is read once."
    seen = set()
    for row in rows:
        so_far = 0
        for token in row: seen.add(so_far := hash((so_far, token)))
    return len(seen)


def operations(shape: Shape, read: Mapping[str, int]) -> dict[str, float]:
    "What the readers of so many tokens cannot do without, where an adapter learns; one multiplication is two."
    wide, context = shape.heads * shape.head_size, (shape.prompt + shape.longest) / 2
    once = {name: 2 * read[name] * (shape.weights["layers"] + 2 * wide * shape.layers * context) for name in read}
    head = 2 * read["compared"] * shape.weights["head"]
    return {"teacher": once["teacher"] + head, "student": 2 * (once["student"] + head)}  # there, and the gradient back
