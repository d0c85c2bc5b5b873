"""SDPOTrainer on tiny random models: families, precisions, adapters, quantised bases, heads, dropout, memory."""
import gc
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import codebook_rows, codebook_trainer, looking
from peft import IA3Config, LoraConfig, PromptTuningConfig
from sdpo_nb.core.demo import DEMO
from sdpo_nb.learn.inputs import batch_of, learned_mask
from sdpo_nb.learn.loop import Clock
from sdpo_nb.learn.trainer import SDPOTrainer
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, TrainerCallback,
)

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
WORDS = len(AutoTokenizer.from_pretrained(DEMO))
SIZES = dict(
    vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=128, initializer_range=0.1,
    pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True,
)
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, n_positions=128)
TASK = dict(  # two questions, eight attempts of eight tokens at each, learned from five times before the next attempts
    max_steps=10, per_device_train_batch_size=16, num_generations=8, num_iterations=5, max_completion_length=8,
    learning_rate=2e-3, alpha=1.0, support="full", max_reprompt_length=None, max_grad_norm=1.0,
)
ONE_STEP = dict(max_steps=1, num_iterations=1, max_grad_norm=0.0)  # whose gradient is looked at as it is
LORA = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module", autouse=True)
def _fewer_things_to_look_through() -> Iterator[None]:
    """Each run ends in a collection of garbage, which need not look at what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _less_noise() -> Iterator[None]:
    """bitsandbytes says at every multiplication of 8 bits that it casts."""
    log = logging.getLogger("bitsandbytes.autograd._functions")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


def tiny(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A random model of two layers that knows the demo's tokens; Gemma's soft cap is low enough to bend its logits."""
    torch.manual_seed(0)
    cap = {"final_logit_softcapping": 2.0} if family.startswith("gemma") else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | cap | changes))


def quantised(folder: Path, family: str, bits: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model with its layers in few bits."""
    tiny(family).save_pretrained(folder / family)
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    config = BitsAndBytesConfig(**four if bits == 4 else {"load_in_8bit": True})
    return AutoModelForCausalLM.from_pretrained(folder / family, quantization_config=config, dtype=dtype)


def hosted(
    folder: Path, model: PreTrainedModel, host: Any = None, data: Any = None, lora: Any = None, adapter: Any = None,
    **settings: Any,
) -> Any:
    """A trainer of a model on the fixed easy task; with an adapter, or with LoRA that differs in some settings."""
    given = dict(train_dataset=data or codebook_rows(2))
    if lora is not None: adapter = LoraConfig(**LORA | lora)
    if adapter is not None: given["peft_config"] = adapter
    return codebook_trainer(folder, model=model, host=host, given=given, **TASK | settings)


def losses(trainer: Any) -> list[float]:
    """What was logged at each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def learned(trainer: Any) -> list[float]:
    """The losses of a whole run."""
    trainer.train()
    return losses(trainer)


def fell(found: list[float]) -> bool:
    """Whether the loss fell, and did so while the attempts stayed the same, five steps at a time."""
    return found[-1] < 0.75 * found[0] and all(batch[-1] < 0.9 * batch[0] for batch in (found[:5], found[5:]) if batch)


class KeepGradient(TrainerCallback):
    """Copies the gradient before the optimizer uses it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def gradient(trainer: Any) -> dict[str, Tensor]:
    """The gradient of a run's last step."""
    trainer.add_callback(keep := KeepGradient())
    trainer.train()
    assert keep.found and all(x.isfinite().all() for x in keep.found.values())
    return keep.found


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, as a share of the largest number in them."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max() for name in one) / max(x.abs().max() for x in one.values())


class Scaled(SDPOTrainer):
    """Half precision with loss scaling on a CPU: what accelerate does on a GPU, and leaves out here."""

    start = 2.0**16

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=self.start)


class Overflowing(Scaled):
    """Its first steps overflow."""

    start = 2.0**40


