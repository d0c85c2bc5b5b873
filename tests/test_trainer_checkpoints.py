"""A stopped run goes on to the very numbers it would have reached; what is exported is the student alone."""
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from cells import check_same, codebook_rows, codebook_trainer, everything, grpo_runs_on_a_cpu, share_right
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sdpo_nb.core.demo import load_demo
from sdpo_nb.learn.trainer import SDPOTrainer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

TEACHERS = {
    "ema": dict(teacher_update_rate=0.2), "frozen": {}, "live": {}, "trust_region": {},
    "restart": dict(teacher_restart_period=5, teacher_update_every="step"),
}
TRAINED = ("all weights", "an adapter")
WINDOW = dict(  # four optimizer steps learn from the attempts at two questions; four questions make an epoch of eight
    per_device_train_batch_size=4, num_generations=4, steps_per_generation=2, num_iterations=2, max_steps=6,
    save_strategy="steps", save_steps=3, lr_scheduler_type="cosine", warmup_steps=2, alpha=0.5, support="full",
    success_buffer=8, success_reward_threshold=0.4, demonstration_choice="random",
    demonstration_sources=["earlier", "siblings"], environment_feedback_only_without_solution=False,
)
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def student(trained: str, name: str = "default", is_disturbed: bool = False) -> PreTrainedModel:
    "The demo, or an adapter with dropout on it; disturbed, so that all it knows must come from a checkpoint."
    model, _ = load_demo()
    torch.manual_seed(0)
    if trained == "an adapter":
        shape = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(model, shape, adapter_name=name)
    for weight in model.parameters():
        if is_disturbed and weight.requires_grad: torch.nn.init.normal_(weight, std=0.5)
    return model


def trainer_of(
    folder: Path, model: PreTrainedModel, host: Any = None, questions: int = 4, given: Any = (), **settings: Any
) -> Any:
    "A trainer whose checkpoints fall inside a window."
    given = dict(train_dataset=codebook_rows(questions)) | dict(given)
    return codebook_trainer(folder, share_right, model, host, given, **WINDOW | settings)


def run(folder: Path, trained: str = "all weights", resume: Any = None, **settings: Any) -> dict[str, Any]:
    "Train, from the start or from a checkpoint; all that has changed since, and all that was logged."
    trainer = trainer_of(folder, student(trained, is_disturbed=resume is not None), **settings)
    torch.manual_seed(1), random.seed(1)
    trainer.train(resume_from_checkpoint=resume)
    return everything(trainer)


def logits_of(model: PreTrainedModel) -> Tensor:
    "What a model expects of a text."
    with torch.no_grad(): return model.eval()(IDS).logits


def teachers_logits(trainer: SDPOTrainer) -> Tensor:
    "What its teacher expects of a text."
    (reading, _), = trainer.teacher.readings()
    with torch.no_grad(), reading() as reader: return reader(IDS).logits


def names_in(folder: Path) -> set[str]:
    "All files beneath a folder."
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@cache
def whole_run() -> tuple[Path, dict[str, Any]]:
    "Into the second epoch without a stop, saved at every step."
    folder = Path(mkdtemp(prefix="sdpo_whole_"))
    return folder, run(folder, max_steps=13, save_steps=1)


@pytest.fixture(scope="module", autouse=True)
def _swept():
    "Take the shared run's checkpoints away at the end."
    yield
    if whole_run.cache_info().currsize: shutil.rmtree(whole_run()[0])


# ---- stop and resume


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_run_stopped_inside_a_window_repeats_the_one_that_went_on(teacher: str, trained: str, tmp_path: Path):
    settings = TEACHERS[teacher] | dict(teacher=teacher, questions=2)
    expected = run(tmp_path / "whole", trained, **settings)
    stopped = tmp_path / "whole" / "checkpoint-3"  # of six steps; the same two questions are asked again at the fifth
    check_same(run(tmp_path / "again", trained, resume=str(stopped), **settings), expected)
    assert torch.load(stopped / "rollouts_0.pt")["rollouts"]
    assert json.loads((stopped / "memory.json").read_text())["tasks"]
    losses, rates = ([line[name] for line in expected["logged"]] for name in ("loss", "learning_rate"))
    assert len(losses) == 6 and min(losses) > 0 and len(set(rates)) > 4
    if teacher != "live": assert expected["gap"] > 0 and expected["teacher"]["weights"]


