"""SDPOTrainer beside the real Unsloth, which rewrites TRL's trainers; each case is a Python of its own.

Without a GPU Unsloth leaves TRL alone. UNSLOTH_ALLOW_CPU and PatchFastRL make the classes that a GPU would bring;
models then come from Unsloth's loader for CPUs. Its kernels for GPUs are not run here.
"""
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

needs_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None,
    reason="needs Unsloth, which wants older packages in a folder of its own: make test-unsloth",
)
PATCHED = "UnslothGRPOTrainer"  # the module that Unsloth writes, and the class in it


def alone(case: str, folder: Path, **settings: str) -> dict:
    "What a case reports, run in a folder into which Unsloth may write the code that it makes."
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"} | settings
    done = subprocess.run([sys.executable, __file__, case], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def resolve() -> tuple[type, list[str]]:
    "SDPOTrainer, asked for twice, and every warning about Unsloth's place among the imports."
    import sdpo_nb

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = sdpo_nb.SDPOTrainer
        assert sdpo_nb.SDPOTrainer is trainer
    return trainer, [str(one.message) for one in said if "unsloth before" in str(one.message)]


def trl_only() -> dict:
    import trl

    return {"trl": trl.__name__, "warnings": resolve()[1]}


def trl_first() -> dict:
    import trl
    import unsloth

    return {"imported": [trl.__name__, unsloth.__name__], "warnings": resolve()[1]}


def plain() -> dict:
    "Nobody imports Unsloth: what the others have to equal."
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(source, is_full):
        model = AutoModelForCausalLM.from_pretrained(source)
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # as Unsloth chooses
        if not is_full: model = get_peft_model(seeded(model), LoraConfig(r=4, lora_alpha=16, target_modules=layers))
        return model, AutoTokenizer.from_pretrained(source)

    return runs(load)


def unpatched() -> dict:
    "Unsloth as it is without a GPU: its loader, TRL's trainer."
    import unsloth

    from sdpo_nb import load_model

    def load(source, is_full):
        model, tokenizer = load_model(source, "float32", unsloth=True, load_in_4bit=False, full_finetuning=is_full)
        return model if is_full else unsloth.FastLanguageModel.get_peft_model(model, r=4), tokenizer

    return runs(load)


def patched() -> dict:
    "Unsloth as it is with a GPU: its trainer, and of the loaders the one that can do without."
    from unsloth import PatchFastRL

    del os.environ["UNSLOTH_ALLOW_CPU"]  # under which PatchFastRL does nothing
    PatchFastRL()
    trainer, said = resolve()
    from unsloth_zoo.cpu import FastCPUModel

    def load(source, is_full):
        model, tokenizer = FastCPUModel.from_pretrained(
            str(source), dtype="float32", load_in_4bit=False, full_finetuning=is_full,
        )
        return model if is_full else FastCPUModel.get_peft_model(model, r=4), tokenizer

    def owner(name, of):
        return next(one.__module__ for one in of if name in vars(one))

    methods = "_prepare_inputs", "_generate", "_generate_single_turn", "_generate_and_score_completions"
    behind = [one for one in trainer.__mro__ if not one.__module__.startswith("sdpo_nb.")]
    return runs(load) | {
        "warnings": said, "behind": [one.__name__ for one in behind],
        "owners": {name: owner(name, behind) for name in methods}, "loss": owner("compute_loss", trainer.__mro__),
    }


def seeded(model):
    "A model, with the next random numbers as Unsloth has them when it makes an adapter."
    import torch

    torch.manual_seed(3407)
    return model


def runs(load) -> dict:
    "Three steps of small models: all weights, an adapter, and one that the project's own sampler knows how to run."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

    from sdpo_nb.core.demo import DEMO

    found, tokenizer = {}, AutoTokenizer.from_pretrained(DEMO)
    for name, kind in {"full": Qwen2Config, "lora": LlamaConfig, "sampler": LlamaConfig}.items():
        folder = Path(f"model_{name}")
        config = kind(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        draws = {} if name == "sampler" else dict(cache_implementation="dynamic")  # TRL's generation, not ours
        found[name] = three_steps(*load(folder.resolve(), name != "lora"), f"run_{name}", **draws)
    return found


def three_steps(model, tokenizer, output: str, **draws: str) -> dict:
    "Losses, and what was in the batch that they were of."
    from datasets import Dataset

    from sdpo_nb import Feedback, SDPOConfig, SDPOTrainer

    def judge(prompts, completions, **columns):
        return [Feedback(float(len(one) % 2), f"It has {len(one)} signs.") for one in completions]

    args = SDPOConfig(
        output_dir=output, report_to="none", use_cpu=True, bf16=False, fp16=False, max_steps=3, num_generations=2,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, max_completion_length=6, max_reprompt_length=128,
        learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, **draws,
    )
    rows = Dataset.from_dict({"prompt": ["sort 3 1 2", "sort 9 8", "sort 4 4 1", "sort 2"]})
    trainer = SDPOTrainer(model, judge, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    inputs, draws_itself = sorted(trainer._buffered_inputs[0]), trainer.draws_itself()
    losses.append(trainer.evaluate(rows)["eval_loss"])
    return {"losses": losses, "inputs": inputs, "draws_itself": draws_itself}


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> dict:
    return alone("plain", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def with_unsloth(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("patched")  # without the second word Unsloth turns fp16 on where bf16 is missing
    return alone("patched", folder, UNSLOTH_ALLOW_CPU="1", UNSLOTH_FORCE_FLOAT32="1")


def test_who_began_first_came_first_though_it_ends_last(tmp_path, monkeypatch):
    import sdpo_nb

    (tmp_path / "sdpo_outer").mkdir()
    (tmp_path / "sdpo_outer" / "__init__.py").write_text("from . import part\nimport sdpo_inner\n")
    for file in "sdpo_outer/part.py", "sdpo_inner.py": (tmp_path / file).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("sdpo_outer")
    assert sdpo_nb._came_after("sdpo_inner", "sdpo_outer")
    assert not sdpo_nb._came_after("sdpo_outer", "sdpo_inner")
    assert not sdpo_nb._came_after("sdpo_never", "sdpo_outer") and not sdpo_nb._came_after("sdpo_outer", "sdpo_never")


def test_who_does_not_use_unsloth_hears_nothing_of_it(tmp_path):
    assert alone("trl_only", tmp_path) == {"trl": "trl", "warnings": []}


@needs_unsloth
def test_import_order_correct(with_unsloth):
    assert with_unsloth["warnings"] == []
    assert with_unsloth["behind"][:2] == [PATCHED, f"_{PATCHED}"]


@needs_unsloth
def test_import_order_wrong_raises_warning(tmp_path):
    said = alone("trl_first", tmp_path)["warnings"]
    assert len(said) == 1 and "import unsloth before trl, transformers, peft and sdpo_nb.SDPOTrainer" in said[0]


@needs_unsloth
def test_generation_uses_unsloth_optimization(with_unsloth, without):
    assert set(with_unsloth["owners"].values()) == {PATCHED} and with_unsloth["loss"].startswith("sdpo_nb.")
    for run in ("full", "lora", "sampler"):
        assert "max_left_pad" in with_unsloth[run]["inputs"]  # Unsloth's own word; TRL's batches have none
        assert not with_unsloth[run]["draws_itself"]
    assert without["sampler"]["draws_itself"]


@needs_unsloth
def test_unsloths_trainer_learns_the_same(with_unsloth, without):
    for run in ("full", "lora"):
        assert "max_left_pad" not in without[run]["inputs"] and min(without[run]["losses"]) > 0
        assert with_unsloth[run]["losses"] == pytest.approx(without[run]["losses"], rel=1e-3)


@needs_unsloth
def test_unsloths_loader_learns_the_same(without, tmp_path):
    found = alone("unpatched", tmp_path)
    for run in ("full", "lora"): assert found[run]["losses"] == pytest.approx(without[run]["losses"], rel=1e-3)


if __name__ == "__main__": print(json.dumps(globals()[sys.argv[1]]()))
