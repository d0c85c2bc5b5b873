"""Batches under every template that TRL ships, in many drawn shapes, and before families of models that remember."""
import importlib.util
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from sdpo_nb import SDPO, Codebook, Fitting, LoopConfig, Sampling, fit
from sdpo_nb.core.models import check_parts, tell_template
from sdpo_nb.core.demo import load_demo
from sdpo_nb.core.records import Rollout, Task, TeacherView
from sdpo_nb.experience.batches import LOOKS, SHOWN, SIDES, Prompts, Row, Sequences, collate, merge, parts
from sdpo_nb.learn.reading import read
from sdpo_nb.loss.objectives import read_logps, token_logps

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
TASK = Task.ask("Encode with book omega: ka so")
WORDS = "What is 6 times 7?"


@pytest.fixture(scope="module")
def tokenizer():
    return load_demo()[1]


def draw_row(draw, words=40, most=12):
    """An attempt of any length at a prompt of any length, perhaps with a tool in it, perhaps with a view."""
    prompt, ids = ([draw.randrange(3, words) for _ in range(draw.randint(1, most))] for _ in range(2))
    chosen = tuple(draw.random() < 0.7 for _ in ids) if draw.random() < 0.5 else ()
    view = TeacherView(({"role": "user", "content": "ka " * draw.randint(1, 9)},), feedback="so")
    return Row(Rollout(TASK, 0, tuple(prompt), tuple(ids), (-0.5,) * len(ids), "", chosen=chosen), view)


def drawn(seed, most=9):
    draw = random.Random(seed)
    return [draw_row(draw) for _ in range(draw.randint(1, most))]


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_lists_are_read_whole_or_refused(path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", path.read_text(encoding="utf-8"))
    turns = [{"role": "user", "content": [{"type": "text", "text": WORDS}, {"type": "text", "text": "Say a number."}]}]
    try: check_parts(tokenizer, [turns])
    except ValueError as error:
        assert "takes text, and a turn is a list of parts" in str(error)
        return
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert WORDS in text and "Say a number." in text and "'text':" not in text and '"text":' not in text


def test_a_switch_of_the_chat_template_reaches_every_reader(monkeypatch):
    model, tokenizer = load_demo()
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    render, texts = tokenizer.apply_chat_template, []
    kept = lambda *args, **more: texts.append(render(*args, **more)) or texts[-1]
    monkeypatch.setattr(tokenizer, "apply_chat_template", kept)
    size = LoopConfig(steps=1, tasks=1, attempts=2, held_out=1, shown=1, sampling=Sampling(4))
    method = SDPO(fitting=Fitting(max_tokens=400))  # measures what the teacher reads, too
    ends = set()
    for told in ({}, {"enable_thinking": False}):
        fit(model, tell_template(tokenizer, **told), Codebook("omega"), method, config=size)
        assert any("feedback from your unsuccessful" in text for text in texts)
        ends.add(frozenset(text.rpartition("assistant")[2] for text in texts))
        texts.clear()
    assert ends == {frozenset({"\n"}), frozenset({"\n<think>\n\n</think>\n\n"})}


def test_some_templates_take_lists_and_some_do_not(tokenizer, monkeypatch):
    verdicts = Counter()
    for path in TEMPLATES.glob("*.jinja"):
        monkeypatch.setattr(tokenizer, "chat_template", path.read_text(encoding="utf-8"))
        try: check_parts(tokenizer, [[{"role": "user", "content": [{"type": "text", "text": WORDS}]}]])
        except ValueError: verdicts["refused"] += 1
        else: verdicts["taken"] += 1
    assert min(verdicts["refused"], verdicts["taken"]) > 10


def test_text_is_never_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content.strip() }}")
    check_parts(tokenizer, [TASK.messages])


@pytest.mark.parametrize("seed", range(40))
def test_both_layouts_hold_the_same_tokens_and_say_where(seed, tokenizer):
    rows = drawn(seed)
    for side in SIDES:
        batch = collate(rows, tokenizer, side=side)
        for name, prompts in batch.readers.items():
            laid = Sequences.of(prompts, batch)
            whole = [
                [*prompts.ids[place][prompts.mask[place] == 1].tolist(), *row.rollout.completion_ids]
                for row, place in zip(rows, prompts.index.tolist())
            ]
            assert [ids[mask == 1].tolist() for ids, mask in zip(laid.ids, laid.mask)] == whole
            columns = torch.arange(laid.ids.shape[1])[None, :, None].expand(len(rows), -1, 1)
            before = laid.before_attempts(columns[:, -laid.kept :])[..., 0]
            assert torch.equal(before, laid.before_attempts(columns)[..., 0]), "all columns, or those that are kept"
            for y, row in enumerate(rows):
                last = [x for x, real in enumerate(laid.mask[y].tolist()) if real][-len(row.rollout.completion_ids) :]
                assert before[y, : len(last)].tolist() == [x - 1 for x in last]
        if side == "right":
            assert laid.mask.sum(1).max() == laid.ids.shape[1], "trimmed to the longest"
            assert (laid.mask.diff(dim=1) <= 0).all(), "no gap before a token"


@pytest.mark.parametrize("seed", range(10))
def test_masks_say_what_is_there_and_what_is_learned(seed, tokenizer):
    rows = drawn(seed)
    batch = collate(rows, tokenizer)
    assert batch.read_mask.sum(1).tolist() == [len(row.rollout.completion_ids) for row in rows]
    for row, learned in zip(rows, batch.completion_mask.bool().tolist()):
        assert tuple(learned[: len(row.rollout.mask)]) == row.rollout.mask
    assert (batch.completion_mask <= batch.read_mask).all()


