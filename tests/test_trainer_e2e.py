"""The trainer from end to end: what it is asked to be, each claim on a real model."""
import gc
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import CODEBOOK, codebook_judge, codebook_rows, codebook_trainer, grpo_runs_on_a_cpu, looking
from peft import LoraConfig
from sdpo_nb.core.demo import load_demo
from sdpo_nb.core.records import Feedback, Rollout, Task
from sdpo_nb.experience.batches import Row, merge, parts
from sdpo_nb.experience.fitting import measure
from sdpo_nb.experience.prompting import FEEDBACK, REPROMPT, SOLUTION
from sdpo_nb.learn.loop import Clock, LoopConfig, backward, update
from sdpo_nb.learn.teachers import EMA
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

LORA = dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
needs_trl_s_loss = pytest.mark.skipif(not grpo_runs_on_a_cpu(), reason="this TRL computes GRPO's loss on a GPU alone")
CLOCKS = ("time", "runtime", "per_second", "memory")


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    "The gradient of all that is trained, in one line."
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(trained, found)])


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    "A picture of all weights."
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def numbers(trainer: Any) -> list[dict[str, Any]]:
    "All that was logged, save what a clock or the memory said."
    is_timeless = lambda name: not any(word in name for word in CLOCKS)
    return [{k: v for k, v in line.items() if is_timeless(k)} for line in trainer.state.log_history]


def scripted(
    scores: Sequence[float], words: Sequence[str], kept: list[Any] | None = None
) -> Callable[..., list[Feedback]]:
    "A reward function that goes by the place of an attempt; it keeps what it was asked, where a list is given."
    def judge(prompts, completions, completion_ids, **columns):
        said = [Feedback(scores[i % len(scores)], words[i % len(words)]) for i in range(len(prompts))]
        texts = [turns[-1]["content"] for turns in completions]
        if kept is not None: kept.append((prompts, texts, completion_ids, said))
        return said

    return judge


def decoded(trainer: Any, inputs: dict[str, Any]) -> list[tuple[str, str]]:
    "What the teacher reads of each row: its prompt, and the attempt."
    width = inputs["completion_ids"].shape[1]
    ids, mask = inputs["teacher_input_ids"], inputs["teacher_attention_mask"].bool()
    words = lambda rows, seen: [trainer.processing_class.decode(row[real]) for row, real in zip(rows, seen)]
    return [*zip(words(ids[:, :-width], mask[:, :-width]), words(ids[:, -width:], mask[:, -width:]))]


def shown(seen: list[Any]) -> Any:
    "A trainer's class that notes what the teacher reads of each row, and which rows have a signal."
    def look(trainer, model, inputs, loss_of):
        seen.append((decoded(trainer, inputs), inputs["self_distillation_mask"].tolist()))

    return looking(look)


# ---- document 003, section 5b


@pytest.mark.parametrize("trained", ["all weights", "an adapter"])
def test_sdpo_mode_replaces_grpo_loss_entirely(trained: str, tmp_path: Path):
    seen = []

    def look(trainer, model, inputs, loss_of):
        torch.manual_seed(1)
        rewarded = torch.randn(len(inputs["advantages"])), torch.full_like(inputs["advantages"], math.nan)
        seen.append([gradient(model, loss_of(inputs | {"advantages": a})) for a in (inputs["advantages"], *rewarded)])

    given = {} if trained == "all weights" else dict(peft_config=LoraConfig(**LORA))
    codebook_trainer(tmp_path, host=looking(look), given=given).train()
    [(as_it_is, shuffled, missing)] = seen
    assert as_it_is.abs().max() > 1e-4
    assert torch.equal(as_it_is, shuffled) and torch.equal(as_it_is, missing)


