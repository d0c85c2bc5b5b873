"""All that GRPOTrainer brings, with SDPO's loss: rewards of every shape, tools, engines, data, logs, scripts."""
import copy
import functools
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import trl
from cells import codebook_judge, codebook_rows, codebook_trainer, grpo_runs_on_a_cpu, looking
from datasets import Dataset
from peft import LoraConfig
from sdpo_nb.core.adapters import adapter_weights
from sdpo_nb.core.demo import DEMO, load_demo
from sdpo_nb.core.records import Feedback
from sdpo_nb.experience.feedback import JudgeError
from sdpo_nb.experience.rollouts import Sampling, StaticSampler
from sdpo_nb.learn.config import SDPOConfig
from sdpo_nb.learn.trainer import SDPOTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BitsAndBytesConfig, HfArgumentParser, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast,
    Qwen3Config, Qwen3ForCausalLM,
)
from trl import GRPOTrainer
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You are using '(environment_factory|rollout_func)':UserWarning")
needs_trl_s_loss = pytest.mark.skipif(not grpo_runs_on_a_cpu(), reason="this TRL computes GRPO's loss on a GPU alone")
LORA = dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


def run(
    folder: Path, reward: Any, model: Any = None, given: Any = (), **settings: Any
) -> tuple[Any, list[dict[str, Any]]]:
    "Train, and keep every slice that is learned from, with what the teacher is told and the loss."
    slices = []

    def look(trainer, model, inputs, loss_of):
        width, words = inputs["completion_ids"].shape[1], trainer.processing_class.decode
        seen = inputs["teacher_attention_mask"].bool()
        told = [words(row[:-width][mask[:-width]]) for row, mask in zip(inputs["teacher_input_ids"], seen)]
        slices.append(inputs | {"told": told, "loss": loss_of(inputs).item()})

    trainer = codebook_trainer(folder, reward, model, looking(look), given, **settings)
    trainer.train()
    return trainer, slices


def reading(model: Any, ids: Tensor, mask: Tensor, width: int) -> list[Tensor]:
    "What a model expects of each row's attempt, row by row and without padding."
    lengths = [int(real[-width:].sum()) for real in mask]
    with torch.no_grad():
        return [
            model(row[real.bool()][None]).logits[0, -length - 1 : -1].log_softmax(-1)
            for row, real, length in zip(ids, mask, lengths)
        ]


def by_hand(trainer: Any, model: Any, inputs: dict[str, Any], learned: Tensor, ratio: Tensor | None = None) -> float:
    "The reverse KL over the whole vocabulary, meant over some tokens of the rows with a signal."
    width, teacher = inputs["completion_ids"].shape[1], inputs["teacher_input_ids"]
    asked = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    of_teacher = reading(trainer.ref_model, teacher, inputs["teacher_attention_mask"], width)
    apart = torch.zeros(learned.shape)
    for i, (p, q) in enumerate(zip(reading(model, asked, seen, width), of_teacher)):
        apart[i, : len(p)] = (p.exp() * (p - q)).sum(-1)
    if ratio is not None: apart = apart * ratio
    mask = learned * inputs["self_distillation_mask"][:, None]
    return ((apart * mask).sum() / mask.sum()).item()


# ---- reward functions


def numbers(completions, **columns): return [0.5] * len(completions)


def dicts(completions, **columns): return [{"score": 0.25, "feedback": f"dict {i}"} for i in range(len(completions))]


def records(completions, **columns):
    return [Feedback(0.125, f"record {i}", {"size": i}) for i in range(len(completions))]


def some(completions, **columns): return [None if i % 2 else 1.0 for i in range(len(completions))]


async def later(completions, **columns):
    return [{"score": 0.0, "feedback": f"late {i}" if i < 4 else ""} for i in range(len(completions))]


def dislike(completions, **columns): return [{"score": 0.0, "feedback": "No."}] * len(completions)


def test_rewards_of_every_shape_are_heard_together(tmp_path: Path):
    functions, share = [numbers, dicts, records, some, later], [1.0, 2.0, 4.0, 8.0, 16.0]
    trainer, (inputs,) = run(tmp_path, functions, reward_weights=share, success_reward_threshold=99.0)
    line, *_ = trainer.state.log_history
    means = {"numbers": 0.5, "dicts": 0.25, "records": 0.125, "some": 1.0, "later": 0.0}
    assert {name: line[f"rewards/{name}/mean"] for name in means} == means
    assert line["reward"] == 0.5 + 2 * 0.25 + 4 * 0.125 + 8 * 0.5
    assert line["sdpo/judged_records/size"] == sum(range(8)) / 8
    said = ["\n".join([f"dicts: dict {i}", f"records: record {i}"] + [f"later: late {i}"] * (i < 4)) for i in range(8)]
    assert all(sum(one in told for one in said) == 1 for told in inputs["told"])
    assert all(sum(one in told for told in inputs["told"]) == 1 for one in said)