@pytest.mark.parametrize("seed", range(20))
def test_parts_hold_every_row_once_and_are_always_the_same(seed):
    rows, size = drawn(seed, most=30), random.Random(seed).randint(1, 8)
    cut = list(parts(rows, size))
    assert Counter(map(id, (row for part in cut for row in part))) == Counter(map(id, rows))
    assert [len(part) for part in cut[:-1]] == [size] * (len(cut) - 1) and 1 <= len(cut[-1]) <= size
    assert cut == list(parts(rows, size))
    lengths = [[len(row.rollout.prompt_ids) + len(row.rollout.completion_ids) for row in part] for part in cut]
    assert all(max(shorter) <= min(longer) for shorter, longer in zip(lengths, lengths[1:]))
    whole, = parts(rows, len(rows))
    assert whole == sorted(rows, key=lambda row: len(row.rollout.completion_ids)), "one pass: by attempt, then as given"


@pytest.mark.parametrize("seed", range(20))
def test_merged_rows_are_different_and_weigh_as_much(seed):
    draw = random.Random(seed)
    few = drawn(seed)
    rows = [draw.choice(few) for _ in range(40)]
    merged = merge(rows)
    assert sum(row.weight for row in merged) == 40
    assert len(merged) == len({repr(row) for row in rows})
    assert merge(merged) == merged


@pytest.mark.parametrize("seed", range(10))
def test_the_picture_shows_each_token_once(seed, tokenizer):
    rows = drawn(seed)
    for side in SIDES:
        batch = collate(rows, tokenizer, side=side)
        svgs = re.findall(r"<svg role.*?</svg>", batch._repr_html_())
        assert len(svgs) == 2
        for svg, prompts in zip(svgs, batch.readers.values()):
            laid, seen = Sequences.of(prompts, batch), Counter()
            cells = re.findall(r'y="(\d+).1" width="(\d+)" height="0.8" fill="(.*?)" fill-opacity="(.*?)"', svg)
            per_row = Counter()
            for y, width, colour, strength in cells:
                seen[colour, float(strength)] += int(width)
                per_row[int(y)] += int(width)
            shown = slice(min(SHOWN, len(rows)))
            assert per_row == {y: laid.ids.shape[1] for y in range(len(rows[shown]))}
            tools = (batch.read_mask - batch.completion_mask).sum().item()
            there, learned = laid.mask.sum().item(), batch.completion_mask.sum().item()
            expected = there - learned - tools, learned, tools, laid.mask.numel() - there
            assert seen == {look: count for look, count in zip(LOOKS.values(), expected) if count}


def test_the_picture_of_many_rows_is_cut(tokenizer):
    rows = [draw_row(random.Random(seed)) for seed in range(SHOWN + 5)]
    html = collate(rows, tokenizer)._repr_html_()
    assert "and 5 more rows" in html
    assert f'y="{SHOWN - 1}.1"' in html and f'y="{SHOWN}.1"' not in html


def tiny(name, **options):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=40, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


EXPERTS = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=16,
)
FAMILIES = {  # name -> options, and whether padding on the left leaves it as it is
    "Llama": ({}, True), "Qwen2": ({}, True), "Qwen3": (dict(head_dim=8), True),
    "Gemma": (dict(head_dim=8), True), "Gemma2": (dict(head_dim=8, sliding_window=4), True),
    "Gemma3Text": (dict(head_dim=8, sliding_window=4), True), "Qwen3Moe": (EXPERTS, True),
    "GPT2": (dict(n_embd=32, n_layer=2, n_head=4), True), "Bloom": (dict(n_layer=2, n_head=4), True),
    "Mamba": (dict(state_size=8), True), "Mamba2": (dict(state_size=8, num_heads=8, head_dim=8, n_groups=1), True),
    "Lfm2": (dict(layer_types=["conv", "full_attention"]), True), "Qwen3Next": (EXPERTS | LINEAR, True),
    "RecurrentGemma": (dict(lru_width=32, attention_window_size=16, num_hidden_layers=3), True),  # padding embeds as 0
    "Rwkv": (dict(attention_hidden_size=32), False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_read_alike_alone_and_among_others(name, tokenizer):
    options, is_left_safe = FAMILIES[name]
    model, gaps = tiny(name, **options), {}
    rows = [row for row in drawn(3) if len(row.rollout.completion_ids) > 1]
    assert len({len(row.rollout.prompt_ids) for row in rows}) > 2, "rows of several lengths"
    for side in SIDES:
        batch = collate(rows, tokenizer, side=side)
        with torch.no_grad():
            logps = token_logps(read_logps(read(model, batch.student, batch)), batch.completion_ids)
            alone = [collate([row], tokenizer) for row in rows]
            single = [token_logps(read_logps(read(model, b.student, b)), b.completion_ids)[0] for b in alone]
        gaps[side] = max((one - among[: len(one)]).abs().max().item() for one, among in zip(single, logps))
    assert gaps["right"] < 1e-5, gaps
    assert (gaps["left"] < 1e-5) is is_left_safe, gaps


def test_a_prompt_of_its_own_for_each_row_is_legal():
    prompts = Prompts.of([(5,), (6, 7)], 0, side="right")
    assert prompts.ids.tolist() == [[5, 0], [6, 7]] and prompts.mask.tolist() == [[1, 0], [1, 1]]