@pytest.mark.parametrize("stop", [3, 4, 8, 9])  # inside a window, at its end, at an epoch's end, in the second epoch
def test_wherever_it_stops(stop: int, tmp_path: Path):
    folder, expected = whole_run()
    check_same(run(tmp_path, resume=str(folder / f"checkpoint-{stop}"), max_steps=13, save_steps=1), expected)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two slices a step": ("all weights", dict(gradient_accumulation_steps=2, steps_per_generation=4)),
    "the teacher moves at each step": ("an adapter", dict(teacher_update_every="step")),
    "hybrid": ("all weights", dict(hybrid_lambda=0.5)),
    "a pull towards the base": ("an adapter", dict(kl_to_base=0.1)),
    "in the order of the data": ("all weights", dict(shuffle_dataset=False)),
    "without a memory": ("all weights", dict(success_buffer=0, demonstration_sources=["siblings"])),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_other_settings_too(variant: str, tmp_path: Path):
    if variant == "hybrid" and not grpo_runs_on_a_cpu(): pytest.skip("TRL 1.15 computes GRPO's loss with Triton, on a GPU")
    trained, settings = VARIANTS[variant]
    expected = run(tmp_path / "whole", trained, **settings)
    check_same(run(tmp_path / "again", trained, resume=str(tmp_path / "whole" / "checkpoint-3"), **settings), expected)


def test_a_run_at_its_end_makes_no_step_more(tmp_path: Path):
    folder, expected = whole_run()  # which ends inside its second epoch
    with pytest.warns(UserWarning, match="checkpoint-13 is at its end"):
        found = run(tmp_path, resume=str(folder / "checkpoint-13"), max_steps=13, save_steps=1)
    check_same(found | {"luck": None}, expected | {"luck": None})  # nobody draws


def test_to_save_is_to_change_nothing(tmp_path: Path):
    check_same(run(tmp_path, max_steps=13, save_strategy="no"), whole_run()[1])


# ---- what a checkpoint must hold


