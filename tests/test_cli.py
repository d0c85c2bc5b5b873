"What a notebook cannot say of the command line: a real process, a real Ctrl-C, and how little help imports."

import configparser
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cells import hear_ctrl_c
from sdpo_nb.run.doctor import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-c", "import sys; from sdpo_nb.run.cli import main; sys.exit(main())"]


def test_ctrl_c_ends_cleanly_and_keeps_the_report_so_far(tmp_path: Path):
    process = subprocess.Popen(
        [*COMMAND, "demo", "--steps", "500", "--json"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c,
    )
    for line in process.stderr:  # progress; step 50 is the first tenth
        if "step 50/" in line: break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    result = json.loads(out.splitlines()[-1])
    assert process.returncode == 130
    assert "Traceback" not in err and "Interrupted" in err
    assert 50 * 64 <= result["attempts"] < 500 * 64 and not result["is_complete"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Interrupted: this is the run so far." in page


def test_ctrl_c_before_the_first_step_leaves_an_older_report_alone(tmp_path: Path):
    older = tmp_path / "report.html"
    older.write_text("an older report", encoding="utf-8")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([*COMMAND, "demo", "--json"], cwd=tmp_path, text=True, preexec_fn=hear_ctrl_c, **pipes)
    process.stderr.readline()  # the title; the held-out tasks are being tried now
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "no report was written" in err and "Traceback" not in err
    assert older.read_text(encoding="utf-8") == "an older report"


def test_two_methods_are_compared_after_equally_many_attempts(tmp_path: Path):
    words = [*COMMAND, "demo", "--steps", "3", "--compare", "--json"]
    done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, check=True)
    result = json.loads(done.stdout)
    assert result["attempts"] == result["compared"]["GRPO"]["attempts"] == 3 * 64
    assert "GRPO" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["train"], 2), (["demo", "--method", "ppo"], 2), (["demo", "--out", "."], 2)])
def test_help_and_mistyped_words_wait_for_nothing_heavy(words: list[str], code: int):
    heavy = "{'torch', 'transformers', 'matplotlib', 'rich'}"
    script = f"""import sys
from sdpo_nb.run.cli import main
try: main({words})
except SystemExit as stop: print(stop.code, sorted({heavy} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} []" and done.stderr.count("\n") == (code == 2)


def test_a_mistake_costs_one_line_and_no_training(tmp_path: Path):
    done = subprocess.run([*COMMAND, "demo", "--feedback", "ful"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("sdpo-nb demo: --feedback: invalid choice: 'ful' (choose from ")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux has a folder in which nobody can write, root neither")
def test_a_report_that_cannot_be_written_is_refused_before_training(tmp_path: Path):
    done = subprocess.run([*COMMAND, "demo", "--out", "/proc/report.html"], cwd=tmp_path, text=True, capture_output=True)
    wanted = (2, "", "sdpo-nb demo: /proc/report.html cannot be written; choose another --out\n")
    assert (done.returncode, done.stdout, done.stderr) == wanted


def doctor(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    """The doctor in a process of its own, which finds packages in this folder first."""
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"} | env
    return subprocess.run([*COMMAND, "doctor", *words], cwd=folder, env=env, text=True, capture_output=True)


def break_package(folder: Path, name: str, body: str) -> None:
    """A package that is installed, and cannot be imported."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(body)
    (folder / f"{name}-9.9.dist-info").mkdir()
    (folder / f"{name}-9.9.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")


def test_the_doctor_finds_nothing_broken_here_and_names_no_folder(tmp_path: Path):
    done = doctor(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\nNothing is broken.\n")
    assert max(map(len, done.stdout.splitlines())) <= 80
    machine = json.loads(doctor(tmp_path, "--json").stdout)["machine"]
    assert machine["versions"]["torch"] in done.stdout and machine["place"] == "terminal"
    for private in (Path.home(), ROOT, sys.prefix, tmp_path): assert str(private) not in done.stdout + str(machine)


def test_a_broken_torch_is_a_finding_without_a_traceback(tmp_path: Path):
    break_package(tmp_path, "torch", f"raise OSError('{tmp_path}/lib/libcudart.so.13: cannot open shared object file')")
    done = doctor(tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    assert "broken      torch 9.9 cannot be imported. libcudart.so.13: cannot open" in done.stdout
    assert str(tmp_path) not in done.stdout and done.stdout.endswith("\n1 thing is broken.\n")
    assert json.loads(doctor(tmp_path, "--json").stdout)["findings"][0]["mend"] == "pip install --force-reinstall torch"


def test_the_doctor_speaks_where_rich_is_broken(tmp_path: Path):
    break_package(tmp_path, "rich", "raise ImportError('gone')")
    done = doctor(tmp_path)
    assert done.stdout.startswith("sdpo-nb ") and done.stderr == ""


def test_the_doctor_imports_torch_and_nothing_else_that_is_slow():
    heavy = "{'transformers', 'trl', 'peft', 'datasets', 'matplotlib', 'anywidget'}"
    heard = f"main(['doctor']); print(sorted({heavy} & set(sys.modules)))"
    script = f"import sys; from sdpo_nb.run.cli import main; {heard}"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_doctor_knows_every_extra():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    lines = dict(line.split(": ") for line in settings["DEFAULT"]["extras"].strip().splitlines())
    assert set(EXTRAS) == set(lines) - {"dev", "browser"}  # those are for working on it
    for extra, (package, _) in EXTRAS.items(): assert package in lines[extra]
