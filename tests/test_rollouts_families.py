"""Attempts that branch off a prompt, in the families of models that lessons have no room for."""
from typing import Any

import pytest
import torch
from sdpo_nb.core.adapters import add_adapter
from sdpo_nb.core.models import as_reader, pad
from sdpo_nb.experience.branches import Trunk, folded, planted, reads_once
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = (
    "qwen2_moe", "qwen3_moe", "gemma", "mistral", "mixtral", "phi3", "olmo2", "olmo3", "granite", "smollm3", "starcoder2",
    "gpt_neox", "gpt2", "opt", "cohere2", "glm4", "ernie4_5", "exaone4", "apertus",
)
SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)
EXPERTS = dict(num_experts=4, num_local_experts=4, moe_intermediate_size=32, num_experts_per_tok=2)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33]]
OWNERS, STAYING = torch.tensor([0, 2, 0, 1, 2, 2]), torch.tensor([1, 2, 5])


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random model whose windows, where it has any, are shorter than the longest prompt."""
    torch.manual_seed(0)
    own = EXPERTS if family.endswith("moe") or family == "mixtral" else {}
    if family in ("mistral", "olmo3", "cohere2", "exaone4"): own = {"sliding_window": 5}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | own | changes)).eval()


def differs(model: PreTrainedModel, plant: Any = planted) -> float:
    """How far branches are from whole sequences, some of them leaving on the way, with the second prompt."""
    written, rows = torch.randint(2, 96, (len(OWNERS), 6)), torch.arange(len(OWNERS))
    furthest = 0.0
    with as_reader(model):
        trunk = plant(model, pad(PROMPTS, 0, "left"), OWNERS, 6)
        for step in range(6):
            if step == 3:
                trunk.keep(STAYING)
                rows = STAYING
            found = trunk.step(written[rows, step])
            if step not in (2, 5): continue
            for row, said in zip(rows.tolist(), found):
                whole = PROMPTS[OWNERS[row]] + written[row, : step + 1].tolist()
                read = model(torch.tensor([whole]), use_cache=False).logits[0, -1]
                furthest = max(furthest, (said - read).abs().max().item())
    return furthest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_says_what_the_whole_sequence_would(family: str):
    model = tiny(family)
    assert reads_once(model) and differs(model) < 1e-4


@pytest.mark.parametrize("plant", [Trunk, planted])
def test_so_does_a_branch_under_an_adapter(plant: Any):
    model, _ = add_adapter(tiny("llama"))
    for name, weight in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(weight, std=0.3)
    with folded(model): assert differs(model, plant) < 1e-4
    assert differs(model, plant) < 1e-4


@pytest.mark.parametrize("settings", [{"vocab_size": 20_000}, {"sliding_window": 2}])
def test_answers_do_not_depend_on_who_else_is_asked(settings: dict[str, int]):
    from types import SimpleNamespace

    from sdpo_nb.experience.rollouts import Sampling, StaticSampler

    model = tiny("gemma2", **settings)
    model.generation_config.eos_token_id = list(range(1, settings.get("vocab_size", 96), 12))
    sampler = StaticSampler(model, SimpleNamespace(pad_token_id=0, eos_token_id=1), Sampling(16, temperature=0.0))
    ends = set(model.generation_config.eos_token_id)
    cut = lambda row: row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
    together = [cut(row) for row in sampler.draw(PROMPTS * 2)[0].tolist()]
    alone = [cut(sampler.draw([prompt])[0][0].tolist()) for prompt in PROMPTS]
    assert together == alone * 2