def test_the_list_of_reward_functions_stays_the_user_s(tmp_path: Path):
    functions = [numbers, later]
    trainer, _ = run(tmp_path, functions)
    assert functions == [numbers, later] == trainer.reward_funcs


def right(completions, **columns): return [1.0] * len(completions)


def formed(completions, **columns): return [1.0] * len(completions)


def test_weights_that_sum_to_one_make_a_success_of_what_satisfies_all(tmp_path: Path):
    trainer, _ = run(tmp_path / "both", [right, formed], reward_weights=[0.9, 0.1])  # 0.99999998 in 32 bits
    assert trainer.state.log_history[0]["sdpo/pass@1"] == 1.0
    with pytest.warns(UserWarning, match="the rewards of right, numbers are added up"):
        trainer, _ = run(tmp_path / "one", [right, numbers])
    assert trainer.state.log_history[0]["sdpo/pass@1"] == 1.0  # though numbers gave but a half


@pytest.mark.parametrize("prompt, said", [
    (None, "a prompt must be text"), ([{"role": "user", "content": None}], "the last turn needs content"),
])
def test_a_prompt_that_asks_nothing_is_refused_with_its_row(prompt: Any, said: str, tmp_path: Path):
    data = Dataset.from_list([{"prompt": prompt, "answer": f"{i}"} for i in range(8)])
    with pytest.raises(ValueError, match=f"{said}.*answer"): run(tmp_path, numbers, given=dict(train_dataset=data))


def test_a_word_that_the_model_does_not_have_is_refused(tmp_path: Path):
    model, tokenizer = load_demo("cpu")
    tokenizer.add_tokens(["<never seen>"])
    data = Dataset.from_list([{"prompt": f"<never seen> {i}"} for i in range(8)])
    given = dict(train_dataset=data, processing_class=tokenizer)
    with pytest.raises(ValueError, match="'<never seen>', and the model knows 768"): run(tmp_path, numbers, model, given)


def test_an_attempt_that_nobody_judges_is_neither_good_nor_bad(tmp_path: Path):
    def halves(completions, **columns):
        return [{"score": float(i), "feedback": "No."} if i < 4 else None for i in range(len(completions))]

    trainer, (inputs,) = run(tmp_path, halves, success_reward_threshold=3.0, dont_reprompt_on_self_success=False)
    line, *_ = trainer.state.log_history
    assert line["reward"] == 1.5 and line["sdpo/success_group_fraction"] == 0.5
    assert inputs["self_distillation_mask"].sum() == 4  # the group in which one succeeded
    assert not inputs["advantages"][~inputs["self_distillation_mask"]].any()


def test_a_reward_model_scores_beside_a_function_that_speaks(tmp_path: Path):
    _, tokenizer = load_demo()
    torch.manual_seed(0)
    sizes = dict(vocab_size=768, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    judge = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, pad_token_id=0, eos_token_id=1)).eval()
    judge.config._name_or_path, asked = "somewhere/tiny-judge", []

    def speaks(prompts, completions, **columns):
        asked.extend(zip(prompts, completions))
        return [{"score": 0.0, "feedback": "No."}] * len(prompts)

    given = dict(reward_processing_classes=[tokenizer, None])
    trainer, (inputs,) = run(tmp_path, [judge, speaks], None, given, success_reward_threshold=99.0)
    with torch.no_grad():
        texts = [tokenizer.apply_chat_template(prompt + turns, tokenize=False) for prompt, turns in asked]
        ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for text in texts]
        scores = [judge(one).logits.item() for one in ids]
    line, *_ = trainer.state.log_history
    assert line["rewards/tiny-judge/mean"] == pytest.approx(sum(scores) / 8, abs=1e-5) != 0
    assert line["reward_std"] > 1e-4
    assert all("speaks: No." in told for told in inputs["told"])


def test_a_judge_that_breaks_stops_the_run_or_is_taken_at_its_word(tmp_path: Path):
    def broken(completions, **columns): return [{"score": 1.0}, *[ValueError("no key")] * (len(completions) - 1)]

    with pytest.raises(JudgeError, match="broken, asked about attempt 1"): run(tmp_path, broken)
    trainer, (inputs,) = run(tmp_path, broken, judge_errors="feedback", demonstration_sources=[])
    assert sum("The judge failed" in told and "no key" in told for told in inputs["told"]) == 7
    assert trainer.state.log_history[0]["sdpo/judged_judge_error"] == 7 / 8
    with pytest.warns(UserWarning, match="an attempt scores 0 in silence"):
        trainer, (inputs,) = run(tmp_path, broken, judge_errors="silence")
    assert trainer.state.log_history[0]["reward"] == 1 / 8 and inputs["self_distillation_mask"].sum() == 3


