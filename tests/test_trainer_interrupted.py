"""Stopped again and again, at any moment, a run ends with the weights of the run that never was."""
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import check_same, codebook_rows, codebook_trainer, everything, share_right
from sdpo_nb.learn.hosting import is_whole, last_whole_checkpoint

pytestmark = pytest.mark.slow
STOPS, STEPS = 10, 44
LEARN = dict(  # windows of four steps, epochs of eight
    per_device_train_batch_size=4, num_generations=4, steps_per_generation=2, num_iterations=2, max_steps=STEPS,
    save_strategy="steps", save_steps=1, save_total_limit=3, lr_scheduler_type="cosine", alpha=0.5, support="full",
    success_buffer=8, success_reward_threshold=0.4, demonstration_sources=["earlier", "siblings"],
    environment_feedback_only_without_solution=False,
)
CHILDREN = multiprocessing.get_context("forkserver")  # each is a process of its own, and imports nothing again


def train(folder: Path) -> None:
    "Go on from where the last whole checkpoint stood, to the end."
    torch.set_num_threads(1)
    trainer = codebook_trainer(folder, share_right, given=dict(train_dataset=codebook_rows(4)), **LEARN)
    trainer.train(resume_from_checkpoint=steps_of(folder) > 0)
    torch.save(everything(trainer), folder / "done.pt")


def steps_of(folder: Path) -> int:
    "How far the last whole checkpoint is."
    last = last_whole_checkpoint(folder)
    return int(last.rpartition("-")[2]) if last else 0


def stopped(folder: Path, how: int, is_time: Callable[[], bool] = lambda: False) -> bool:
    "Let a child go on until it is time, then send it a signal; whether that came before it was done."
    CHILDREN.set_forkserver_preload(["sdpo_nb.learn.trainer", "cells"])
    child = CHILDREN.Process(target=train, args=(folder,))
    child.start()
    while child.is_alive() and not is_time(): time.sleep(0.0005)
    if child.is_alive(): os.kill(child.pid, how)
    child.join()
    assert child.exitcode in (0, -how)
    return child.exitcode == -how


def finished(folder: Path) -> dict[str, Any]:
    "What a run has become that is left alone from here on."
    assert not (folder / "done.pt").exists()
    assert not stopped(folder, signal.SIGTERM)
    return torch.load(folder / "done.pt")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    "The run that nobody stops, in a process like the others."
    return finished(tmp_path_factory.mktemp("whole"))


def test_ten_stops_by_sigterm_change_nothing(uninterrupted: dict[str, Any], tmp_path: Path):
    chance = random.Random(time.time_ns())  # other moments each time: all have to be right
    for _ in range(STOPS):
        goal, rest, since = steps_of(tmp_path) + chance.randint(1, 3), chance.random() / 2, []

        def is_time() -> bool:
            if not since and steps_of(tmp_path) >= goal: since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > rest

        assert stopped(tmp_path, signal.SIGTERM, is_time)
    check_same(finished(tmp_path), uninterrupted)


def test_a_stop_before_the_first_checkpoint_begins_anew(uninterrupted: dict[str, Any], tmp_path: Path):
    since = time.monotonic()
    assert stopped(tmp_path, signal.SIGTERM, lambda: time.monotonic() - since > 0.5) and not steps_of(tmp_path)
    check_same(finished(tmp_path), uninterrupted)


def test_kills_in_the_middle_of_saving_change_nothing(uninterrupted: dict[str, Any], tmp_path: Path):
    for file in ("teacher.safetensors", "rollouts_0.pt", "model.safetensors", "optimizer.pt", "rng_state.pth"):
        is_cut = False
        while not is_cut:  # the save may be over before the kill arrives
            began, last = time.time(), steps_of(tmp_path)

            def is_written() -> bool:
                written = tmp_path / f"checkpoint-{steps_of(tmp_path) + 1}" / file
                return written.exists() and written.stat().st_mtime > began

            assert stopped(tmp_path, signal.SIGKILL, is_written)
            is_cut = is_written()
        assert not is_whole(tmp_path / f"checkpoint-{steps_of(tmp_path) + 1}") and steps_of(tmp_path) >= last
    check_same(finished(tmp_path), uninterrupted)
