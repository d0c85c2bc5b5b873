"""The scripts that people copy: each runs its demo in an empty folder, offline, and helps without importing torch."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cells import grpo_runs_on_a_cpu

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, folder: Path, *words: str) -> str:
    """What an example prints, in a folder of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, EXAMPLES / f"{name}.py", *words]
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shares(said: str) -> list[float]:
    """The percentages in a text."""
    return [float(share) / 100 for share in re.findall(r"([\d.]+)%", said)]


def imported(name: str) -> ModuleType:
    """An example as a module; nothing of it runs."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_basic_example_learns(tmp_path: Path):
    before, after = shares(run("basic", tmp_path, "--demo", "--steps", "20").splitlines()[-1])
    assert before < 0.05 and after > 0.4


def test_the_unsloth_example_says_whether_unsloth_is_there(tmp_path: Path):
    said = run("with_unsloth", tmp_path, "--demo", "--steps", "15")
    is_there = importlib.util.find_spec("unsloth") is not None
    assert said.startswith("Unsloth is not installed") != is_there
    before, after = shares(said.splitlines()[-1])
    assert before < 0.05 and after > 0.2


def test_the_feedback_example_learns_from_the_sandbox(tmp_path: Path):
    before, after = shares(run("rich_feedback", tmp_path, "--demo", "--steps", "15").splitlines()[-1])
    assert before < 0.05 and after > 0.1


@pytest.mark.skipif(not grpo_runs_on_a_cpu(), reason="TRL 1.15 computes GRPO's loss with Triton, on a GPU")
def test_the_comparison_prints_both_curves(tmp_path: Path):
    said = run("sdpo_vs_grpo", tmp_path, "--demo", "--steps", "12", "--looks", "2")
    curves = {line.split()[0]: shares(line) for line in said.splitlines() if line.startswith(("  SDPO", "  GRPO"))}
    assert len(curves["SDPO"]) == len(curves["GRPO"]) == 3 and max(curves["SDPO"][0], curves["GRPO"][0]) < 0.05
    assert curves["SDPO"][-1] > curves["GRPO"][-1] + 0.1
    assert all(name in (tmp_path / "compared.html").read_text(encoding="utf-8") for name in curves)


def test_the_search_finds_what_asking_again_does_not(tmp_path: Path):
    said = run("test_time", tmp_path, "--demo", "--budget", "64")
    assert "ask again: not solved in 64 attempts" in said
    for way in ("ask with what was said", "train on it"): assert f"{way}: solved by attempt" in said


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_help_is_instant_and_says_what_it_costs(path: Path):
    script = f"""
import runpy, sys
sys.argv = ["{path.name}", "--help"]
try: runpy.run_path({str(path)!r}, run_name="__main__")
finally: print(sorted({{"torch", "transformers", "datasets", "peft"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"
    assert "--demo" in done.stdout and f"python {path.name}" in done.stdout
    assert path.read_text(encoding="utf-8").count("\n") <= 110


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_no_steps_and_no_looks_are_refused_in_one_line(path: Path):
    for option in re.findall(r'"(--\w+)", type=count', path.read_text(encoding="utf-8")):
        done = subprocess.run([sys.executable, path, "--demo", option, "0"], text=True, capture_output=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1] == f"{path.name}: error: argument {option}: a whole number from 1, not '0'"


def test_an_mbpp_problem_becomes_tests_that_the_judge_reads():
    from sdpo_nb import CodeTests, TaskSet

    as_row = imported("rich_feedback").as_row
    asserts = ["assert similar((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)", "assert similar((1, 2),(5, 4)) == ()"]
    row = as_row({"prompt": "Write a function that finds the shared elements.", "test_list": asserts})
    assert [test["public"] for test in json.loads(row["tests"])] == [True, False] and asserts[1] not in row["prompt"]
    assert as_row({"prompt": "?", "test_list": ["assert set(similar((1,), (1,))) == set((1,))"]}) is None
    task, = TaskSet.from_rows([row], CodeTests()).tasks(1)
    right = "```python\ndef similar(a, b): return tuple(sorted(set(a) & set(b)))\n```"
    assert CodeTests()(task, right).score == 1 and "similar((3" not in CodeTests()(task, right.replace("&", "-")).text


def test_the_problem_of_the_search_has_a_solution():
    from sdpo_nb import CodeTests, TaskSet

    right = """```python
n, ways, d = int(input()), 1, 3
while n % 2 == 0: n //= 2
while d * d <= n:
    power = 1
    while n % d == 0: n, power = n // d, power + 1
    ways, d = ways * power, d + 2
print(ways * (2 if n > 1 else 1))
```"""
    judge = CodeTests()
    task, = TaskSet.from_rows([imported("test_time").PROBLEM], judge).tasks(1)
    assert judge(task, right).score == 1 and judge(task, right.replace("ways * (2", "ways * (1")).score == 0