def test_a_checkpoint_without_its_teacher_says_which_setting_allows_a_new_one(tmp_path: Path):
    shutil.copytree(whole_run()[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "teacher.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="teacher.safetensors is not there.*missing_teacher"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    afresh = trainer_of(tmp_path, student("all weights"), missing_teacher="afresh", teacher="frozen")
    afresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert afresh.state.global_step == 6
    check_same(teachers_logits(afresh), logits_of(load_demo()[0]))  # it begins as the student was given


@pytest.mark.skipif(not grpo_runs_on_a_cpu(), reason="TRL 1.15 computes GRPO's own loss with Triton, on a GPU")
def test_a_run_of_grpo_goes_on_as_sdpo_with_a_new_teacher(tmp_path: Path):
    trainer_of(tmp_path, student("all weights"), enabled=False, max_steps=3).train()
    stopped = tmp_path / "checkpoint-3"
    with pytest.raises(FileNotFoundError, match="missing_teacher"): run(tmp_path, resume=str(stopped))
    found = run(tmp_path / "again", resume=str(stopped), missing_teacher="afresh")
    assert found["steps"] == found["step"] == 6  # its windows are those of the data
    assert [line["sdpo/silent_steps"] for line in found["logged"][3:]] == [0.0] * 3


def test_only_the_model_is_saved_when_that_is_asked_for(tmp_path: Path):
    run(tmp_path, max_steps=3, save_only_model=True)
    kept, left = names_in(tmp_path / "checkpoint-3"), {"teacher.safetensors", "rollouts_0.pt", "memory.json"}
    assert "model.safetensors" in kept and not kept & left
    with pytest.raises(FileNotFoundError, match="missing_teacher"): run(tmp_path, resume=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("setting, value", dict(steps_per_generation=4, num_iterations=1, success_buffer=4).items())
def test_a_run_does_not_go_on_as_another_run(setting: str, value: int, tmp_path: Path):
    stopped, was = whole_run()[0] / "checkpoint-3", WINDOW[setting]
    with pytest.raises(ValueError, match=f"{setting} was {was} and is {value}"):
        run(tmp_path, resume=str(stopped), **{setting: value})


def in_two(rank: int, folder: str, port: int, alone: str) -> None:
    "One of two processes: what one process wrote is refused; what two wrote goes on as if they had not stopped."
    here = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in here.items()}, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    both = dict(ddp_backend="gloo", per_device_train_batch_size=2)
    with pytest.raises((ValueError, FileNotFoundError), match="processes"):
        run(Path(folder) / "refused", resume=alone, **both | dict(per_device_train_batch_size=4))
    AcceleratorState._reset_state()
    expected = run(Path(folder) / "two", **both)
    assert (Path(folder) / "two" / "checkpoint-3" / "rollouts_1.pt").exists()
    AcceleratorState._reset_state()
    found = run(Path(folder) / "again", resume=f"{folder}/two/checkpoint-3", **both)
    check_same(found, expected)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not grpo_runs_on_a_cpu(), reason="Transformers 5.17 loads an optimizer to cpu:0, which torch does not know")
def test_two_processes_take_up_what_two_wrote_and_nothing_else(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["sdpo_nb.learn.trainer"])  # it takes its time
    alone = str(whole_run()[0] / "checkpoint-3")
    torch.multiprocessing.start_processes(in_two, (str(tmp_path), port, alone), nprocs=2, start_method="forkserver")
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        run(tmp_path / "one", resume=str(tmp_path / "two" / "checkpoint-3"), per_device_train_batch_size=2)


# ---- the last whole checkpoint


class When(TrainerCallback):
    "Does something at one of a run's moments."

    def __init__(self, moment: str, then: Any):
        setattr(self, moment, lambda args, state, control, **others: then(state, control))


class Killed(BaseException):
    "The process is gone."


def cut(before: str) -> type[SDPOTrainer]:
    "A trainer that is killed while it saves its fifth step: before the student, before its luck, inside the last file."
    class Cut(SDPOTrainer):
        def die(self, moment: str) -> None:
            if moment == before and self.state.global_step == 5: raise Killed

        def _save(self, *args: Any, **kwargs: Any) -> None:
            self.die("the student")
            super()._save(*args, **kwargs)

        def _save_rng_state(self, folder: str) -> None:
            self.die("its luck")
            super()._save_rng_state(folder)
            if before == "the end": self.state.save_to_json = self.write_half

        def write_half(self, path: str) -> None:
            TrainerState.save_to_json(self.state, path)
            if self.state.global_step == 5: Path(path).write_text(Path(path).read_text()[:1000])
            self.die("the end")

    return Cut


@pytest.mark.parametrize("before", ["the student", "its luck", "the end"])
@pytest.mark.parametrize("earlier", ["", "checkpoint-5"])  # what an earlier run may have left here
def test_a_checkpoint_that_was_cut_short_is_passed_over(before: str, earlier: str, tmp_path: Path):
    long = dict(max_steps=13, save_steps=1)
    for name in {"checkpoint-3", earlier} - {""}: shutil.copytree(whole_run()[0] / name, tmp_path / name)
    with pytest.raises(Killed): run(tmp_path, resume=str(tmp_path / "checkpoint-3"), host=cut(before), **long)
    assert (tmp_path / "checkpoint-5" / "teacher.safetensors").exists()
    again, begun = trainer_of(tmp_path, student("all weights", is_disturbed=True), **long), []
    again.add_callback(When("on_train_begin", lambda state, control: begun.append(state.global_step)))
    stop = lambda state, control: setattr(control, "should_training_stop", state.global_step == 6)
    again.add_callback(When("on_step_end", stop))
    again.train(resume_from_checkpoint=True)
    assert begun == [4]
    for name in ("model.safetensors", "teacher.safetensors"):
        check_same(*(load_file(folder / "checkpoint-6" / name) for folder in (tmp_path, whole_run()[0])))


def test_with_no_whole_checkpoint_there_is_nothing_to_resume(tmp_path: Path):
    with pytest.raises(Killed): run(tmp_path, host=cut("its luck"), save_steps=5)
    with pytest.raises(ValueError, match="was written to its end"): run(tmp_path, resume=True)


def test_a_folder_with_a_name_instead_of_a_number_is_no_checkpoint(tmp_path: Path):
    run(tmp_path, max_steps=3)
    os.rename(tmp_path / "checkpoint-3", tmp_path / "checkpoint-best")
    with pytest.raises(ValueError, match="was written to its end"): run(tmp_path, resume=True)


def test_a_last_save_that_was_asked_for_by_sigterm_waits_for_the_end_of_the_step(tmp_path: Path):
    def told(*args: Any, **columns: Any) -> list[Any]:  # the signal comes while the fifth step's attempts are judged
        if columns["trainer_state"].global_step == 4: os.kill(os.getpid(), signal.SIGTERM)
        return share_right(*args, **columns)

    told.__name__ = share_right.__name__
    settings = WINDOW | dict(max_steps=13, save_steps=100, enable_jit_checkpoint=True)
    given = dict(train_dataset=codebook_rows(4))
    stopped = codebook_trainer(tmp_path, told, student("all weights"), given=given, **settings)
    waits, = (one.jit_manager for one in stopped.callback_handler.callbacks if isinstance(one, JITCheckpointCallback))
    waits.kill_wait = 0.01  # seconds; else three, for which a platform may change its mind
    torch.manual_seed(1), random.seed(1)
    stopped.train()
    assert stopped.state.global_step < 13
    check_same(run(tmp_path, resume=True, max_steps=13, save_steps=100), whole_run()[1])


def test_old_checkpoints_go_with_all_that_is_in_them(tmp_path: Path):
    run(tmp_path, max_steps=6, save_steps=1, save_total_limit=2)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}
    for kept in tmp_path.glob("checkpoint-*"):
        assert {"teacher.safetensors", "rollouts_0.pt", "memory.json", "trainer_state.json"} <= names_in(kept)


