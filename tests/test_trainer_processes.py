"""The trainer learns the same from a batch, however that is cut: into passes, into slices, into two processes."""
import multiprocessing
import os
import socket
import traceback
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from sdpo_nb.core.adapters import add_adapter
from sdpo_nb.core.demo import BOOKS, DEMO, ask, encode
from sdpo_nb.core.models import as_reader, pad, undressed
from sdpo_nb.core.records import Feedback
from sdpo_nb.experience.batches import Batch, Prompts
from sdpo_nb.learn.config import SDPOConfig
from sdpo_nb.learn.reading import read
from sdpo_nb.learn.selves import FullCopy, whole
from sdpo_nb.learn.trainer import SDPOTrainer
from sdpo_nb.loss.objectives import AGGREGATIONS, read_logps, token_logps
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
BOOK, TOKENIZER = BOOKS["omega"], AutoTokenizer.from_pretrained(DEMO)
ATTEMPTS = {  # at each question, in one group: r is right, w is wrong and hears why, ? is no answer and hears nothing
    "ba ki": "r???????",  # all but the first are shown a success; half of them sit in another process than it
    "mu re fo": "????w?w?",  # the first four, which one process gets, have no signal
    "go pa ve": "ww?w?www",
    "so": "????????",  # nobody has
}
LOUD, SILENCE = ("ba ki", "mu re fo", "go pa ve"), ("ba ki", "so", "go pa ve")
STEP = dict(num_generations=8, per_device_train_batch_size=8)  # eight rows, one group
TRAINED = ("all weights", "adapter")


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
    for part in [model.model, *model.model.layers]:  # Llama's own norms round to 32 bits
        for name, norm in [*part.named_children()]:
            if isinstance(norm, LlamaRMSNorm): setattr(part, name, torch.nn.RMSNorm(16, norm.variance_epsilon))
    if trained == "adapter":
        model, _ = add_adapter(model, rank=2)
        for weight in model.parameters():
            if weight.requires_grad: torch.nn.init.normal_(weight, std=0.1)
    is_bare = trained == "the first's weights" and os.environ.get("RANK") == "1"
    return model.to("meta") if is_bare else model.to(dtype)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    "What is trained, as one process would hold it."
    return {name: whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}


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
            undressed(reader).get_decoder().register_forward_hook(partial(self.note, name))

    def note(self, name: str, decoder: torch.nn.Module, args: Any, output: Any) -> None:
        self.read.update({name: len(output.last_hidden_state), f"{name}'s passes": 1})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = {name: weight.grad for name, weight in self.trainer.model.named_parameters()}
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
    if args.fsdp: PartialState().distributed_type = DistributedType.MULTI_GPU  # accelerate shards on no CPU otherwise
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
    assert apart(found["teachers"][-1:], [found["begun"]]) > 1e-4  # so that a teacher that stays fails
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)  # Transformers keeps it in single precision
    assert found["norms"] == pytest.approx(expected["norms"], abs=tolerance)
    assert found["behind"] == pytest.approx(expected["behind"], abs=1e-6)
    assert found["heard"] == expected["heard"] and found["silent"] == expected["silent"]


TIMES_OF = {"all weights": (1, 4), "adapter": (2, 4)}  # passes of one optimizer step, in two processes
WRAPS = {"layer by layer": "TRANSFORMER_BASED_WRAP", "as one": "NO_WRAP"}
REUSED = dict(steps_per_generation=6, num_iterations=2, gradient_accumulation_steps=2, max_steps=9, weight_decay=0.0)
QUIET = dict(questions=SILENCE, shuffle_dataset=False)


