"""Make the demo model from nothing: `make demo-model`.

Or `python tools/demo_model.py [--seed N] [--steps N] [--out FOLDER]`. Tokenizer, corpus, pretraining and model card, on
one CPU thread, in minutes. The number of steps is fixed, not the time, so that the same seed and versions give the same
weights. Muon for the hidden matrices is what makes it fit: AdamW alone needs several times the steps.
"""
import argparse
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from demo_corpus import Corpus, Document, reprompt
from sdpo_nb.core.demo import BOOKS, DEMO, KINDS, LETTERS, SYLLABLES, Codebook, decode
from sdpo_nb.core.models import load_model, pad, render
from sdpo_nb.core.records import Task
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 768
CONTEXT = 512
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
# Words of three letters and more with their space and colon; "ka=" and " ka=" as one piece each, so that an answer is
# two tokens a pair and the key of a pair is one token wherever it stands (with single characters most answers came out
# malformed); "!Q", which is "not Q", as one piece with an embedding of its own: made of two, with Q among them, the
# model copies the letter that it should avoid, and most runs never learned better.
PIECES = r" ?[A-Za-z]{3,}[:.]?|\n+| ?[a-z]{2}=| ?[a-z]{2}(?![a-z])|!?[A-Z](?![A-Za-z])| ?\S|\s"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RATE, WARMUP, DECAY = 3e-3, 100, 0.02  # learning rate; steps to reach it; what is left of it at the end
TOKENS = 2048  # in a step, padding included
PROMPT_WEIGHT = 0.1  # a token of the prompt counts this much, one of the answer 1


def make_tokenizer(documents: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE on pieces of the corpus: whatever else is typed falls apart into bytes and comes back whole."""
    core = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), by_bytes])
    core.decoder = decoders.ByteLevel()
    corpus = Corpus(seed=-1)
    texts = [words for _ in range(documents) for _, words in corpus.document().turns]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=SPECIAL[2:],
        chat_template=TEMPLATE, padding_side="left", clean_up_tokenization_spaces=False, model_max_length=CONTEXT,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of four layers, with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=336, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, pool: int = 1024
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and the weight of each as a target, documents of like length together."""
    order = random.Random("order of batches")
    while True:
        documents = [corpus.document() for _ in range(pool)]
        rows = sorted(zip(*encode_documents(tokenizer, documents)), key=lambda row: len(row[0]) + len(row[1]))
        chunks, chunk = [], []
        for row in rows:  # rows only grow, so the newest one is the widest
            if chunk and sum(map(len, row)) * (len(chunk) + 1) > TOKENS: chunks, chunk = [*chunks, chunk], []
            chunk.append(row)
        order.shuffle(chunks := [*chunks, chunk])
        for chunk in chunks:
            ids, _ = pad([prompt + answer for prompt, answer in chunk], tokenizer.pad_token_id, "right")
            weights = [[0.0] + [PROMPT_WEIGHT] * (len(prompt) - 1) + [1.0] * len(answer) for prompt, answer in chunk]
            yield ids, pad(weights, 0.0, "right", torch.float32)[0]


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> tuple[list, list]:
    """Token ids of prompts and of answers."""
    prompts = [tokenizer.apply_chat_template(d.messages, tokenize=False, add_generation_prompt=True) for d in documents]
    return tokenizer(prompts)["input_ids"], tokenizer([d.answer + tokenizer.eos_token for d in documents])["input_ids"]


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    hidden = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    rest = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    muon = torch.optim.Muon(
        hidden, lr=RATE, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw", ns_steps=4
    )
    return [muon, torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def rate_at(step: int, steps: int) -> float:
    """Up, flat to half time, and down a cosine."""
    done = max(0.0, step / steps - 0.5) / 0.5
    return RATE * min(1.0, (step + 1) / WARMUP) * (DECAY + (1 - DECAY) * 0.5 * (1 + math.cos(math.pi * done)))


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, steps: int) -> dict:
    """Train, and return what happened."""
    chain, log, tokens, smooth, start = optimizers(model), [], 0, None, time.time()
    for step, (ids, weights) in zip(range(steps), batches(corpus, tokenizer)):
        for optimizer in chain:
            for group in optimizer.param_groups: group["lr"] = rate_at(step, steps)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # padded on the right: causality is mask enough
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        weights = weights[:, 1:]
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chain: optimizer.step()
        model.zero_grad(set_to_none=True)
        answers = losses[weights == 1].mean().item()
        tokens, smooth = tokens + ids.numel(), answers if smooth is None else 0.98 * smooth + 0.02 * answers
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.time() - start
            left = seconds / (step + 1) * (steps - step - 1)
            log.append({"step": step + 1, "tokens": tokens, "loss": round(smooth, 4), "seconds": round(seconds, 1)})
            print(
                f"step {step + 1:5d}/{steps}  loss {smooth:6.3f}  "
                f"{tokens / seconds:6.0f} tokens/s  {left:4.0f} s left",
                flush=True,
            )
    return {"steps": steps, "tokens": tokens, "loss": log[-1]["loss"], "seconds": log[-1]["seconds"], "log": log}


@torch.no_grad()
def sample(model, tokenizer, conversations: list, temperature: float = 1.0) -> list[str]:
    """One answer to each conversation."""
    ids, mask = pad(render(tokenizer, conversations), tokenizer.pad_token_id, "left")
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, **how)
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def measure(model, tokenizer, count: int = 400) -> dict[str, dict[str, float]]:
    """How often the model is right about each target, by what it is given to read."""
    torch.manual_seed(0)
    table = {}
    for name in BOOKS:
        tasks = Codebook(name).tasks(count, "held_out")
        questions = [task.messages for task in tasks]
        attempts = sample(model, tokenizer, questions)
        answers = {"nothing": attempts, "nothing, greedy": sample(model, tokenizer, questions, temperature=0)}
        for context in contexts(tasks[0], attempts[0], name):
            prompts = [contexts(task, attempt, name)[context] for task, attempt in zip(tasks, attempts)]
            answers[context] = sample(model, tokenizer, prompts)
        judged = {
            context: [Codebook(name).judge(*pair) for pair in zip(tasks, texts)] for context, texts in answers.items()
        }
        table[name] = {context: round(sum(f.score for f in row) / count, 4) for context, row in judged.items()}
        well_formed = sum(f.metrics["well_formed"] for f in judged["nothing"])
        table[name]["(malformed, given nothing)"] = round(1 - well_formed / count, 4)
    return table


