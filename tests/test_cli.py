"What a notebook cannot say of the command line: a real process, a real Ctrl-C, and how little help imports."

import json
import signal
import subprocess
import sys
from pathlib import Path

from cells import hear_ctrl_c

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


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'matplotlib', 'rich'}"
    script = f"import sys; from sdpo_nb.run.cli import main; main([]); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert "demo" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_a_mistake_costs_one_line_and_no_training(tmp_path: Path):
    done = subprocess.run([*COMMAND, "demo", "--feedback", "ful"], cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (2, "sdpo-nb demo: feedback is one of full, first, neg, not 'ful'\n")
    assert not list(tmp_path.iterdir())