def test_teacher_prompt_constructed_correctly(tmp_path: Path):
    kept, seen = [], []
    judge = scripted([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ["", "Use F.", "", "", "Wrong at ka.", "", "", ""], kept)
    trainer = codebook_trainer(tmp_path, judge, host=shown(seen), environment_feedback_only_without_solution=False)
    trainer.train()
    [(read, speaks)], [(prompts, texts, _, said)] = seen, kept
    expected = []
    for i, prompt in enumerate(prompts):
        solution = SOLUTION.replace("{successful_previous_attempt}", texts[0]) if 0 < i < 4 else ""
        feedback = FEEDBACK.replace("{feedback_raw}", said[i].text) if said[i].text else ""
        asked = prompt[-1]["content"]
        told = REPROMPT.replace("{prompt}", asked).replace("{solution}", solution).replace("{feedback}", feedback)
        content = told if solution or feedback else asked
        expected.append((f"<|user|>{content}<|assistant|>", f"{texts[i]}<|end|>", bool(solution or feedback)))
    exact = lambda text: tuple(trainer.processing_class(text, add_special_tokens=False)["input_ids"])
    found = [(exact(prompt), attempt, flag) for (prompt, attempt), flag in zip(read, speaks)]
    assert sorted(found) == sorted((exact(prompt), attempt, flag) for prompt, attempt, flag in expected)
    assert any("Correct solution" in prompt and "Use F." in prompt for prompt, _ in read)


def test_student_topk_passed_to_teacher(tmp_path: Path):
    seen = []

    def logps_of(model, ids, mask, width):  # row by row, without padding
        rows = []
        for row, real in zip(ids, mask.bool()):
            length = int(real[-width:].sum())
            rows.append(model(row[real][None]).logits[0, -length - 1 : -1].log_softmax(-1))
        return torch.cat(rows)

    def look(trainer, model, inputs, loss_of):
        rows, width = inputs["self_distillation_mask"], inputs["completion_ids"].shape[1]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[rows]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[rows]
        with torch.no_grad():
            student = logps_of(model, ids, mask, width)
            told = inputs["teacher_input_ids"][rows], inputs["teacher_attention_mask"][rows]
            teacher = logps_of(trainer.ref_model, *told, width)
        by_whom = []
        for chooser in (student, teacher):
            kept = chooser.topk(3, -1).indices
            p, q = student.gather(-1, kept).log_softmax(-1), teacher.gather(-1, kept).log_softmax(-1)
            by_whom.append((p.exp() * (p - q)).sum(-1).mean().item())
        own = student.topk(3, -1).indices, teacher.topk(3, -1).indices
        p, q = (logps.gather(-1, kept).log_softmax(-1) for logps, kept in zip((student, teacher), own))
        by_whom.append((p.exp() * (p - q)).sum(-1).mean().item())
        seen.append((loss_of(inputs).item(), *by_whom))

    codebook_trainer(
        tmp_path, host=looking(look), support="student_topk", distillation_topk=3, distillation_add_tail=False,
        alpha=1.0, is_clip=None,
    ).train()
    [(loss, by_student, by_teacher, each_its_own)] = seen
    assert loss == pytest.approx(by_student, rel=1e-4)
    assert abs(loss - by_teacher) > 1e-2 and abs(loss - each_its_own) > 1e-2


def test_ema_updates_ref_model_in_place(tmp_path: Path):
    trainer = codebook_trainer(tmp_path, teacher_update_rate=0.25)
    held, before = dict(trainer.ref_model.named_parameters()), weights(trainer.ref_model)
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer.model).items())
    trainer.train()
    after = weights(trainer.model)
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-4
    for name, weight in trainer.ref_model.named_parameters():
        assert weight is held[name] and not weight.requires_grad
        torch.testing.assert_close(weight.detach(), before[name].lerp(after[name], 0.25), atol=1e-7, rtol=0)


@pytest.mark.parametrize("trained", ["all weights", "an adapter"])
def test_no_third_model_created(trained: str, tmp_path: Path):
    model, _ = load_demo()
    size = sum(weight.numel() for weight in model.parameters())
    gc.collect()
    old = {id(one) for one in gc.get_objects() if issubclass(type(one), torch.nn.Parameter)}
    given = {} if trained == "all weights" else dict(peft_config=LoraConfig(**LORA))
    pull = {} if trained == "all weights" else dict(kl_to_base=0.1)  # the base is there already
    trainer = codebook_trainer(tmp_path, model=model, given=given, **pull)
    trainer.train()
    gc.collect()
    new = [one for one in gc.get_objects() if issubclass(type(one), torch.nn.Parameter) and id(one) not in old]
    added = sum(one.numel() for one in new)
    adapter = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    if trained == "all weights": assert added == size == sum(one.numel() for one in trainer.ref_model.parameters())
    else: assert added == 2 * adapter < size and trainer.ref_model is None