# how -> the model, the trainer's settings, the type that layers compute in, the type of what is trained
Case = tuple[Callable[[Path, str], PreTrainedModel], dict[str, Any], torch.dtype, torch.dtype]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WITH_LORA = dict(lora={}, learning_rate=1e-2)
CASES: dict[str, Case] = {
    "float32, full": (lambda _, family: tiny(family), {}, F32, F32),
    "float32, LoRA": (lambda _, family: tiny(family), WITH_LORA, F32, F32),
    "bfloat16 by autocast, full": (lambda _, family: tiny(family), dict(bf16=True), BF16, F32),
    "bfloat16 weights, full": (lambda _, family: tiny(family).bfloat16(), {}, BF16, BF16),
    "bfloat16 weights, LoRA": (lambda _, family: tiny(family).bfloat16(), dict(bf16=True) | WITH_LORA, BF16, F32),
    "float16 by autocast, full": (lambda _, family: tiny(family), dict(fp16=True, host=Scaled), F16, F32),
    "float16 weights, LoRA": (
        lambda _, family: tiny(family).half(), dict(fp16=True, host=Scaled) | WITH_LORA, F16, F32
    ),
    "NF4, LoRA": (lambda folder, family: quantised(folder, family, 4), WITH_LORA, F32, F32),
    "8 bits, LoRA": (lambda folder, family: quantised(folder, family, 8), WITH_LORA, F32, F32),
}


@pytest.mark.filterwarnings("ignore:fp16 does nothing on a CPU")  # Scaled makes it do something
@pytest.mark.parametrize(("how", "family"), product(CASES, FAMILIES), ids=lambda x: x)
def test_every_family_learns_in_every_precision(how: str, family: str, tmp_path: Path):
    make, settings, computed, trained = CASES[how]
    trainer = hosted(tmp_path, make(tmp_path, family), **settings)
    seen = set()
    layer = trainer.model.get_decoder().layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, given, out: seen.add(out.dtype) if torch.is_grad_enabled() else None)
    found = learned(trainer)
    assert len(found) == 10 and all(map(math.isfinite, found)) and fell(found), found
    assert seen == {computed}
    assert {weight.dtype for weight in trainer.model.parameters() if weight.requires_grad} == {trained}
    assert trainer.reads_states  # the fused loss was at work
    assert (trainer.teacher.updates, trainer.teacher.gap() > 0) == (2, True)
    assert {weight.dtype for weight in trainer.teacher.second.weights().values()} == {F32}  # an average needs them
    kinds = {"NF4": "Linear4bit", "8 bits": "Linear8bitLt"}
    assert type(getattr(layer, "base_layer", layer)).__name__ == kinds.get(how.split(",")[0], "Linear")


@pytest.mark.filterwarnings("ignore:fp16 does nothing on a CPU")
@pytest.mark.parametrize(("how", "near"), [("bfloat16 by autocast, full", 0.1), ("float16 by autocast, full", 0.01)])
def test_fewer_bits_find_nearly_the_same_losses(how: str, near: float, tmp_path: Path):
    exact, narrow = (
        learned(hosted(tmp_path, make(tmp_path, "llama"), **settings | dict(max_steps=5, learning_rate=1e-2)))
        for make, settings, *_ in (CASES["float32, full"], CASES[how])
    )
    assert exact != narrow and narrow == pytest.approx(exact, rel=near)


ADAPTERS = {
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "trained words": LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [3, 5]}),
    "mixed ranks": LoraConfig(**LORA, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 16}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_several_kinds_have_an_average(kind: str, tmp_path: Path):
    trainer = hosted(tmp_path, tiny(tie_word_embeddings=False), adapter=ADAPTERS[kind], learning_rate=1e-2)
    found = learned(trainer)
    assert fell(found), found
    second = trainer.teacher.second
    assert [weight.shape for weight in second.weights().values()] == [weight.shape for weight in second.leaders()]
    assert len(second.leaders()) == sum(weight.requires_grad for weight in trainer.model.parameters())
    assert trainer.teacher.gap() > 0


