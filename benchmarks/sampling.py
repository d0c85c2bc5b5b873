"""Ways to draw attempts from a causal language model, one beside the other: seconds, and their ratio to this package's.

All draw from the same model and prompts, in turns within one process. Prompts are random words, and so is what follows,
unless `--shape demo`; with `--length` an attempt ends after about so many tokens, at different times. The short form
draws 32 tokens once, the long one 128 three times.

Ratios are theirs over ours: above 1, ours is faster.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from contest import Ratios, begin, finish, quiet
from sdpo_nb.core.adapters import add_adapter
from sdpo_nb.core.demo import Codebook, load_demo
from sdpo_nb.core.models import as_reader, pad, positions, render, seeded
from sdpo_nb.experience.branches import choose
from sdpo_nb.experience.rollouts import LogpRecorder, Sampling, StaticSampler, own_generation, stop_tokens
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM, StaticCache


@dataclass(frozen=True)
class Work:
    "What is to be drawn."

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    attempts: int
    room: int

    def padded(self) -> tuple[Tensor, Tensor]:
        return tuple(x.to(self.model.device) for x in pad(self.prompts, self.tokenizer.pad_token_id, "left"))

    def config(self, **more: Any) -> GenerationConfig:
        ends = sorted(stop_tokens(self.model, self.tokenizer))
        words = dict(max_new_tokens=self.room, eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id)
        return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **words, **more)


def ours(work: Work, seed: int) -> None:
    "What this package does."
    StaticSampler(work.model, work.tokenizer, Sampling(work.room)).draw(work.prompts, work.attempts, seed)


def generate(work: Work, seed: int) -> None:
    "transformers' `generate`, with the log-probabilities of what it chose: each attempt reads its prompt."
    ids, mask = (x.repeat_interleave(work.attempts, 0) for x in work.padded())
    recorder, config = LogpRecorder(1.0), work.config()
    with as_reader(work.model), own_generation(work.model, config), seeded(seed, work.model.device):
        recorder.finish(work.model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([recorder])))


def batched(work: Work, seed: int) -> None:
    "transformers' continuous batching."
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    rows = [prompt for prompt in work.prompts for _ in range(work.attempts)]
    asked, before = ContinuousBatchingConfig(return_logprobs=True, seed=seed), work.model.config._attn_implementation
    with as_reader(work.model): work.model.generate_batch(rows, work.config(), asked)
    work.model.set_attn_implementation(before)


def drawn(work: Work, seed: int, cache_of: Callable[[Any], Any], read: Callable[..., Any], width: int) -> None:
    "One read of each prompt, whose keys and values are dealt out to its attempts; nobody leaves."
    with as_reader(work.model), seeded(seed, work.model.device):
        ids, mask = work.padded()
        first = work.model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True, logits_to_keep=1)
        cache, logits = cache_of(first.past_key_values), first.logits[:, -1].repeat_interleave(work.attempts, 0)
        mask = F.pad(mask, (0, work.room), value=1).repeat_interleave(work.attempts, 0)
        places, done = positions(mask), torch.zeros(len(mask), dtype=torch.bool)
        dice, ends = torch.rand(work.room, 2, len(mask)), torch.tensor(sorted(stop_tokens(work.model, work.tokenizer)))
        for step in range(work.room):
            token, _ = choose(logits, 1.0, dice[step])
            done |= torch.isin(token, ends)
            if done.all() or step + 1 == work.room: break
            now = ids.shape[1] + step
            logits = read(
                token[:, None], attention_mask=mask[:, : width or now + 1], position_ids=places[:, now : now + 1],
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            ).logits[:, -1]


def dealt(work: Work, seed: int) -> None:
    "The growing cache of transformers."
    def cache_of(cache: DynamicCache) -> DynamicCache:
        cache.batch_repeat_interleave(work.attempts)
        return cache

    drawn(work, seed, cache_of, work.model, 0)


def compiled(work: Work, seed: int) -> None:
    "A cache of fixed size, and a compiled model."
    width = max(map(len, work.prompts)) + work.room

    def cache_of(cache: DynamicCache) -> StaticCache:
        fixed = StaticCache(config=work.model.config, max_cache_len=width)
        for index, layer in enumerate(cache.layers):
            fixed.update(*(x.repeat_interleave(work.attempts, 0) for x in (layer.keys, layer.values)), index)
        return fixed

    COMPILED.setdefault(id(work.model), torch.compile(work.model.forward))
    drawn(work, seed, cache_of, COMPILED[id(work.model)], width)


COMPILED: dict[int, Callable[..., Any]] = {}
WAYS = {"ours": ours, "generate": generate, "dealt": dealt, "compiled": compiled, "batched": batched}


def work_of(options: argparse.Namespace) -> Work:
    "The demo and its questions, or a random Qwen3 and random prompts."
    torch.manual_seed(0)
    if options.shape == "demo":
        model, tokenizer = load_demo("cpu")
        asked, room = [task.messages for task in Codebook().tasks(options.prompts)], 20
        prompts = [list(prompt) for prompt in render(tokenizer, asked)]
    else:
        heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096)
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=options.words, hidden_size=384, intermediate_size=1152, num_hidden_layers=8, **heads,
            tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        ))
        few = min(options.words - 1, options.words // options.length) if options.length else 1
        model.generation_config.eos_token_id = list(range(1, 1 + few))
        tokenizer, room = SimpleNamespace(pad_token_id=0, eos_token_id=1), options.room
        shortest = options.prompt // 8 if options.ragged else options.prompt
        lengths = torch.linspace(shortest, options.prompt, options.prompts)
        prompts = [torch.randint(1 + few, options.words, (int(length),)).tolist() for length in lengths]
    if options.lora:
        ends = model.generation_config.eos_token_id
        model, _ = add_adapter(model)
        model.generation_config.eos_token_id = ends
    return Work(model.eval(), tokenizer, prompts, options.attempts, room)


def compared(work: Work, names: Sequence[str], repeats: int) -> dict[str, list[float]]:
    "Seconds of each way, drawn in turns; a short turn before the first is printed and does not count."
    seconds, short = {name: [] for name in names}, replace(work, room=min(4, work.room))
    for turn in range(-1, repeats):
        for name in names:
            start = time.perf_counter()
            WAYS[name](short if turn < 0 and name != "compiled" else work, seed=turn + 1)
            spent = time.perf_counter() - start
            if turn < 0: print(f"  {name}: {spent:.2f} s the first time", flush=True)
            else: seconds[name].append(round(spent, 4))
    return seconds


def main(words: Sequence[str] | None = None) -> None:
    "Measure, and print seconds and ratios."
    parser = begin(__doc__)
    parser.add_argument("--shape", default="random", choices=("random", "demo"))
    parser.add_argument("--ways", nargs="+", default=["ours", "generate", "dealt"], choices=WAYS)
    parser.add_argument("--words", type=int, default=151_936)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--attempts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--ragged", action="store_true", help="from an eighth of that to all of it")
    parser.add_argument("--room", type=int, help="tokens of an attempt")
    parser.add_argument("--length", type=int, help="after how many tokens an attempt ends on average; none: never")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args(words)
    for name, value in (dict(room=128, repeats=3) if options.is_long else dict(room=32, repeats=1)).items():
        if getattr(options, name) is None: setattr(options, name, value)
    quiet()
    torch.set_num_threads(options.threads or os.cpu_count())
    seconds, ratios = compared(work_of(options), options.ways, options.repeats), Ratios()
    for name in options.ways[1:]:
        each = sorted(other / own for other, own in zip(seconds[name], seconds[options.ways[0]]))
        spread = {"spread": [each[0], each[-1]]} if len(each) > 1 else {}
        ratios.add(f"{name}_vs_{options.ways[0]}", {"ratio": statistics.median(each)} | spread, "seconds of drawing")
    finish(ratios.as_json() | {"seconds": seconds}, options)


if __name__ == "__main__": main()