def cut_in(times: int, processes: int = 1) -> dict[str, int]:
    "A step of eight rows in so many passes."
    return dict(per_device_train_batch_size=8 // processes // times, gradient_accumulation_steps=times)


def sharded(wrap: str, **more: Any) -> dict[str, Any]:
    "FSDP2, with checkpoints of activations and without."
    config = dict(version=2, auto_wrap_policy=WRAPS[wrap]) | more
    return dict(fsdp=True, fsdp_config=config, gradient_checkpointing=wrap == "as one")


TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {  # what two processes do; a group of eight spans both
    "ddp, reused": ("all weights", REUSED | dict(per_device_train_batch_size=2)),
    "ddp, silence": ("all weights", QUIET | cut_in(2, 2)),
    "fsdp2, reused": ("all weights", REUSED | sharded("layer by layer") | dict(per_device_train_batch_size=2)),
    "fsdp2, silence": ("all weights", QUIET | sharded("layer by layer") | cut_in(1, 2)),
    "ddp, few tokens": ("all weights", dict(tokens_per_pass=24) | cut_in(1, 2)),
    "fsdp2, few tokens": ("all weights", dict(tokens_per_pass=24) | sharded("as one") | cut_in(1, 2)),
    "fsdp2, parked": ("all weights", dict(teacher_parked=True) | sharded("as one") | cut_in(1, 2)),
    "fsdp2, elsewhere": ("all weights", dict(teacher_device="cpu") | sharded("as one") | cut_in(1, 2)),
    "fsdp2, on meta": ("the first's weights", sharded("as one") | cut_in(1, 2)),
}
for trained, aggregation in zip(TRAINED, AGGREGATIONS):
    for times in TIMES_OF[trained]:
        TOGETHER[f"ddp, {trained}, {times}"] = trained, dict(aggregation=aggregation) | cut_in(times, 2)
    for wrap in WRAPS:
        TOGETHER[f"fsdp2 {wrap}, {trained}"] = trained, dict(aggregation=aggregation) | sharded(wrap) | cut_in(2, 2)
TOGETHER |= {f"ddp, {how}": ("all weights", dict(aggregation=how) | cut_in(2, 2)) for how in AGGREGATIONS[2:]}
SENT = sharded("layer by layer", cpu_ram_efficient_loading=True)
TOGETHER["fsdp2, sent by the first"] = "all weights", SENT | cut_in(1, 2)  # last: accelerate leaves FSDP on


STAGE = dict(stage=3, stage3_param_persistence_threshold=0)
SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
ZERO = dict(zero_optimization=STAGE, zero_force_ds_cpu_optimizer=False) | dict.fromkeys(SIZES, "auto")
ZERO_3: dict[str, tuple[str, dict[str, Any]]] = {
    "silence": ("all weights", QUIET | cut_in(2, 2)),
    "parked": ("all weights", dict(teacher_parked=True) | cut_in(2, 2)),
    **{trained: (trained, dict(aggregation=one) | cut_in(2, 2)) for trained, one in zip(TRAINED, AGGREGATIONS)},
}


def half_of_it(rank: int, folder: str, port: int, runs: dict[str, Any], is_zero: bool) -> None:
    "One of two processes."
    here = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in here.items()}, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if is_zero:  # DeepSpeed's messages are gloo's here; accelerate would have none of it on a CPU
        os.environ["DS_ACCELERATOR"] = "cpu"
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)
        how = dict(deepspeed=ZERO, use_cpu=False, gradient_checkpointing=False, dtype=torch.float32)
    else: how = dict(ddp_backend="gloo")
    all_found = {}
    for name, (trained, settings) in runs.items():
        try: found = run(trained, **how, **settings)
        except Exception: found = traceback.format_exc()  # the other runs go on; the test of this one shows it
        else:
            both = [None, None]
            dist.all_gather_object(both, found["noted"])
            found["noted"] = [mine + yours for mine, yours in zip(*both)]
        all_found[name] = found
    if rank == 0: torch.save(all_found, f"{folder}/found.pt")
    dist.destroy_process_group()


def in_two_processes(folder: Path, runs: dict[str, Any], is_zero: bool = False) -> dict[str, Any]:
    "What two processes found, run by run; a text where one broke."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["sdpo_nb.learn.trainer"])  # it takes its time
    given = str(folder), port, runs, is_zero
    torch.multiprocessing.start_processes(half_of_it, given, nprocs=2, start_method="forkserver")
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    "All runs of two processes, so that they start but once."
    return in_two_processes(tmp_path_factory.mktemp("together"), TOGETHER)


@pytest.mark.parametrize(("trained", "aggregation"), [
    *(("all weights", how) for how in AGGREGATIONS), *(("adapter", how) for how in AGGREGATIONS[:2]),
])
def test_how_often_gradients_are_gathered_does_not_matter(trained: str, aggregation: str):
    expected = alone(trained, aggregation)
    assert sorted(expected["heard"]) == [2 / 8, 6 / 8, 7 / 8]  # so that slices differ in how much they say
    assert min(expected["norms"]) > 0.01
    for times in (2, 4):
        check_same(run(trained, aggregation=aggregation, **cut_in(times)), expected)


@pytest.mark.parametrize(("trained", "times"), [(trained, times) for trained in TRAINED for times in TIMES_OF[trained]])
def test_two_processes_learn_what_one_learns(trained: str, times: int, together: dict[str, Any]):
    found, expected = together[f"ddp, {trained}, {times}"], alone(trained, AGGREGATIONS[TRAINED.index(trained)])
    check_same(found, expected)
    assert found["wrapper"] == "DistributedDataParallel"


@pytest.mark.parametrize("aggregation", AGGREGATIONS[2:])
def test_two_processes_average_as_one_does(aggregation: str, together: dict[str, Any]):
    check_same(together[f"ddp, {aggregation}"], alone("all weights", aggregation))