def test_adapters_without_an_average_take_a_teacher_that_needs_none(tmp_path: Path):
    scaled = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    run = lambda **settings: hosted(tmp_path, tiny(), adapter=scaled, max_steps=5, **settings)
    with pytest.raises(ValueError, match="IA3; only LoRA is known"): run()
    for teacher in (dict(teacher="live"), dict(teacher="frozen", teacher_of="base")):
        found = learned(run(learning_rate=1e-1, **teacher))
        assert fell(found), found


def test_virtual_tokens_are_refused(tmp_path: Path):
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for teacher in ("ema", "live"):
        with pytest.raises(ValueError, match="virtual tokens"):
            hosted(tmp_path, tiny(), adapter=virtual, teacher=teacher)


def test_a_base_of_four_bits_computes_in_bfloat16_where_asked(tmp_path: Path):
    found = learned(hosted(tmp_path, quantised(tmp_path, "llama", 4, BF16), bf16=True, **WITH_LORA))
    assert fell(found), found


def test_a_quantised_base_without_an_adapter_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="adapter"): hosted(tmp_path, quantised(tmp_path, "llama", 4))


def test_half_precision_that_a_cpu_does_not_have_is_said(tmp_path: Path):
    with pytest.warns(UserWarning, match="fp16 does nothing on a CPU"): hosted(tmp_path, tiny(), fp16=True)
    with pytest.raises(ValueError, match="weights of float16 cannot be trained"): hosted(tmp_path, tiny().half())


def test_an_average_of_16_bits_is_refused_in_the_settings_words(tmp_path: Path):
    with pytest.raises(ValueError, match="teacher_dtype"): hosted(tmp_path, tiny(), teacher_dtype="bfloat16")