def test_zero_teacher_coverage_zero_loss(tmp_path: Path):
    calls = []
    trainer = codebook_trainer(tmp_path, scripted([0.0], [""]), max_steps=2, weight_decay=0.1)
    readers = trainer.model.model.layers[0], trainer.ref_model
    hooks = [reader.register_forward_pre_hook(lambda *inputs: calls.append(inputs)) for reader in readers]
    drawn = trainer._generate_single_turn
    def draw(*args, **kwargs):
        found = drawn(*args, **kwargs)
        calls.clear()
        return found

    trainer._generate_single_turn = draw
    before, teacher = weights(trainer.model), weights(trainer.ref_model)
    trainer.train()
    for hook in hooks: hook.remove()
    assert not calls  # nobody read anything after the attempts were drawn
    for name, weight in weights(trainer.model).items(): assert torch.equal(weight, before[name])
    for name, weight in weights(trainer.ref_model).items(): assert torch.equal(weight, teacher[name])
    assert not trainer.optimizer.state and trainer.teacher.updates == 0
    first, second, _ = trainer.state.log_history
    assert (first["loss"], second["loss"], first["sdpo/silent_steps"], first["sdpo/signal_fraction"]) == (0, 0, 1, 0)


def test_reward_func_dict_format_extracts_feedback(tmp_path: Path):
    seen = []

    def judge(completions, **columns):
        return [{"score": 0.25, "feedback": f"Attempt {i} is wrong."} for i in range(len(completions))]

    trainer = codebook_trainer(tmp_path, judge, host=shown(seen))
    trainer.train()
    line, *_ = trainer.state.log_history
    assert (line["reward"], line["rewards/judge/mean"], line["sdpo/feedback_used_fraction"]) == (0.25, 0.25, 1)
    [(read, _)] = seen
    told = [prompt for prompt, _ in read]
    assert sorted(i for prompt in told for i in range(8) if f"Attempt {i} is wrong." in prompt) == [*range(8)]


def test_reward_func_float_format_no_feedback(tmp_path: Path):
    seen = []

    def first_of_all(completions, **columns): return [float(i == 0) for i in range(len(completions))]

    trainer = codebook_trainer(tmp_path, first_of_all, host=shown(seen))
    trainer.train()
    line, *_ = trainer.state.log_history
    assert line["sdpo/feedback_available_fraction"] == line["sdpo/feedback_used_fraction"] == 0
    assert line["sdpo/reprompt_sample_fraction"] == 3 / 8  # the siblings of the success
    [(read, speaks)] = seen
    assert [("Correct solution" in prompt) for prompt, _ in read] == speaks and sum(speaks) == 3
    assert not any("feedback" in prompt for prompt, _ in read)