def test_processes_may_read_their_slices_in_portions_of_their_own(together: dict[str, Any]):
    check_same(together["ddp, few tokens"], alone("all weights", "token-mean"))
    assert "tokens_per_pass cannot cut their slices" in together["fsdp2, few tokens"]  # they share weights


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("wrap", WRAPS)
def test_slices_of_fsdp2_learn_what_whole_weights_learn(trained: str, wrap: str, together: dict[str, Any]):
    found, expected = together[f"fsdp2 {wrap}, {trained}"], alone(trained, AGGREGATIONS[TRAINED.index(trained)])
    check_same(found, expected)
    assert found["wrapper"].startswith("FSDP")


@pytest.mark.parametrize("what, said", {
    "parked": "slice the teacher as they do its student", "elsewhere": "leave teacher_device and teacher_parked out",
    "on meta": "a process holds the model on meta",  # and all of them stop
}.items())
def test_what_shared_weights_cannot_have_is_refused(what: str, said: str, together: dict[str, Any]):
    assert said in together[f"fsdp2, {what}"]


def test_the_first_process_may_send_the_others_their_slices(together: dict[str, Any]):
    check_same(together["fsdp2, sent by the first"], alone("all weights", "token-mean"))


def laid_out(rows: list[Any], old: dict[Any, Tensor]) -> Batch:
    "Rows as they are, none of them merged, with what was thought of them when they were drawn."
    prompts, told, attempts = map(list, zip(*rows))
    ids, mask = pad(attempts, TOKENIZER.pad_token_id, "right")
    old_logps, ones = [old.get(row, torch.zeros(len(row[2]))).tolist() for row in rows], torch.ones(len(rows))
    return Batch(
        Prompts.of(prompts, TOKENIZER.pad_token_id), Prompts.of(told, TOKENIZER.pad_token_id), ids, mask, mask,
        pad(old_logps, 0.0, "right", torch.float32)[0], ones, 0 * ones,
    )


def in_plain_torch(steps: list[list[Any]], per_generation: int) -> tuple[list[Any], list[Any]]:
    "The rows of each optimizer step at once, by logits: all weights, and the teacher's, after each."
    config, model = SDPOConfig(output_dir="unused", bf16=False, fp16=False, use_cpu=True), student("all weights")
    method, teacher = config.method(), config.make_teacher().attach(model)
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0), []
    for i, rows in enumerate(steps):
        if i % per_generation == 0:
            every = sorted({row for step in steps[i : i + per_generation] for row in step})
            batch = laid_out(every, {})
            with as_reader(model) as reader:
                logps = token_logps(read_logps(read(reader, batch.student, batch)), batch.completion_ids)
            old = {row: one[: len(row[2])] for row, one in zip(every, logps)}
        batch = laid_out(rows, old)
        told = teacher.read(batch.teacher, batch)
        optimizer.zero_grad()
        method.loss(read(model, batch.student, batch), told, batch).loss.backward()
        optimizer.step()
        if (i + 1) % per_generation == 0: teacher.update("rollout")
        found.append((weights_of(model), teacher.state_dict()["weights"]))
    return tuple(map(list, zip(*found)))