@pytest.mark.filterwarnings("ignore:fp16 does nothing on a CPU")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_the_scaler_skips_move_neither_student_nor_teacher(optimizer: str, tmp_path: Path):
    settings = dict(fp16=True, optim=optimizer, teacher_update_every="step", max_steps=3)
    trainer = hosted(tmp_path, tiny(), host=Overflowing, **settings)
    start = [weight.detach().clone() for weight in trainer.model.parameters()]
    learned(trainer)
    assert trainer.accelerator.scaler.get_scale() == Overflowing.start / 2**3
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.model.parameters()))
    assert (trainer.teacher.updates, trainer.teacher.gap()) == (0, 0.0)
    assert [entry["sdpo/skipped_steps"] for entry in trainer.state.log_history[:3]] == [1.0] * 3


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "LoRA"])
def test_layers_that_are_computed_twice_leave_the_gradient_alone(lora: Any, tmp_path: Path):
    def run(**settings: Any) -> tuple[dict[str, Tensor], int]:
        trainer, calls = hosted(tmp_path, tiny("gemma2"), lora=lora, **ONE_STEP | settings), []
        trainer.model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        return gradient(trainer), len(calls)

    expected, calls = run()
    for kwargs in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        found, more = run(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        assert more == calls + 1 and apart(expected, found) < 1e-6


def test_a_compiled_model_learns_the_same_and_is_not_compiled_again(tmp_path: Path):
    settings = dict(num_iterations=1, max_steps=6, data=codebook_rows(12))  # prompts of several lengths
    expected, graphs = learned(hosted(tmp_path, tiny(), **settings)), []

    class Count(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None: graphs.append(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    counters.clear()
    trainer = hosted(tmp_path, tiny(), torch_compile=True, torch_compile_backend="eager", **settings)
    trainer.add_callback(Count())
    found = learned(trainer)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert graphs[0] >= 1 and graphs[-1] == graphs[2], graphs  # one for the first length, one for any


HEADS: dict[str, tuple[Callable[[], PreTrainedModel], Any]] = {  # the model, and the adapter's settings
    "tied": (tiny, None), "untied": (lambda: tiny(tie_word_embeddings=False), None),
    "soft cap": (lambda: tiny("gemma2"), None), "scaled": (lambda: tiny("granite", logits_scaling=0.2), None),
    "bias": (lambda: tiny("phi", tie_word_embeddings=False), None),
    "saved whole": (lambda: tiny(tie_word_embeddings=False), {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_hidden_states_has_the_gradient_of_the_loss_of_logits(name: str, tmp_path: Path):
    make, lora = HEADS[name]
    found = {}
    for is_fused in (True, False):
        trainer = hosted(tmp_path, make(), lora=lora, fused_loss=is_fused, **ONE_STEP)
        assert trainer.reads_states == is_fused
        found[is_fused] = gradient(trainer), losses(trainer)
    assert apart(found[False][0], found[True][0]) < 1e-5
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-5)
    if lora: assert any("modules_to_save" in name for name in found[True][0])


def test_an_adapter_on_the_head_is_refused_by_trl(tmp_path: Path):
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        hosted(tmp_path, tiny(), lora={"target_modules": ["q_proj", "lm_head"]})


def test_a_head_that_is_not_known_is_said_once_and_learns_the_same(tmp_path: Path):
    unknown = tiny("hyperclovax", logits_scaling=3.0, use_post_norm=False)  # it multiplies where Granite divides
    known = tiny("granite", logits_scaling=1 / 3)
    for name in ("attention_multiplier", "embedding_multiplier", "residual_multiplier"):
        setattr(known.config, name, getattr(unknown.config, name))
    known = type(known)(known.config)
    known.load_state_dict(unknown.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = learned(plain := hosted(tmp_path, unknown))
        expected = learned(fused := hosted(tmp_path, known))
    assert (plain.reads_states, fused.reads_states) == (False, True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    about = [str(one.message) for one in said if "computed from logits" in str(one.message)]
    assert len(about) == 1 and "hyperclovax" in about[0]


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_a_head_of_32_bits_on_a_body_of_16(is_tied: bool, tmp_path: Path):
    make = lambda: tiny(tie_word_embeddings=is_tied).bfloat16()
    narrow = learned(hosted(tmp_path, make()))
    wide = learned(fused := hosted(tmp_path, make(), cast_lm_head_to_fp32=True))
    of_logits = learned(plain := hosted(tmp_path, make(), cast_lm_head_to_fp32=True, fused_loss=False))
    assert wide[-1] < 0.75 * wide[0] and wide != narrow
    assert of_logits[0] == pytest.approx(wide[0], rel=1e-4)
    assert of_logits == pytest.approx(wide, rel=0.05)  # the body's steps are rounded to 16 bits in both
    heads = [reader.lm_head for trainer in (fused, plain) for reader in (trainer.model, trainer.ref_model)]
    assert {head.weight.dtype for head in heads} == {F32}


def test_the_copy_reads_with_its_own_head(tmp_path: Path):
    trainer = hosted(tmp_path, tiny(tie_word_embeddings=False), cast_lm_head_to_fp32=True)
    ids = torch.arange(2, 8)[None]
    with trainer.teacher.second.reading() as reader: before = reader(ids).logits
    with torch.no_grad(): trainer.model.lm_head.weight.mul_(3)
    with trainer.teacher.second.reading() as reader: assert torch.equal(reader(ids).logits, before)


class Phases(Clock):
    """A clock that knows what time it is."""

    now = ""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.now = phase
        with super().__call__(phase): yield


DROPPING = dict(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)


@pytest.mark.parametrize("teacher", ["ema", "live", "trust_region"])
@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_the_student_drops_out_and_the_teacher_never(kind: str, teacher: str, tmp_path: Path):
    def run(**settings: Any) -> set[tuple[str, bool]]:
        if kind == "full": model, lora = tiny("gpt2", **GPT2 | DROPPING), None
        else: model, lora = tiny("qwen2"), {"lora_dropout": 0.3}
        trainer = hosted(tmp_path, model, lora=lora, teacher=teacher, max_steps=2, num_iterations=1, **settings)
        trainer.clock, seen = Phases(), set()
        note = lambda module, given, out: seen.add((trainer.clock.now, module.training))
        for reader in filter(None, (trainer.model, trainer.ref_model)):
            for module in reader.modules():
                if isinstance(module, torch.nn.Dropout) and module.p: module.register_forward_hook(note)
        assert learned(trainer)[-1] > 0
        return {(phase, drops) for phase, drops in seen if phase in ("teacher", "student")}

    assert ("student", True) in (found := run()) and ("student", False) not in found
    assert ("teacher", True) not in found and (("teacher", False) in found) == (kind == "full" or teacher != "ema")
    if teacher == "live": assert run(disable_dropout=True) == set()


def test_a_row_alone_is_read_as_in_its_batch(tmp_path: Path):
    compared = []

    def look(trainer: Any, model: Any, inputs: dict[str, Any], loss_of: Callable[..., Tensor]) -> None:
        batch = batch_of(inputs, is_merged=False)
        together = trainer.read_logps(trainer.model, inputs)
        (told, head, _), = trainer.teacher.states(batch.teacher, batch)
        for i, (asked, ids) in enumerate(zip(batch.student.index, batch.completion_ids)):
            ids = ids[batch.read_mask[i] > 0]
            alone = torch.cat([batch.student.ids[asked][batch.student.mask[asked] > 0], ids])
            with torch.no_grad(): logits = trainer.model.eval()(alone[None]).logits[0, -len(ids) - 1 : -1]
            found = together[inputs["self_distillation_mask"].nonzero()[i, 0], : len(ids)]
            torch.testing.assert_close(found, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
            shown = batch.teacher.index[i]
            alone = torch.cat([batch.teacher.ids[shown][batch.teacher.mask[shown] > 0], ids])
            with torch.no_grad(): logits = trainer.ref_model.eval()(alone[None]).logits[0, -len(ids) - 1 : -1]
            torch.testing.assert_close(head.logits(told[i, : len(ids)]), logits)
        trainer.model.train()
        compared.append((len(batch.student.mask.sum(1).unique()), len(batch.completion_ids)))

    model, settings = tiny("gpt2", **GPT2), ONE_STEP | dict(per_device_train_batch_size=32)  # its positions are learned
    hosted(tmp_path, model, host=looking(look), data=codebook_rows(4), **settings).train()
    assert compared and compared[0][0] > 1 and compared[0][1] >= 16, compared  # prompts of several lengths


def test_padding_to_a_multiple_changes_nothing(tmp_path: Path):
    def run(multiple: int | None) -> tuple[list[float], set[int]]:
        widths = set()
        host = looking(lambda trainer, model, inputs, loss_of: widths.add(inputs["prompt_ids"].shape[1]))
        settings = dict(disable_dropout=True, pad_to_multiple_of=multiple, max_steps=6)
        return learned(hosted(tmp_path, tiny("gpt2", **GPT2), host=host, **settings)), widths

    (expected, widths), (found, padded) = run(None), run(16)
    assert padded == {16} and widths != padded
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def stored(trainer: Any) -> int:
    """How many numbers student, teacher and base hold, each piece of memory counted once."""
    readers = [trainer.model, trainer.ref_model]
    readers += [kept.second.model for kept in (trainer.teacher, trainer.base) if kept and hasattr(kept.second, "model")]
    weights = [weight for reader in filter(None, readers) for weight in reader.parameters()]
    return sum({weight.untyped_storage().data_ptr(): weight.numel() for weight in weights}.values())


def test_no_third_model(tmp_path: Path):
    size = sum(weight.numel() for weight in tiny().parameters())
    adapter = hosted(tmp_path, tiny(), lora={}, teacher="live")
    factors = sum(weight.numel() for weight in adapter.model.parameters() if weight.requires_grad)
    expected = {  # how it is trained -> numbers in memory
        "live": (dict(teacher="live"), size), "full": ({}, 2 * size), "frozen": (dict(teacher="frozen"), 2 * size),
        "frozen is the base": (dict(teacher="frozen", kl_to_base=0.1), 2 * size),
        "with a copy of the base": (dict(kl_to_base=0.1, keep_base_copy=True), 3 * size),
        "adapter, live": (dict(lora={}, teacher="live"), size + factors),
        "adapter": (dict(lora={}), size + 2 * factors),
        "adapter, with its base": (dict(lora={}, kl_to_base=0.1), size + 2 * factors),
    }
    for name, (settings, count) in expected.items():
        trainer = hosted(tmp_path, tiny(), max_steps=1, num_iterations=1, **settings)
        before = stored(trainer)
        trainer.train()
        assert (before, stored(trainer)) == (count, count), name
    with pytest.raises(ValueError, match="allow the copy with keep_base_copy=True"):
        hosted(tmp_path, tiny(), kl_to_base=0.1)


@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_the_pull_to_the_base_by_hand(kind: str, tmp_path: Path):
    start, seen = tiny(), []
    lora = {"init_lora_weights": False} if kind == "LoRA" else None  # an adapter that was trained before

    def look(trainer: Any, model: Any, inputs: dict[str, Any], loss_of: Callable[..., Tensor]) -> None:
        seen[:] = [{name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}, trainer.model]
        seen.append([weight.detach().clone() for weight in trainer.model.parameters()])

    def run(weight: float) -> dict[str, Tensor]:
        torch.manual_seed(0)
        keep = dict(keep_base_copy=True) if kind == "full" and weight else {}
        settings = ONE_STEP | (dict(max_steps=2, num_iterations=2) if kind == "full" else {})  # so that it has strayed
        settings |= dict(host=looking(look), lora=lora, kl_to_base=weight, is_clip=None)
        return gradient(hosted(tmp_path, tiny(), **settings | keep))

    def logps(model: PreTrainedModel) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width = inputs["completion_ids"].shape[1]
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        return logits[:, -width - 1 : -1].log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]

    without, pulled = (run(weight) for weight in (0.0, 0.5))
    inputs, model, weights = seen
    with torch.no_grad():
        for weight, then in zip(model.parameters(), weights): weight.copy_(then)  # as it was before its step
    model.zero_grad()
    mask = learned_mask(inputs) * inputs["self_distillation_mask"][:, None]
    with torch.no_grad(): base = logps(start)
    strayed = logps(model) - base
    k3 = (strayed.exp() - 1 - strayed) * mask  # of the student over the base, as chapter 11 has it
    assert k3.sum() > 0.01
    (0.5 * k3.sum() / mask.sum()).backward()
    by_hand = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    largest = max(x.abs().max() for x in by_hand.values())
    for name in by_hand:
        torch.testing.assert_close((pulled[name] - without[name]) / largest, by_hand[name] / largest, atol=1e-4, rtol=0)


def test_where_a_copy_lives_and_in_which_precision(tmp_path: Path):
    expected = learned(hosted(tmp_path, tiny(), max_steps=6))
    for where in (dict(teacher_device="cpu"), dict(teacher_parked=True)):
        assert learned(hosted(tmp_path, tiny(), max_steps=6, **where)) == expected
    for dtype in ("float64", "bfloat16"):
        kept = dict(teacher="frozen", teacher_dtype=dtype)
        trainer = hosted(tmp_path, tiny(), **kept)
        assert {weight.dtype for weight in trainer.ref_model.parameters()} == {getattr(torch, dtype)}
        found = learned(trainer)
        assert found[0] == pytest.approx(expected[0], rel=1e-5 if dtype == "float64" else 0.05)
        assert fell(found), found
    with pytest.raises(ValueError, match="teacher_parked"):
        hosted(tmp_path, tiny(), lora={}, teacher_parked=True)