# ---- rollouts of other people


def rendered(tokenizer: Any, prompts: list[Any]) -> list[list[int]]:
    "Prompts as the model reads them."
    return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)


def with_holes(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
    "The sampler's attempts, by an engine that could not say how likely some of the first tokens were."
    sampler = StaticSampler(trainer.model, trainer.processing_class, Sampling(6))
    asked = rendered(trainer.processing_class, prompts)
    ids, logps = (x.tolist() for x in sampler.draw(asked, seed=1))
    return {"prompt_ids": asked, "completion_ids": ids, "logprobs": [[None, *line[1:]] for line in logps]}


def test_tokens_that_nobody_could_score_count_as_they_are(tmp_path: Path):
    trainer, (inputs,) = run(tmp_path, codebook_judge, None, dict(rollout_func=with_holes), alpha=1.0, support="full")
    line, *_ = trainer.state.log_history
    assert math.isfinite(inputs["loss"]) and inputs["loss"] > 0 and line["sdpo/skipped_steps"] == 0
    assert line["sdpo/ratio"] == pytest.approx(1, abs=1e-3)


def with_an_environment(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
    "Two turns of the policy, and between them three tokens of an environment."
    tokenizer = trainer.processing_class
    sampler, asked = StaticSampler(trainer.model, tokenizer, Sampling(6)), rendered(tokenizer, prompts)
    between = tokenizer("<|user|>no", add_special_tokens=False)["input_ids"]
    first, logps = (x.tolist() for x in sampler.draw(asked, seed=1))
    second, more = (x.tolist() for x in sampler.draw([p + a + between for p, a in zip(asked, first)], seed=2))
    return {
        "prompt_ids": asked, "completion_ids": [a + between + b for a, b in zip(first, second)],
        "logprobs": [a + [None] * len(between) + b for a, b in zip(logps, more)],
        "env_mask": [[1] * len(a) + [0] * len(between) + [1] * len(b) for a, b in zip(first, second)],
        "turns": [2] * len(prompts),
    }


@pytest.mark.parametrize("when", ["at once", "later"])
def test_of_a_rollout_function_s_tokens_only_the_policy_s_count(when: str, tmp_path: Path):
    heard = []

    def judge(turns, completions, **columns):
        heard.extend(turns)
        return [{"score": 0.0, "feedback": "No."}] * len(turns)

    sizes = {} if when == "at once" else dict(steps_per_generation=2, per_device_train_batch_size=4)
    found = []

    def look(trainer, model, inputs, loss_of):
        learned = inputs["completion_mask"] * inputs["tool_mask"]
        means = [by_hand(trainer, model, inputs, mask) for mask in (learned, inputs["completion_mask"])]
        found.append((loss_of(inputs).item(), *means, inputs["old_per_token_logps"], learned))

    trainer = codebook_trainer(
        tmp_path, judge, host=looking(look), given=dict(rollout_func=with_an_environment), alpha=1.0, support="full",
        merge_duplicates=False, learning_rate=0.0, max_steps=2 if sizes else 1, **sizes,
    )
    trainer.train()
    assert heard == [2] * 8 and len(found) == (2 if sizes else 1)
    for loss, of_policy, of_all, old, learned in found:
        assert loss == pytest.approx(of_policy, rel=1e-4) and abs(of_policy - of_all) > 1e-3
        assert old[learned.bool()].lt(0).all()  # the sampler's, token for token


# ---- tools


def look_up(word: str) -> str:
    """
    Looks a word up in the book.

    Args:
        word: The word to look for.
    """
    return {"ka": "M", "so": "P"}.get(word, "nothing")


CALL = '<tool_call>\n{{"name": "look_up", "arguments": {{"word": "{}"}}}}\n</tool_call><|im_end|>'


@functools.cache
def taught() -> tuple[PreTrainedTokenizerFast, dict[str, Tensor]]:
    "A tokenizer with Qwen3's template, and the weights of a tiny model that has learned to call one tool."
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [template, look_up.__doc__, REPROMPTED, "What is ka? What is so? It is M. It is P.", CALL] * 9
    core.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(words)
    tokenizer.chat_template = template
    model = fresh(len(tokenizer))
    shown = trl.chat_template_utils.get_training_chat_template(tokenizer)
    lessons = []
    for word, answer in (("ka", "M"), ("so", "P")):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {word}?"}], tools=[look_up], chat_template=shown, tokenize=False,
            add_generation_prompt=True,
        )
        reply = f"\n<|im_start|>user\n<tool_response>\n{answer}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        lesson = f"{prompt}{CALL.format(word)}{reply}It is {answer}.<|im_end|>"
        lessons.append(tokenizer(lesson, return_tensors="pt")["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(90):
        optimizer.zero_grad()
        for ids in lessons: model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return tokenizer, {name: weight.clone() for name, weight in model.state_dict().items()}


REPROMPTED = "The following is feedback from your unsuccessful earlier attempt: Correctly solve the original question."


def fresh(words: int) -> Qwen3ForCausalLM:
    "A tiny Qwen3 that knows nothing."
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    sizes = dict(vocab_size=words, hidden_size=48, intermediate_size=96, num_hidden_layers=2)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, bos_token_id=None, eos_token_id=2, pad_token_id=0))


def pupil() -> tuple[Qwen3ForCausalLM, dict[str, Any]]:
    "A model that calls the tool, and what goes with it."
    tokenizer, weights = taught()
    model, tokenizer = fresh(len(tokenizer)), copy.deepcopy(tokenizer)
    model.load_state_dict(weights)
    data = questions(dict(question=f"What is {word}?", word=word) for word in ("ka", "so"))
    return model, dict(processing_class=tokenizer, train_dataset=data)


def questions(rows: Iterable[dict[str, Any]]) -> Dataset:
    "Rows with a question, as TRL's data."
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row.pop("question")}], **row} for row in rows])