def test_training_loop_completes_10_steps(tmp_path: Path):
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    sizes = dict(vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    before = weights(model)
    trainer = codebook_trainer(tmp_path, model=model, max_steps=10, max_completion_length=8)
    trainer.train()
    *steps, _ = trainer.state.log_history
    assert trainer.state.global_step == len(steps) == 10
    assert all(math.isfinite(step["loss"]) and step["loss"] > 0 and step["grad_norm"] > 0 for step in steps)
    assert all((weight != before[name]).any() for name, weight in weights(model).items() if "embed" not in name)


def test_loss_decreases_over_steps(tmp_path: Path):
    trainer = codebook_trainer(
        tmp_path, max_steps=8, per_device_train_batch_size=32, alpha=1.0, support="full", learning_rate=6e-4,
        environment_feedback_only_without_solution=False,
    )
    trainer.train()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


# ---- beside TRL's own trainer


@needs_trl_s_loss
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("trained", ["all weights", "an adapter"])
def test_switched_off_it_is_grpo_number_for_number(trained: str, beta: float, tmp_path: Path):
    def brief(completions, **columns): return [-float(len(turns[-1]["content"])) for turns in completions]

    def run(host, config, **more):
        model, tokenizer = load_demo()
        settings = CODEBOOK | dict(max_steps=3, per_device_train_batch_size=4, steps_per_generation=2, weight_decay=0.1)
        adapter = dict(peft_config=LoraConfig(**LORA)) if trained == "an adapter" else {}
        trainer = host(
            model, [codebook_scores, brief], config(output_dir=str(tmp_path), beta=beta, **settings | more),
            train_dataset=codebook_rows(16), processing_class=tokenizer, **adapter,
        )
        trainer.train()
        return numbers(trainer), weights(trainer.model)

    def codebook_scores(**given): return [one.metrics["right"] for one in codebook_judge(**given)]

    from sdpo_nb.learn.config import SDPOConfig
    from sdpo_nb.learn.trainer import SDPOTrainer

    (ours, moved), (theirs, expected) = run(SDPOTrainer, SDPOConfig, enabled=False), run(GRPOTrainer, GRPOConfig)
    assert ours == theirs and any(abs(line.get("loss", 0)) > 1e-6 for line in ours)
    assert moved.keys() == expected.keys() and all(torch.equal(moved[name], expected[name]) for name in expected)


@needs_trl_s_loss
@pytest.mark.parametrize("window", [1, 2])
def test_hybrid_is_both_losses_with_their_weights(window: int, tmp_path: Path):
    seen, share = [], 0.75

    def look(trainer, model, inputs, loss_of):
        whole = loss_of(inputs)
        policy = GRPOTrainer.compute_loss(trainer, model, inputs)
        apart = trainer.distillation_loss(model, inputs)
        seen.append([(loss.item(), gradient(model, loss)) for loss in (whole, policy, apart)])

    def alternately(completions, **columns):
        return [{"score": i % 3 / 2, "feedback": "No."} for i in range(len(completions))]

    trainer = codebook_trainer(
        tmp_path, alternately, host=looking(look), hybrid_lambda=share, per_device_train_batch_size=8 // window,
        gradient_accumulation_steps=window, max_steps=2, temperature=1.3,
    )
    trainer.train()
    assert len(seen) == 2 * window
    for (whole, both), (policy, by_policy), (apart, by_teacher) in seen:
        assert whole == pytest.approx(share * policy + (1 - share) * apart, abs=1e-6)
        assert by_policy.norm() > 1e-3 and by_teacher.norm() > 1e-3
        torch.testing.assert_close(both, share * by_policy + (1 - share) * by_teacher, atol=1e-6, rtol=1e-4)


# ---- where the signal comes from


def test_groups_of_one_learn_from_feedback_alone(tmp_path: Path):
    seen = []
    look = lambda trainer, model, inputs, loss_of: seen.append(inputs["advantages"])
    trainer = codebook_trainer(
        tmp_path, host=looking(look), num_generations=1, max_steps=6, per_device_train_batch_size=16, alpha=1.0,
        support="full", learning_rate=6e-4,
    )
    trainer.train()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    assert losses[-1] < 0.8 * losses[0] and not torch.cat(seen).any()


def test_an_earlier_success_teaches_a_group_that_fails(tmp_path: Path):
    def run(folder, **settings):
        seen, good = [], []

        def judge(completions, trainer_state, **columns):
            if trainer_state.global_step == 0: good.extend(turns[-1]["content"] for turns in completions)
            return [float(trainer_state.global_step == 0)] * len(completions)

        data = dict(train_dataset=codebook_rows(1))
        codebook_trainer(
            folder, judge, host=shown(seen), given=data, max_steps=2, per_device_train_batch_size=4, **settings
        ).train()
        return seen[-1], good

    (read, speaks), good = run(tmp_path / "with", success_buffer=8)
    assert all(speaks) and all(any(f"Correct solution:\n\n{text}\n" in prompt for text in good) for prompt, _ in read)
    (_, speaks), _ = run(tmp_path / "without")
    assert not any(speaks)


def test_a_dead_signal_warns_once_and_says_what_to_change(tmp_path: Path):
    trainer = codebook_trainer(tmp_path, scripted([0.0], [""]), max_steps=5, dead_signal_steps=2)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in heard if "without a signal" in str(one.message)]
    assert len(said) == 1 and said[0].startswith("2 rollouts") and "let the environment say what was wrong" in said[0]


