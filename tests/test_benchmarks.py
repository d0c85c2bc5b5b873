"""Each benchmark runs at its smallest size, and what it prints last has what the pages draw."""
import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
STAMP = {"commit", "python", "machine", "versions", "asked"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark's `main` in this process, and read what it prints last."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def of(name: str, *words: str) -> dict:
        import logging
        import warnings

        import torch
        import transformers

        threads = torch.get_num_threads()
        with warnings.catch_warnings():
            try: __import__(name).main([*words, "--threads", "1", "--json"])
            finally:
                logging.disable(logging.NOTSET)
                transformers.utils.logging.enable_progress_bar()
                torch.set_num_threads(threads)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    yield of
    for name in [name for name, module in sys.modules.items() if str(FOLDER) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def read_both_ways(result: dict, ratios: set[str]) -> None:
    """Every ratio is a number above zero, and says which way it reads."""
    assert result["ratios"].keys() == result["reads"].keys() == ratios
    assert all(ratio > 0 for ratio in result["ratios"].values())
    assert STAMP <= result.keys()


def test_everybody_takes_the_same_step(run):
    rows = ["--rows", "TRL=2", "ours=4", "loop=8", "--contestants", "TRL", "ours", "loop"]
    result = run("step", "--shapes", "toy", "--objectives", "full", *rows, "--large-steps", "1", "--seconds-only")
    read_both_ways(result, {"toy_step_vs_trl_full"})
    toy = result["shapes"]["toy, full"]
    first, *others = [losses[0] for losses in toy["losses"].values()]
    assert all(loss == pytest.approx(first, rel=1e-4) for loss in others)
    assert toy["phases"].keys() == {"TRL", "ours", "loop"}
    assert all(phases["teacher"] > 0 and phases["student"] > 0 for phases in toy["phases"].values())


def test_the_demo_is_replayed(run):
    result = run("step", "--shapes", "omega", "--steps", "2", "--seeds", "1")
    ratios = {"demo_step_vs_trl_omega", "demo_learning_vs_trl_omega", "demo_step_vs_loop"}
    read_both_ways(result, ratios)
    phases = result["shapes"]["omega"]["phases"]
    assert all(seconds["sample"] > 0 for seconds in phases.values())  # drawn, and replaced


def falls(over, by: str) -> None:
    """A contestant that takes a step, and then no more."""
    over({"loss": 1.0})
    if by == "a mistake": raise ValueError("no such row")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("by, error, said", [
    ("a mistake", RuntimeError, "(?s)one of them:.*no such row"),
    ("the kernel", MemoryError, "one of them is gone, with -9"),
])
def test_a_contestant_that_falls_stops_the_match_and_is_named(run, by, error, said):
    from contest import in_turns

    with pytest.raises(error, match=said): in_turns({"one of them": partial(falls, by=by)}, 1)


def test_memory_is_what_is_held_above_what_was_held_before(run):
    from contest import in_turns, ours, random_match
    from scripts import SHAPES

    objective = __import__("step").OBJECTIVES["full"]

    def weighed(shape) -> int:
        steps = in_turns({"ours": partial(ours, match=random_match(shape, 1, objective))}, 1, weighs=True)["ours"]
        return max(step["extra"] for step in steps)

    small, large = SHAPES["toy"], replace(SHAPES["toy"], prompt=512)
    assert weighed(small) < weighed(large) < 2**30


def test_slopes_stand_beside_what_there_is_to_compute(run):
    result = run("scaling", "--toy", "--steps", "1")
    read_both_ways(result, {"half_active_vs_full", "half_active_vs_full_spread"})
    of = {size: table["slopes"] for size, table in result["slopes"].items()}
    assert of.keys() == {"attempts at a task", "prompt", "attempt", "words", "tasks with a signal"}
    assert all(slopes["each beginning once"] <= slopes["row by row"] + 0.3 for slopes in of.values())
    assert of["tasks with a signal"]["each beginning once"] == pytest.approx(1, abs=0.05)


def test_runs_that_are_there_are_not_run_again(run, tmp_path):
    out = str(tmp_path / "runs.json")
    words = ["--who", "ours", "TRL SDPO", "--steps", "1", "--held-out", "8", "--out", out]
    first = run("time_to_accuracy", *words)
    assert [one["who"] for one in first["runs"]] == ["ours", "TRL SDPO"]
    assert all(len(one["curve"]) == len(one["times"]) == 2 for one in first["runs"])
    assert first["ratios"] == {}  # nobody has come to 90 % after one step
    assert run("time_to_accuracy", *words)["runs"] == first["runs"]