def check_only_the_policy_is_learned(trainer: Any, model: Any, inputs: dict[str, Any], loss: float) -> None:
    "What a tool wrote is read, and no part of the loss."
    written = (inputs["completion_mask"] == 1) & (inputs["tool_mask"] == 0)
    learned = inputs["completion_mask"] * inputs["tool_mask"]
    words = trainer.processing_class.decode
    called = [i for i, row in enumerate(written) if row.any()]
    assert len(called) >= 3
    for i in called:
        ids, end = inputs["completion_ids"][i], "</tool_response><|im_end|>\n<|im_start|>assistant"
        assert words(ids[written[i]]).strip().endswith(end) and "look_up" in words(ids[learned[i].bool()])
    assert loss == pytest.approx(by_hand(trainer, model, inputs, learned), rel=1e-3)
    assert abs(loss - by_hand(trainer, model, inputs, inputs["completion_mask"])) > 1e-4


WHOLE = dict(alpha=1.0, support="full", max_completion_length=96, is_clip=None, merge_duplicates=False)


def test_tool_calls_are_made_and_what_tools_say_is_not_learned(tmp_path: Path):
    model, given = pupil()
    seen, asked = [], []

    def judge(completions, **columns):
        asked.extend(completions)
        return [{"score": 0.0, "feedback": "Say it twice."}] * len(completions)

    def look(trainer, model, inputs, loss_of):
        check_only_the_policy_is_learned(trainer, model, inputs, loss_of(inputs).item())
        seen.extend(inputs["teacher_input_ids"])

    trainer = codebook_trainer(tmp_path, judge, model, looking(look), given | dict(tools=[look_up]), **WHOLE)
    trainer.train()
    line, *_ = trainer.state.log_history
    assert line["tools/call_frequency"] > 0.4
    spoken = [[turn["role"] for turn in turns] for turns in asked]
    assert spoken.count(["assistant", "tool", "assistant"]) >= 3
    assert [turn["content"] for turns in asked for turn in turns if turn["role"] == "tool"][0] in "MP"
    for row in seen:
        told = trainer.processing_class.decode(row)
        assert '"description": "Looks a word up in the book."' in told.split("Say it twice.")[0]


class Book:
    "An environment with a tool; it asks the question and says how it went."

    def reset(self, word: str, **columns: Any) -> str:
        self.word, self.calls = word, []
        return f"{word}?"

    def look_up(self, word: str) -> str:
        """
        Looks a word up in the book.

        Args:
            word: The word to look for.
        """
        self.calls.append(word)
        return look_up(word)

    def get_reward(self) -> dict[str, Any]:
        return {"score": 0.5 * (self.word in self.calls), "feedback": f"You looked at {len(self.calls)} words."}


class Diary:
    "Another, with another tool and nothing to say."

    def reset(self, word: str, **columns: Any) -> None:
        self.word = word

    def turn_page(self) -> str:
        """
        Turns a page of the diary.
        """
        return "empty"


def test_an_environment_asks_answers_and_judges(tmp_path: Path):
    model, given = pupil()
    given["train_dataset"] = questions(dict(question="What is ", word=word) for word in ("ka", "so"))
    seen = []

    def look(trainer, model, inputs, loss_of):
        check_only_the_policy_is_learned(trainer, model, inputs, loss_of(inputs).item())
        seen.extend(inputs["teacher_input_ids"])

    trainer = codebook_trainer(tmp_path, None, model, looking(look), given | dict(environment_factory=Book), **WHOLE)
    trainer.train()
    line, *_ = trainer.state.log_history
    assert line["rewards/Book/mean"] > 0.1
    for row in seen:
        told = trainer.processing_class.decode(row)
        assert ("What is ka?" in told or "What is so?" in told) and "You looked at " in told and "<tools>" in told