def test_attempts_that_were_told_something_and_cut_off_are_not_called_silent(tmp_path: Path):
    settings = dict(max_completion_length=2, mask_truncated_completions=True, max_steps=1, dead_signal_steps=1)
    trainer = codebook_trainer(tmp_path, scripted([0.0], ["No."]), **settings)
    with pytest.warns(UserWarning, match="were cut off, and mask_truncated_completions leaves nothing of them"): trainer.train()
    line, *_ = trainer.state.log_history
    assert line["sdpo/signal_fraction"] == line["sdpo/active_rows"] == 0 and line["sdpo/silent_steps"] == 1
    assert line["sdpo/reprompt_sample_fraction"] == line["sdpo/feedback_used_fraction"] == 1  # what the teacher was shown


SIZES = dict(per_device_train_batch_size=4, num_generations=4, steps_per_generation=3, gradient_accumulation_steps=3)


def test_data_that_fills_one_batch_is_trained_on_and_a_row_less_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="2 rows, and 3 are asked at once: 12 attempts .* by num_generations 4"):
        codebook_trainer(tmp_path / "fewer", given=dict(train_dataset=codebook_rows(2)), **SIZES)
    trainer = codebook_trainer(
        tmp_path / "exact", scripted([0.0], ["No."]), given=dict(train_dataset=codebook_rows(3)), max_steps=2, **SIZES
    )
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.log_history[0]["sdpo/active_rows"] == 12


SCORES = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]  # the first group has one success, the second none
WORDS = ["", "a", "", "b", "c", "", " ", "d"]
FRACTIONS = {
    "success_group": 1 / 2,  # one group of two
    "success_sample": 3 / 8,  # its other attempts are shown the success
    "feedback_available": 4 / 8,  # a, b, c, d
    "feedback_used": 2 / 8,  # c and d: where there is a success, it takes the place of words
    "reprompt_sample": 5 / 8,
}


def test_the_five_fractions_are_those_of_a_hand_count(tmp_path: Path):
    trainer = codebook_trainer(tmp_path, scripted(SCORES, WORDS))
    trainer.train()
    line, *_ = trainer.state.log_history
    assert {name: line[f"sdpo/{name}_fraction"] for name in FRACTIONS} == FRACTIONS
    assert (line["sdpo/signal_fraction"], line["sdpo/active_rows"]) == (5 / 8, 5)


# ---- what travels, and who reads it


@needs_trl_s_loss
def test_four_keys_travel_beside_trl_s_own(tmp_path: Path):
    ours, theirs = [], []
    look = lambda found: lambda trainer, model, inputs, loss_of: found.append(inputs)
    codebook_trainer(tmp_path, host=looking(look(ours))).train()
    codebook_trainer(tmp_path, host=looking(look(theirs)), enabled=False).train()
    assert ours[0].keys() - theirs[0].keys() >= {
        "teacher_input_ids", "teacher_attention_mask", "teacher_position_ids", "self_distillation_mask",
    }
    assert theirs[0].keys() <= ours[0].keys()
    shapes = {name: tuple(ours[0][name].shape) for name in ours[0] if name.startswith("teacher")}
    assert len(set(shapes.values())) == 1 and ours[0]["self_distillation_mask"].shape == (8,)