@pytest.mark.parametrize("how", ["one process", "ddp", "fsdp2"])
def test_attempts_that_are_shuffled_and_used_twice_teach_as_in_plain_torch(how: str, request: pytest.FixtureRequest):
    if how == "one process": found = run("all weights", **REUSED | dict(per_device_train_batch_size=4))
    else: found = request.getfixturevalue("together")[f"{how}, reused"]
    if isinstance(found, str): pytest.fail(found)
    passes, reused = REUSED["gradient_accumulation_steps"], REUSED["steps_per_generation"] * REUSED["num_iterations"]
    steps = [sum(found["noted"][i : i + passes], []) for i in range(0, len(found["noted"]), passes)]
    assert len(steps) == 9 and steps[:3] == steps[3:6] and len({len(rows) for rows in steps}) > 1
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[6:], [])) and steps[:3] != steps[6:]  # shuffled anew
    weights, teachers = in_plain_torch(steps, reused // passes)
    assert apart(found["weights"], weights) < 1e-6 and apart(found["teachers"], teachers) < 1e-6
    assert apart(teachers[-1:], [found["begun"]]) > 1e-4  # so that a teacher that stays fails


def check_silence(found: dict[str, Any], expected: dict[str, Any]) -> None:
    "Three steps, of which the second had nothing to learn from, are the two others."
    if isinstance(found, str): pytest.fail(found)
    assert found["silent"] == [0, 1, 0] and found["losses"][1] == found["norms"][1] == 0
    first, second, third = found["reads"]
    assert first["student"] and not second and third["student"]  # nobody has read anything
    for what in ("weights", "teachers"):
        before, after = found[what][:2]
        assert all(torch.equal(after[name], weight) for name, weight in before.items()), what
        assert apart(found[what][2:], expected[what][1:]) < 1e-9, what
    before, after, then = found["moments"]
    assert before and all(map(torch.equal, before, after))
    torch.testing.assert_close(then, expected["moments"][1], atol=1e-9, rtol=0)


@cache
def without_silence(trained: str) -> dict[str, Any]:
    "The two steps that have a signal, alone."
    return run(trained, (SILENCE[0], SILENCE[2]), max_steps=2, shuffle_dataset=False)


@pytest.mark.parametrize("trained", TRAINED)
def test_a_batch_without_any_signal_moves_nothing(trained: str):
    expected = without_silence(trained)
    assert apart(expected["weights"][:1], expected["weights"][1:]) > 1e-3  # so that a step would be seen
    check_silence(run(trained, **QUIET), expected)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_batch_without_any_signal_moves_nothing_in_two_processes(how: str, together: dict[str, Any]):
    check_silence(together[f"{how}, silence"], without_silence("all weights"))


def test_slices_of_zero_3_learn_what_whole_weights_learn(tmp_path: Path):
    pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "sdpo-nb[deepspeed]"')
    all_found = in_two_processes(tmp_path, ZERO_3, is_zero=True)
    assert "slice the teacher as they do its student" in all_found.pop("parked")
    for name, found in all_found.items():
        if isinstance(found, str): pytest.fail(found)
        expected = run(ZERO_3[name][0], **ZERO_3[name][1] | cut_in(1), dtype=torch.float32)
        assert found["wrapper"] == "DeepSpeedEngine" and found["silent"] == expected["silent"]
        assert apart(found["teachers"], expected["teachers"]) < 1e-5
        assert apart(found["teachers"][-1:], [found["begun"]]) > 1e-4  # so that a teacher that stays fails
        for what in ("losses", "norms"): assert found[what] == pytest.approx(expected[what], rel=1e-4)
    first, second = all_found["silence"]["teachers"][:2]
    assert all_found["silence"]["behind"][0] == all_found["silence"]["behind"][1] and apart([first], [second]) == 0


def test_a_slice_without_a_signal_is_read_by_nobody():
    one = dict(questions=("mu re fo",), max_steps=1)
    found, whole_step = run("all weights", **one, **cut_in(8), share_prompts=False), run("all weights", **one)
    assert found["reads"] == [{"student": 2, "student's passes": 2, "teacher": 2, "teacher's passes": 2}]
    assert found["silent"] == [0] and apart(found["gradients"], whole_step["gradients"]) < 1e-9


ONE = dict(questions=("ba ki",), max_steps=1, dtype=torch.float32)
HOW: dict[str, tuple[dict[str, Any], dict[str, int]]] = {  # settings -> rows and passes of both, for seven attempts
    "as it comes": ({}, {"student": 1, "student's passes": 1, "teacher": 1, "teacher's passes": 1}),
    "equal attempts twice": (dict(merge_duplicates=False), {"student": 1, "student's passes": 1, "teacher": 1}),
    "each prompt again": (dict(share_prompts=False), {"student": 4, "teacher": 4, "teacher's passes": 1}),
    "a few tokens at once": (dict(tokens_per_pass=24), {"student's passes": 2, "teacher's passes": 2}),
    "a row at once": (dict(tokens_per_pass=1), {"student's passes": 4, "teacher's passes": 4}),
    "a row at once, each by itself": (dict(tokens_per_pass=1, share_prompts=False), {"student's passes": 4}),
    "two rows": (dict(share_prompts=False, distillation_micro_batch_size=2), {"teacher": 4, "teacher's passes": 2}),
    "one row": (dict(share_prompts=False, distillation_micro_batch_size=1), {"teacher": 4, "teacher's passes": 4}),
    "one row, prompts once": (dict(distillation_micro_batch_size=1), {"teacher": 4, "teacher's passes": 4}),
    "by logits": (dict(fused_loss=False), {"student": 4}),
}


@cache
def read_plainly() -> dict[str, Any]:
    "One step, in which the teacher reads every row whole."
    return run("all weights", merge_duplicates=False, share_prompts=False, **ONE)


@pytest.mark.parametrize("how", HOW)
def test_however_the_teacher_reads_it_says_the_same(how: str):
    settings, reads = HOW[how]
    found, plain = run("all weights", **settings, **ONE), read_plainly()
    assert reads.items() <= found["reads"][0].items()
    assert apart(found["gradients"], plain["gradients"]) < 1e-5 * plain["norms"][0]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-5)