def test_each_environment_s_teacher_sees_its_own_tools(tmp_path: Path):
    model, given = pupil()
    named = [dict(question="What is ", word="ka", environment=name) for name in ("book", "diary")]
    given["train_dataset"] = questions(named)
    factories = dict(environment_factory={"book": Book, "diary": Diary})
    _, (inputs,) = run(tmp_path, dislike, model, given | factories, max_completion_length=96)
    of_book = ["look_up" in told for told in inputs["told"]]
    assert sum(of_book) == 4 and all(("turn_page" in told) != is_book for told, is_book in zip(inputs["told"], of_book))


@pytest.mark.parametrize("thinks", [True, False])
def test_settings_of_the_chat_template_reach_the_teacher(thinks: bool, tmp_path: Path):
    model, given = pupil()
    kwargs = {} if thinks else dict(chat_template_kwargs={"enable_thinking": False})
    _, (inputs,) = run(tmp_path, dislike, model, given, max_completion_length=8, **kwargs)
    ends = [told.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") for told in inputs["told"]]
    assert all("No." in told for told in inputs["told"]) and all(end is not thinks for end in ends)


# ---- data


def test_prompts_of_plain_text_are_continued_without_a_template(tmp_path: Path):
    data = Dataset.from_list([{"prompt": f"{row['prompt'][0]['content']}\n"} for row in codebook_rows(4)])

    def judge(prompts, completions, **columns):
        assert all(isinstance(text, str) for text in prompts + completions)
        return [{"score": 0.0, "feedback": f"Mark {i}."} for i in range(len(prompts))]

    _, (inputs,) = run(tmp_path, judge, None, dict(train_dataset=data))
    assert not any("<|" in told for told in inputs["told"])
    begins, ends = "Encode with book omega: ", "original question.\n"
    assert all(told.startswith(begins) and told.endswith(ends) for told in inputs["told"])
    assert sorted(i for told in inputs["told"] for i in range(8) if f"Mark {i}." in told) == [*range(8)]


def test_a_stream_teaches_what_a_dataset_of_the_same_rows_does(tmp_path: Path):
    losses = []
    for data in (codebook_rows(8), codebook_rows(8).to_iterable_dataset()):
        _, slices = run(tmp_path, codebook_judge, None, dict(train_dataset=data), shuffle_dataset=False, max_steps=2)
        losses.append([one["loss"] for one in slices])
    assert losses[0] == losses[1] and len(set(losses[0])) == 2


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "processing_class"])
def test_images_are_refused_before_anything_runs(where: str, tmp_path: Path):
    if where == "processing_class":
        from transformers import CLIPImageProcessorPil, LlavaProcessor

        _, tokenizer = load_demo()
        template = tokenizer.chat_template
        given = {where: LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, chat_template=template)}
    else:
        rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}], "image": None}])
        given = {where: rows if where == "train_dataset" else {"easy": codebook_rows(2), "hard": rows}}
    with pytest.raises(ValueError, match="images would be lost on the way to the teacher"):
        codebook_trainer(tmp_path, given=given)


# ---- an engine with weights of its own


class Engine:
    "What a colocated vLLM is to TRL: it is sent weights, and samples with them, in a precision of its own."

    def __init__(self, tokenizer: Any, room: int, holes: bool):
        model, _ = load_demo()
        self.model, self.tokenizer, self.room, self.holes, self.loads = model.bfloat16(), tokenizer, room, holes, []
        runner = SimpleNamespace(model=self)
        driver = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=driver, model_config=SimpleNamespace(max_model_len=512))

    def load_weights(self, pairs: Sequence[tuple[str, Tensor]]) -> None:
        for name, weight in pairs:
            self.loads[-1][name] = weight.detach().clone()
            self.model.get_parameter(name).data.copy_(weight)

    def reset_prefix_cache(self) -> None: ...

    def generate(self, prompts: Sequence[dict[str, Any]], **how: Any) -> list[Any]:
        sampler, told = StaticSampler(self.model, self.tokenizer, Sampling(self.room)), []
        ids, logps = sampler.draw([one["prompt_token_ids"] for one in prompts], seed=len(self.loads))
        for row, (prompt, line, opinion) in enumerate(zip(prompts, ids.tolist(), logps.tolist())):
            end = line.index(1) + 1 if 1 in line else len(line)
            if self.holes and row == 0: opinion = [math.nan, *opinion[1:]]
            words = [{token: SimpleNamespace(logprob=logp, rank=1)} for token, logp in zip(line[:end], opinion)]
            output = SimpleNamespace(token_ids=line[:end], logprobs=words)
            told.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return told


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    "TRL's own code around vLLM, with an engine that runs here in the place of vLLM's; what it makes is kept."
    made = {"holes": False}

    class Here(vllm_generation.VLLMGeneration):
        def _init_vllm(self) -> None:
            made["llm"] = self.llm = Engine(self.processing_class, self.max_completion_length, made["holes"])

        def sync_weights(self) -> None:
            self.llm.loads.append({})
            super().sync_weights()

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Here)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    return made


