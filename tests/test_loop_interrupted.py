"""Killed from outside, in the middle of a step, a run of the loop is taken up, and its reports are those of the run that never was."""
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

from sdpo_nb.core.demo import Codebook, load_demo
from sdpo_nb.core.records import StepReport
from sdpo_nb.experience.rollouts import Sampling
from sdpo_nb.learn.checkpoints import noted
from sdpo_nb.learn.loop import LoopConfig, fit
from sdpo_nb.learn.methods import SDPO

SIZE = LoopConfig(
    steps=5, tasks=2, attempts=2, learning_rate=6e-4, sampling=Sampling(max_new_tokens=20), train_tasks=16, held_out=4,
    evaluate_every=2, shown=1, save_every=2,
)


def train(folder: Path | None, dies_at: int = 0) -> list[StepReport]:
    "Train to the end, or until nobody is left to save anything."
    def listen(report: StepReport) -> None:
        if report.step == dies_at: os._exit(9)

    return fit(*load_demo(), Codebook("zeta"), SDPO(), config=SIZE, folder=folder, on_report=[listen] if dies_at else ())


def told(reports: list[StepReport]) -> list[tuple[str, str]]:
    "Reports as text, seconds aside."
    return [(repr(replace(one, seconds=0.0, phases={})), repr((one.readings, one.drawn))) for one in reports]


def test_killed_and_taken_up(tmp_path: Path) -> None:
    "The step that no checkpoint has is made again, and stands once."
    child = multiprocessing.get_context("spawn").Process(target=train, args=(tmp_path, 3))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert [report.step for report in noted(tmp_path)] == [0, 1, 2, 3]
    with open(tmp_path / "reports.jsonl", "a") as file: file.write('{"step": 4, "lo')  # a line that was being written
    straight = told(train(None))
    assert told(train(tmp_path)) == straight
    assert told(noted(tmp_path)) == straight
