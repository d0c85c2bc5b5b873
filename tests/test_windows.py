"""What Windows lacks is missed where it is used, not where it is imported: shown on a Linux that lacks the same.

Modules and functions are gone, and `sys.platform` says win32. What would differ there besides (line ends, code pages,
how a process is started) is seen by .github/workflows/test.yml alone.
"""
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DISGUISE = """
import asyncio, os, select, signal, sys  # asyncio looks for Windows' own modules, so it comes before
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios"): sys.modules[name] = None
for module, names in (
    (os, "fork forkpty geteuid getgid getloadavg getpgid getuid killpg memfd_create pidfd_open sched_getaffinity "
         "setgroups setresgid setresuid setsid sysconf"),
    (select, "epoll poll"), (signal, "SIGALRM SIGKILL SIGPIPE SIGXCPU SIGXFSZ alarm setitimer"),
):
    for name in names.split(): delattr(module, name)
sys.platform = "win32"
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a Linux is disguised")


def said_by(folder: Path, code: str, first: str = "") -> Any:
    """What a script leaves in `said`; it is disguised after its first imports, and its children from their start."""
    (folder / "sitecustomize.py").write_text(DISGUISE, encoding="utf-8")
    script = [first, DISGUISE, f"sys.path.insert(0, {str(folder)!r})", "import json", code, "print(json.dumps(said))"]
    command, env = [sys.executable, "-c", "\n".join(script)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_can_be_imported(tmp_path):
    others = "import anywidget, datasets, matplotlib.pyplot, peft, torch, transformers; from trl import GRPOTrainer"
    said = said_by(tmp_path, """
import importlib, pkgutil, sdpo_nb
said = {}
for module in pkgutil.walk_packages(sdpo_nb.__path__, "sdpo_nb."):
    try: importlib.import_module(module.name)
    except Exception as error: said[module.name] = repr(error)
for name in sdpo_nb.__all__: getattr(sdpo_nb, name)
""", others)
    assert said == {}


def test_judges_work_and_end_what_takes_too_long(tmp_path):
    said = said_by(tmp_path, r"""
from sdpo_nb import Maths, Numbers, Task
from sdpo_nb.experience.formats import Pattern
task, pattern = Task.ask("Half of 1?", answer="0.5"), Pattern("(a+)+", "Write a.", seconds=0.3)
said = [
    [Numbers()(task, answer).score for answer in ("1/2", "2")],
    [Maths()(task, answer).score for answer in (r"$\frac12$", "$2$")],
    Maths(seconds=0.5)(task, r"\boxed{9^{9^{9^9}}}").text,
    pattern(task, "a" * 60 + "b").text, pattern(task, "a").score,
]
""", "import torch")
    assert said == [[1, 0], [1, 0], "The answer could not be compared; simplify it.",
                    "The answer could not be compared in time. Write a.", 1]


def test_the_sandbox_is_refused_and_says_where_to_go(tmp_path):
    said = said_by(tmp_path, """
from sdpo_nb import CodeTests, Task, run_code
from sdpo_nb.experience.sandbox import Isolation, isolation, run_many
from sdpo_nb.experience.walls import call_filter
assert isolation() == Isolation() and call_filter("x86_64")
task, said = Task.ask("Double it.", tests=[{"input": "1", "output": "2"}]), []
for run in (lambda: run_code("1"), lambda: run_many(["1"]), lambda: CodeTests()(task, "```python\\nprint(2)\\n```")):
    try: run()
    except RuntimeError as error: said.append(str(error))
""")
    assert len(said) == 3 and all(one.endswith("run this in WSL2 or a container") for one in said)


def test_the_doctor_goes_on_without_what_windows_does_not_tell(tmp_path):
    said = said_by(tmp_path, """
from sdpo_nb.run.doctor import Machine, about_walls, without_walls
from sdpo_nb.run.facts import machine_facts, walls
machine = Machine({}, walls=walls(), **machine_facts())
said = [sorted(machine_facts()), about_walls(machine), [found.mend for found in without_walls(machine)]]
""")
    assert said == [["cores", "has_driver", "python", "system"], "none outside Linux",
                    ["judge programs in a container of Linux, on Windows in WSL2"]]