@pytest.mark.parametrize("trained", ["all weights", "an adapter"])
def test_an_engine_is_sent_the_student_and_never_the_teacher(trained: str, engine: dict[str, Any], tmp_path: Path):
    expected, before = [], []

    @torch.no_grad()
    def merged(model):
        if trained == "all weights": return {name: weight.detach().clone() for name, weight in model.named_parameters()}
        found, factors = {}, adapter_weights(model, "default")
        for name, weight in model.get_base_model().named_parameters():
            if "lora_" in name: continue
            name, place = name.replace(".base_layer", ""), f"base_model.model.{name.replace('.base_layer.weight', '')}"
            down, up = (factors.get(f"{place}.lora_{side}.weight") for side in "AB")
            scale = 1 if down is None else model.get_submodule(place).scaling["default"]
            found[name] = weight.clone() if down is None else weight + scale * up @ down
        return found

    def look(trainer, model, inputs, loss_of):
        expected.append(merged(trainer.model))
        before.append([weight.detach().clone() for weight in trainer.teacher.second.weights().values()])

    given = {} if trained == "all weights" else dict(peft_config=LoraConfig(**LORA))
    trainer = codebook_trainer(
        tmp_path, codebook_judge, None, looking(look), given, use_vllm=True, max_steps=3, teacher_update_rate=0.5,
        learning_rate=3e-3,
    )
    trainer.train()
    loads = engine["llm"].loads
    assert len(loads) == len(expected) == 3
    base, _ = load_demo()
    for sent, wanted in zip(loads, expected):
        assert sent.keys() == wanted.keys() == dict(base.named_parameters()).keys()
        for name in wanted: torch.testing.assert_close(sent[name], wanted[name], atol=1e-6, rtol=0)
    moved = max((loads[-1][name] - loads[0][name]).abs().max() for name in loads[0])
    assert moved > 1e-3  # and so a teacher that is half as far would have been noticed
    assert trainer.teacher.gap() > 1e-4 and any((a != b).any() for a, b in zip(before[0], before[-1]))


@pytest.mark.parametrize("trained", ["all weights", "an adapter"])
@pytest.mark.parametrize("case", ["aligned", "with holes", "misaligned"])
def test_what_the_engine_thought_of_its_tokens_comes_back_in_the_loss(
    case: str, trained: str, engine: dict[str, Any], tmp_path: Path
):
    engine["holes"] = case == "with holes"
    found, asked, beforehand = [], [], []

    def look(trainer, model, inputs, loss_of):
        beforehand.append(len(asked))
        width, passes = inputs["completion_ids"].shape[1], []
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        own = torch.zeros(len(ids), width)
        for i, logps in enumerate(reading(trainer.model, ids, mask, width)):
            own[i, : len(logps)] = logps.gather(-1, inputs["completion_ids"][i, : len(logps), None])[:, 0]
        hook = trainer.model.register_forward_pre_hook(lambda *given: passes.append(torch.is_grad_enabled()))
        loss = loss_of(inputs).item()
        hook.remove()
        found.append((inputs, own, passes, loss))
        sampled, real = inputs["sampling_per_token_logps"], inputs["completion_mask"].bool()
        ratio = (own - sampled).exp().nan_to_num(nan=1.0).clamp(max=2.0)
        assert (ratio[real] != 1).float().mean() > 0.5  # the engine computes in 16 bits
        if trained == "all weights" and len(found) == 1:
            assert loss == pytest.approx(by_hand(trainer, model, inputs, inputs["completion_mask"], ratio), rel=1e-4)
            assert loss != pytest.approx(by_hand(trainer, model, inputs, inputs["completion_mask"]), rel=2e-4)
        if case == "aligned":
            assert torch.equal(inputs["old_per_token_logps"], sampled) and "rollout_weights" not in inputs
        elif len(found) == 1:  # nothing has moved since the attempts were drawn
            torch.testing.assert_close(inputs["old_per_token_logps"][real], own[real], atol=1e-4, rtol=0)
            torch.testing.assert_close(inputs["rollout_weights"][real], ratio[real], atol=1e-3, rtol=0)
        if case == "with holes":
            assert sampled.isnan().sum() == 1 and (inputs["rollout_weights"][sampled.isnan()] == 1).all()

    given = {} if trained == "all weights" else dict(peft_config=LoraConfig(**LORA))
    sizes = dict(steps_per_generation=2, per_device_train_batch_size=4, max_steps=2) if case == "misaligned" else {}
    trainer = codebook_trainer(
        tmp_path, dislike, None, looking(look), given, use_vllm=True, alpha=1.0, support="full", merge_duplicates=False,
        **sizes,
    )
    trainer.model.register_forward_pre_hook(lambda *inputs: asked.append(inputs))
    trainer.train()
    assert len(found) == (2 if case == "misaligned" else 1) and all(math.isfinite(loss) for *_, loss in found)
    assert [passes.count(True) for _, _, passes, _ in found] == [1] * len(found)
    assert bool(beforehand[0]) == (case != "aligned")  # the student is asked beforehand where both ratios are not one