# ---- exports


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    "The files that would have gone to the Hub, commit by commit; only what asks the network is replaced."
    found = []

    def upload_folder(api: HfApi, folder_path: str, ignore_patterns: Sequence[str] = (), **others: Any) -> Future[None]:
        found.append(set(filter_repo_objects(names_in(Path(folder_path)), ignore_patterns=list(ignore_patterns))))
        (done := Future()).set_result(None)
        return done

    repo = RepoUrl("https://huggingface.co/somebody/run")
    monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **others: repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return found


def check_alone(names: set[str], trained: str) -> None:
    "Refuse files beside the student's."
    weights = "model.safetensors" if trained == "all weights" else "adapter_model.safetensors"
    assert weights in names
    assert not {name for name in names if "teacher" in name or "rollouts" in name or "memory" in name}


@pytest.mark.parametrize("trained", TRAINED)
def test_what_is_exported_is_the_student_alone(trained: str, tmp_path: Path, uploaded: list[set[str]]):
    trainer = trainer_of(tmp_path / "run", student(trained), max_steps=3, push_to_hub=True, hub_strategy="every_save")
    trainer.train()
    expected, told, apart = logits_of(trainer.model), teachers_logits(trainer), trainer.teacher.gap()
    assert apart > 0 and (expected - told).abs().max() > 1e-3
    trainer.save_model(str(tmp_path / "saved"), _internal_call=True)
    trainer.push_to_hub()
    assert len(uploaded) == 2  # at its only checkpoint, and now
    for names in (names_in(tmp_path / "saved"), *uploaded): check_alone(names, trained)
    file, = (tmp_path / "saved").glob("*model.safetensors")
    own = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert len(load_file(file)) == len(own)
    if trained == "all weights": again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    else: again = PeftModel.from_pretrained(load_demo()[0], tmp_path / "saved")
    check_same(logits_of(again), expected)
    check_same(teachers_logits(trainer), told)  # it is at work still
    trainer.teacher.update("rollout")
    assert 0 < trainer.teacher.gap() < apart


def test_a_merged_student_knows_nothing_of_its_teacher(tmp_path: Path):
    trainer = trainer_of(tmp_path / "run", student("an adapter"), max_steps=3)
    trainer.train()
    expected = logits_of(trainer.model)
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.state_dict().keys() == load_demo()[0].state_dict().keys()
    torch.testing.assert_close(logits_of(again), expected, atol=1e-4, rtol=0)
    assert (logits_of(load_demo()[0]) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("trained, name", [("all weights", ""), ("an adapter", "default"), ("an adapter", "student")])
def test_the_best_student_comes_back_and_the_teacher_stays(trained: str, name: str, tmp_path: Path):
    settings = dict(
        max_steps=4, save_steps=2, save_total_limit=1, eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=4, load_best_model_at_end=True, metric_for_best_model="eval_num_tokens",
        greater_is_better=False,  # the first is the best
    )
    given = dict(eval_dataset=codebook_rows(2))
    trainer = trainer_of(tmp_path, student(trained, name), given=given, **settings)
    kept = []
    keep = lambda state, control: kept.append((logits_of(trainer.model), teachers_logits(trainer)))
    trainer.add_callback(When("on_save", keep))
    trainer.train()
    (best, _), (last, taught) = kept
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2") and (best - last).abs().max() > 1e-3
    check_same(logits_of(trainer.model), best)
    check_same(teachers_logits(trainer), taught)
    assert (tmp_path / "checkpoint-2" / "teacher.safetensors").exists()