def test_the_teacher_s_data_stays_with_its_rows(tmp_path: Path):
    seen, said = [], {}

    def judge(prompts, completions, completion_ids, answer, **columns):
        found = codebook_judge(prompts, completions, answer)
        found = [Feedback(0.0, f"{one.text} Mark {i}.") for i, one in enumerate(found)]
        for i, (prompt, ids, one) in enumerate(zip(prompts, completion_ids, found)):
            said.setdefault((prompt[-1]["content"], tuple(ids)), set()).add((len(seen) // 4, one.text))
        return found

    def look(trainer, model, inputs, loss_of):
        asked = trainer.processing_class.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
        seen.append((decoded(trainer, inputs), inputs, asked))

    trainer = codebook_trainer(
        tmp_path, judge, host=looking(look), max_steps=8, steps_per_generation=2, num_iterations=2,
        gradient_accumulation_steps=1, per_device_train_batch_size=4, dont_reprompt_on_self_success=True,
    )
    trainer.train()
    assert len(seen) == 8
    marks = []
    for turn, (read, inputs, asked) in enumerate(seen):
        width = inputs["completion_ids"].shape[1]
        assert torch.equal(inputs["teacher_input_ids"][:, -width:], inputs["completion_ids"])
        assert torch.equal(inputs["teacher_attention_mask"][:, -width:], inputs["completion_mask"])
        attempts = [ids[real] for ids, real in zip(inputs["completion_ids"], inputs["completion_mask"].bool())]
        for (prompt, _), question, ids in zip(read, asked, attempts):
            question = question.removeprefix("<|user|>").removesuffix("<|assistant|>")
            told = said[question, tuple(ids.tolist())]
            [found] = [text for when, text in told if when == turn // 4 and text in prompt]
            assert prompt.startswith(f"<|user|>{question}\n") and f"{found}\n" in prompt
            marks.append((turn // 4, found.split("Mark ")[1]))
    assert sorted(marks) == sorted([(when, f"{i}.") for when in range(2) for i in range(8)] * 2)  # each row twice


def test_labels_never_reach_the_model(tmp_path: Path):
    trainer, given = codebook_trainer(tmp_path, max_steps=2, num_iterations=2, kl_to_base=0.1, keep_base_copy=True), []
    note = lambda module, args, kwargs: given.append(set(kwargs))
    for model in (trainer.model, trainer.ref_model): model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert sum("inside" in names for names in given) == 4  # two steps, each read by student and teacher
    assert not any(names & {"labels", "fused_lm_head"} for names in given)


def test_rows_with_one_prompt_come_to_one_slice(tmp_path: Path):
    def prompts_of_slices(**settings: Any) -> list[int]:
        found = []
        look = lambda trainer, model, inputs, loss_of: found.append(len(inputs["prompt_ids"].unique(dim=0)))
        cut = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, num_generations=4)
        codebook_trainer(tmp_path, host=looking(look), max_steps=1, **cut, **settings).train()
        return found

    assert prompts_of_slices() == [1] * 4  # whose attempts all fail, and hear of it
    assert max(prompts_of_slices(share_prompts=False)) > 1


def test_rows_without_a_signal_are_read_by_neither(tmp_path: Path):
    rows = {"student": [], "teacher": []}

    def look(trainer, model, inputs, loss_of):
        count = lambda name: lambda module, args, kwargs: rows[name].append(len((*args, *kwargs.values())[0]))
        readers = {"student": trainer.model, "teacher": trainer.ref_model}.items()
        hooks = [reader.register_forward_pre_hook(count(name), with_kwargs=True) for name, reader in readers]
        loss_of(inputs)
        for hook in hooks: hook.remove()

    apart = dict(share_prompts=False, merge_duplicates=False)
    codebook_trainer(tmp_path, scripted(SCORES, WORDS), host=looking(look), **apart).train()
    assert rows == {"student": [5], "teacher": [5]}


# ---- beside the loop of chapter 16


def rows_of_slice(trainer: Any, inputs: dict[str, Any], kept: tuple[Any, ...], old: Tensor | None) -> list[Row]:
    "The rows of a slice as the loop would have made them of what the reward function saw."
    prompts, texts, ids, said = kept
    tokenizer, size = trainer.processing_class, trainer.num_generations
    asked = [tuple(x) for x in tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)]
    places = {}
    for place, (prompt, mask, attempt, real) in enumerate(zip(
        inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs["completion_ids"], inputs["completion_mask"].bool(),
    )): places.setdefault((tuple(prompt[mask].tolist()), tuple(attempt[real].tolist())), []).append(place)
    rollouts, order = [], []
    for i, (prompt, attempt) in enumerate(zip(asked, ids)):
        place = places[prompt, tuple(attempt)].pop()
        logps = [0.0] * len(attempt) if old is None else old[place, : len(attempt)].tolist()
        rollouts.append(Rollout(Task(tuple(prompts[i])), i // size, prompt, tuple(attempt), tuple(logps), texts[i]))
        order.append(place)
    made = trainer.method.rows(rollouts, said, measure(tokenizer))
    return [row for _, row in sorted(zip(order, made), key=lambda pair: pair[0])]


SPOKEN = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], ["", "Use ka=M.", "No.", "", "Wrong at so.", "Bad.", "", "x"]


@pytest.mark.parametrize("objective", [
    dict(alpha=1.0, support="full"), dict(alpha=0.5, support="student_topk", distillation_topk=20),
    dict(
        alpha=0.0, support="teacher_topk", distillation_topk=5, distillation_add_tail=False,
        aggregation="seq-mean-token-mean",
    ),
    dict(alpha=1.0, support="sampled", aggregation="seq-mean-token-sum-norm"),
])
def test_loss_and_gradient_of_a_batch_are_those_of_the_loop(objective: dict[str, Any], tmp_path: Path):
    kept, seen = [], []

    def look(trainer, model, inputs, loss_of):
        rows = rows_of_slice(trainer, inputs, kept[0], inputs["old_per_token_logps"])
        speaking = merge([row for row in rows if row.has_signal])
        assert len(speaking) == sum(row.has_signal for row in rows) >= 5  # no two attempts are equal
        [in_order] = parts(speaking, 100)
        places = [next(i for i, row in enumerate(rows) if row is one) for one in in_order]
        places += [i for i in range(len(rows)) if i not in places]
        given = {name: x[places] if isinstance(x, Tensor) and x.dim() else x for name, x in inputs.items()}
        loss = loss_of(given)
        found = loss.item(), gradient(model, loss)
        model.zero_grad(set_to_none=True)
        expected, _ = backward(model, trainer.processing_class, trainer.teacher, trainer.method, rows, 100, Clock())
        seen.append((*found, expected, torch.cat([weight.grad.flatten() for weight in model.parameters()])))
        model.zero_grad(set_to_none=True)

    settings = dict(share_prompts=False, merge_duplicates=False, fused_loss=False)
    codebook_trainer(tmp_path / "plain", scripted(*SPOKEN, kept), host=looking(look), **settings, **objective).train()
    kept.clear()
    codebook_trainer(tmp_path / "fast", scripted(*SPOKEN, kept), host=looking(look), **objective).train()
    (loss, slope, expected, wanted), (fast_loss, fast_slope, fast_expected, fast_wanted) = seen
    assert loss == expected and torch.equal(slope, wanted) and wanted.norm() > 1e-2
    assert fast_loss == pytest.approx(fast_expected, abs=1e-5)
    torch.testing.assert_close(fast_slope, fast_wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how, tolerance", [("plain", 1e-8), ("fast", 1e-5)])  # Adam divides by next to nothing
def test_a_run_from_the_same_samples_ends_with_the_weights_of_the_loop(how: str, tolerance: float, tmp_path: Path):
    kept, steps = [], []

    def judge(prompts, completions, completion_ids, answer, **columns):
        said = codebook_judge(prompts, completions, answer)
        kept.append((prompts, [turns[-1]["content"] for turns in completions], completion_ids, said))
        return said

    def look(trainer, model, inputs, loss_of):
        steps.append(rows_of_slice(trainer, inputs, kept[-1], inputs["old_per_token_logps"]))

    model, tokenizer = load_demo()
    plain = dict(share_prompts=False, merge_duplicates=False, fused_loss=False) if how == "plain" else {}
    trainer = codebook_trainer(
        tmp_path, judge, model.double(), looking(look), max_steps=3, per_device_train_batch_size=8, alpha=1.0,
        support="full", teacher_update_rate=0.1, max_grad_norm=0.5, **plain,
    )
    trainer.train()
    student, _ = load_demo()
    teacher = EMA(0.1).attach(student.double())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    config = LoopConfig(clip_norm=0.5, rows_per_pass=7)
    for rows in steps: update(student.train(), tokenizer, teacher, optimizer, trainer.method, rows, config, Clock())
    start, _ = load_demo()
    assert max((student.get_parameter(name) - weight).abs().max() for name, weight in start.named_parameters()) > 1e-3
    for mine, theirs in ((trainer.model, student), (trainer.ref_model, teacher.second.model)):
        for name, weight in theirs.named_parameters():
            torch.testing.assert_close(mine.get_parameter(name).detach(), weight.detach(), atol=tolerance, rtol=0)