@needs_trl_s_loss
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_in_a_hybrid_both_losses_weigh_the_engine_s_tokens(mode: str, engine: dict[str, Any], tmp_path: Path):
    found = []

    def look(trainer, model, inputs, loss_of):
        weights, learned = inputs["importance_sampling_ratio"], inputs["completion_mask"]
        assert torch.equal(inputs["rollout_weights"], weights.expand(learned.shape))
        policy, apart = GRPOTrainer.compute_loss(trainer, model, inputs), trainer.distillation_loss(model, inputs)
        expected = by_hand(trainer, model, inputs, learned, weights.expand(learned.shape))
        found.append((loss_of(inputs).item(), policy.item(), apart.item(), expected, weights.std().item()))

    def quarters(completions, **columns): return [{"score": i % 4, "feedback": "No."} for i in range(len(completions))]

    codebook_trainer(
        tmp_path, quarters, None, looking(look), use_vllm=True, hybrid_lambda=0.9, alpha=1.0, support="full",
        merge_duplicates=False, vllm_importance_sampling_mode=mode, success_reward_threshold=9.0,
    ).train()
    [(whole, policy, apart, expected, spread)] = found
    assert apart == pytest.approx(expected, rel=1e-4) and spread > 1e-4
    assert whole == pytest.approx(0.9 * policy + 0.1 * apart, abs=1e-6)


# ---- evaluation and logs


def test_evaluation_says_how_likely_one_of_k_attempts_passes(tmp_path: Path):
    asked = []

    def judge(completions, **columns):
        if not trainer.model.training: asked.append(len(completions))
        return [float(i in (0, 3)) for i in range(len(completions))]  # in evaluation: the first of two, and the second

    trainer = codebook_trainer(
        tmp_path, judge, given=dict(eval_dataset=codebook_rows(72).select(range(64, 72))), max_steps=2, eval_steps=1,
        eval_strategy="steps", num_generations_eval=2, per_device_eval_batch_size=4, log_completions=True,
    )
    trainer.train()
    seen = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(seen) == 2 and asked == [4] * 8
    for line in seen:
        assert (line["eval_sdpo/pass@1"], line["eval_sdpo/pass@2"], line["eval_reward"]) == (0.5, 1.0, 0.5)
    assert all("eval_sdpo/pass@4" not in line and math.isfinite(line["eval_loss"]) for line in seen)
    before = [weight.detach().clone() for model in (trainer.model, trainer.ref_model) for weight in model.parameters()]
    again = trainer.evaluate()
    after = [weight for model in (trainer.model, trainer.ref_model) for weight in model.parameters()]
    assert again["eval_loss"] > 0 and all(torch.equal(a, b) for a, b in zip(before, after))


def test_the_teacher_is_examined_under_each_context_and_nothing_moves(tmp_path: Path):
    def trained(folder, **settings):
        data = dict(eval_dataset=codebook_rows(96).select(range(64, 96)))
        sizes = dict(max_steps=2, per_device_eval_batch_size=32, num_generations_eval=1)
        trainer, slices = run(folder, codebook_judge, None, data, **sizes, **settings)
        return trainer, [one["loss"] for one in slices]

    plain, losses = trained(tmp_path)
    examined, same = trained(tmp_path, teacher_pass_rate_every=1, eval_teacher=True)
    assert losses == same
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), examined.model.parameters()))
    assert all(0 <= line["sdpo/teacher_pass@1"] <= 1 for line in examined.state.log_history[:2])
    seen = examined.evaluate()
    rates = {name: seen[f"eval_sdpo/teacher_pass@1/{name}"] for name in ("nothing", "feedback", "both")}
    assert rates["feedback"] >= rates["nothing"] + 0.1  # the demo's model understands what it is told
    assert rates["both"] == rates["feedback"]  # of groups of one, none has a sibling to show