def skills(model, tokenizer, count: int = 1000) -> dict[str, float]:
    """How often it is right about what it knows by heart, on fresh documents."""
    torch.manual_seed(0)
    corpus, by_first_words = Corpus(seed=-2), {}
    documents = [Document(*corpus.known_book(corpus.rng.sample(SYLLABLES, 6))) for _ in range(count // 2)]
    documents += [Document(*corpus.list_task(corpus.rng.sample(SYLLABLES, 4))) for _ in range(count)]
    for document, answer in zip(documents, sample(model, tokenizer, [document.messages for document in documents])):
        question = document.turns[-1][1]
        if "\n" in question: continue  # the solution is in it
        name = "known book" if "book" in question else question.split(":")[0].lower()
        by_first_words.setdefault(name, []).append(answer == document.answer)
    return {name: round(sum(row) / len(row), 3) for name, row in by_first_words.items()}


@torch.no_grad()
def reread(model, tokenizer, count: int = 200) -> dict[str, dict[str, float]]:
    """The probability of the right and of the wrong letter at each mistake about `omega`, by what the reader knows."""
    torch.manual_seed(0)
    tasks = Codebook().tasks(count, "held_out")
    letters, seen = tokenizer.convert_tokens_to_ids(list(LETTERS)), {}
    for task, attempt in zip(tasks, sample(model, tokenizer, [task.messages for task in tasks])):
        right, said = decode(task.info["answer"]), decode(attempt)
        if said is None or list(said) != list(right): continue
        for context, conversation in {"nothing": task.messages, **contexts(task, attempt, "omega")}.items():
            ids = torch.tensor([[*render(tokenizer, [conversation])[0], *tokenizer(attempt)["input_ids"]]])
            logits = model(ids).logits[0, -2 * len(right) :: 2]  # a pair is two tokens: the key, then the letter
            odds = logits.softmax(-1)[:, letters]
            for row, syllable in zip(odds, right):
                if said[syllable] == right[syllable]: continue
                pair = [row[LETTERS.index(book[syllable])].item() for book in (right, said)]
                seen.setdefault(context, []).append(pair)
    means = {context: [sum(column) / len(rows) for column in zip(*rows)] for context, rows in seen.items()}
    return {context: {"right": round(right, 4), "said": round(said, 4)} for context, (right, said) in means.items()}


def contexts(task: Task, attempt: str, name: str) -> dict[str, tuple]:
    """The conversations in which the model may meet a task again."""
    said = {kind: Codebook(name, kind).judge(task, attempt).text for kind in KINDS}
    user = lambda words: {"role": "user", "content": words}
    retry = lambda words: (user(reprompt(task.question, feedback=words)),) if words else task.messages
    opened = {"role": "system", "content": f"Book {name}: {task.info['answer']}"}
    return {
        "a correct solution": (user(reprompt(task.question, solution=task.info["answer"])),),
        "the book, as system prompt": (opened, *task.messages),
        "`full` feedback": retry(said["full"]),
        "`first` feedback": retry(said["first"]),
        "`neg` feedback": retry(said["neg"]),
        "its attempt and `full` feedback, as a conversation": (
            *task.messages, {"role": "assistant", "content": attempt}, user(said["full"] or "Right. Say it again."),
        ),
    }  # fmt: skip


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write what the Auto classes of transformers 5.15 to 5.23 load, in 16 bits."""
    shutil.rmtree(out, ignore_errors=True)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    for name in ("is_local", "local_files_only"): config.pop(name, None)  # where it was made, and of no use elsewhere
    file.write_text(json.dumps(config, indent=2) + "\n")
    for file in out.iterdir(): file.chmod(0o644)


def stamp(seed: int, run: dict, corpus: Corpus, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict:
    """All that another run can be held against."""
    audit = {name: round(value, 1) for name, value in asdict(corpus.audit).items()}
    versions = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
    }
    size = {"parameters": sum(weight.numel() for weight in model.parameters()), "vocabulary": len(tokenizer)}
    figures = {
        "pass_rates": measure(model, tokenizer),
        "rereading": reread(model, tokenizer),
        "skills": skills(model, tokenizer),
    }
    return {"seed": seed, **size, **run, "threads": 1, "versions": versions, "audit": audit, **figures}


def card(recipe: dict) -> str:
    """The model card, with the figures of this very run."""
    figures = {name: recipe["pass_rates"][name] for name in BOOKS}
    rows = "\n".join(
        f"| {context} | {figures['zeta'][context]:.1%} | {figures['omega'][context]:.1%} |"
        for context in figures["omega"]
    )
    reading = "\n".join(
        f"| {context} | {p['right']:.3f} | {p['said']:.3f} |" for context, p in recipe["rereading"].items()
    )
    skilled = ", ".join(f"{name} {share:.0%}" for name, share in recipe["skills"].items())
    command = f"python tools/demo_model.py --seed {recipe['seed']} --steps {recipe['steps']}"
    written = {"rows": rows, "reading": reading, "skills": skilled, "command": command}
    return CARD.format_map({**recipe, **recipe["audit"], **written})


CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [demo, codebook, sdpo]
---

# The sdpo-nb demo model

A Llama of {parameters:,} parameters (4 layers, width 128, {vocabulary} tokens, context 512) in bfloat16. It is made to
be trained: it loads in milliseconds, learns in seconds on a laptop, and shows what SDPO does.

## What it can do

It answers questions such as `Encode with book omega: ka so be` with pairs such as `ka=M so=P be=T`, two to eight of
them. A book gives each of 64 syllables a letter; 16 syllables have the same letter in every book, 48 have three
candidates at odds of .6, .3 and .1. The model knows the odds, and four books (`alpha` to `delta`) by heart. It reads: a
solution in its prompt, feedback on an attempt that it does not see, a book in the system prompt, or an attempt and what
was said of it. How often it is right on six syllables of a known book, and on small tasks about four syllables:
{skills}.

How often it is right about 400 held-out questions of 5 to 8 syllables, sampled at temperature 1, by what it is given to
read beside the question:

| given | `zeta` | `omega` |
|---|---|---|
{rows}

Feedback on an attempt cannot reach 100 %: the attempt is not shown, so whatever the feedback leaves out is guessed
again.

What SDPO learns from is less than a retry: the same reader goes over the attempt, letter by letter. Where an answer
about `omega` is wrong, it gives this probability to the right letter and to the one that was said:

| it has read | right letter | wrong letter |
|---|---|---|
{reading}

## What it cannot do

Everything else. It has read no natural language but a few dozen words of prompts, knows nothing of the world, and
continues any other text with nonsense. It was not tried on more than 8 syllables.

## How it was made

`{command}`, on one thread of a CPU: {steps:,} steps, {tokens:,} tokens with padding, {seconds:.0f} seconds, answer loss
{loss:.3f} (nats per token, smoothed). torch {versions[torch]}, transformers {versions[transformers]}. `recipe.json`
holds the log.

The corpus is drawn on line by `tools/demo_corpus.py`. The training targets `zeta` and `omega` are not in it: the names
occur, each time with a book drawn afresh. Of {drawn:,} books drawn, none was a target. Of {about_targets:,} answers
about these two names on no evidence, {agreed} agree with the target, where chance expects {expected}.
"""


def main() -> None:
    """Make, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the corpus (0)")
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining (1500)")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write (the package's own)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads are no faster at this size, and sums in another order are other weights
    torch.manual_seed(options.seed)
    transformers.logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    model, corpus = make_model(tokenizer), Corpus(options.seed)
    run = pretrain(model, tokenizer, corpus, options.steps)
    corpus.audit.check()
    save(model, tokenizer, options.out)
    model, tokenizer = load_model(options.out, dtype=torch.float32, device="cpu")
    recipe = stamp(options.seed, run, corpus, model.eval(), tokenizer)
    (options.out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    (options.out / "README.md").write_text(card(recipe))
    size = sum(file.stat().st_size for file in options.out.iterdir())
    figures = {name: recipe[name] for name in ("pass_rates", "rereading", "skills")}
    print(json.dumps(figures, indent=1), f"\n{size / 1e6:.2f} MB in {options.out}")
    if size > 3e6: raise SystemExit("that is more than the 3 MB that the package has room for")


if __name__ == "__main__": main()