def test_the_table_of_completions_shows_what_the_teacher_read(tmp_path: Path):
    def judge(completions, log_extra, log_metric, **columns):
        log_extra("length", [len(turns[-1]["content"]) for turns in completions])
        log_extra("feedback", ["mine"] * len(completions))
        log_metric("tries", len(completions))
        return [{"score": 0.0, "feedback": f"Mark {i}." if i % 2 else ""} for i in range(len(completions))]

    trainer, (inputs,) = run(tmp_path, judge, log_completions=True)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(table) == 8 and trainer.state.log_history[0]["tries"] == 8
    for i, row in table.iterrows():
        question, told = row["prompt"][-1]["content"], row["sdpo/teacher_prompt"]
        assert row["sdpo/feedback"] == (f"Mark {i}." if i % 2 else "") and row["feedback"] == "mine"
        assert row["length"] == len(row["completion"][-1]["content"])
        if i % 2: assert told.startswith(f"<|user|>{question}\n") and f"Mark {i}." in told
        else: assert told == ""
    learned = [told for told, speaks in zip(inputs["told"], inputs["self_distillation_mask"]) if speaks]
    assert sorted(filter(None, table["sdpo/teacher_prompt"])) == sorted(learned)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_what_is_logged_reaches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip(name, reason=f"needs {name}: pip install {name}")
    (folder := tmp_path / "logs").mkdir()
    for key in ("WANDB_DIR", "TENSORBOARD_LOGGING_DIR"): monkeypatch.setenv(key, str(folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for module in [one for path, one in sys.modules.items() if path.split(".")[0] == "trackio"]:  # they have read it
        if "TRACKIO_DIR" in vars(module): monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    trainer, _ = run(tmp_path, codebook_judge, report_to=name, log_completions=True, max_steps=2, run_name="tried")
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"sdpo/" in kept and b"signal_fraction" in kept


# ---- from a script


@pytest.mark.parametrize("parser", [HfArgumentParser, trl.TrlParser])
def test_a_command_line_becomes_settings_and_settings_a_trainer(parser: type, tmp_path: Path):
    words = dict(
        output_dir=tmp_path, support="teacher_topk", distillation_topk=7, alpha=1.0, is_clip="none",
        max_reprompt_length="none", demonstration_sources="dataset", max_steps=1, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=8, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        gradient_checkpointing=False, learning_rate=1e-3, logging_steps=1,
    )
    line = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    [args] = parser((SDPOConfig,)).parse_args_into_dataclasses(line)
    assert isinstance(args, SDPOConfig)
    what = args.objective
    assert (what.support, what.k, what.alpha, what.is_clip) == ("teacher_topk", 7, 1.0, None)
    assert args.max_reprompt_length is None and args.prompting.sources == ("dataset",)
    trainer = SDPOTrainer(str(DEMO), codebook_judge, args, train_dataset=codebook_rows(4))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_a_script_trains_a_folder_s_model(tmp_path: Path):
    script, out = tmp_path / "train.py", tmp_path / "run"
    script.write_text(textwrap.dedent("""
        from datasets import Dataset
        from sdpo_nb import SDPOConfig, SDPOTrainer
        from trl import ModelConfig, TrlParser

        def brief(completions, **columns):
            return [{"score": 0.0, "feedback": "Say less."} for _ in completions]

        if __name__ == "__main__":
            args, model = TrlParser((SDPOConfig, ModelConfig)).parse_args_and_config()
            data = Dataset.from_list([{"prompt": [{"role": "user", "content": "Encode with book omega: ka so"}]}] * 4)
            trainer = SDPOTrainer(model.model_name_or_path, brief, args, train_dataset=data)
            trainer.train()
            trainer.save_model()
    """))
    settings = "alpha: 1.0\nsupport: full\nper_device_train_batch_size: 4\nnum_generations: 4\n"
    (tmp_path / "settings.yaml").write_text(settings)
    words = dict(
        config=tmp_path / "settings.yaml", output_dir=out, model_name_or_path=DEMO, max_steps=1,
        max_completion_length=8, bf16=False, use_cpu=True, report_to="none", save_strategy="no", learning_rate=1e-3,
        disable_tqdm=True, logging_steps=1,
    )
    line = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, str(script), *line], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "model.safetensors").exists() and not list(out.rglob("*teacher*"))
    assert "sdpo" in json.loads((out / "config.json").read_text()).get("tags", ["sdpo"])
    assert "'sdpo/feedback_used_fraction': '1'" in done.stdout


def test_a_base_of_four_bits_is_loaded_by_name_and_taught_by_adapters(tmp_path: Path):
    small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    given = dict(quantization_config=small, peft_config=LoraConfig(**LORA), processing_class=None)
    settings = dict(model_init_kwargs={"dtype": torch.float32}, max_steps=2, save_strategy="steps", save_steps=2)
    trainer, slices = run(tmp_path, codebook_judge, str(DEMO), given, **settings)
    assert type(trainer.model.get_base_model().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert trainer.ref_model is None and sorted(trainer.model.peft_config) == ["default", "teacher"]
    assert len(slices) == 2 and all(one["loss"] > 0 for one in slices) and trainer.teacher.gap() > 0
    saved = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert saved["r"] == LORA["r"] and not (tmp_path / "checkpoint-2" / "teacher").exists()
