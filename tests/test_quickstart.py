"""The quickstart as a newcomer runs it: every cell as it stands, in an empty folder; and again, when it was stopped.

`make test-colab` runs it with the packages of Google Colab. Two things are stood in for: Colab's own package, and pip.
"""
import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_colab import COLAB, IS_COLAB, kernel, tell

Run = Callable[[str], list[dict]]

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "tutorials" / "01_quickstart.ipynb"
CELLS = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
STAND_INS = {
    "google/colab/__init__.py": "",
    "google/colab/output.py": COLAB,
    "google/colab/drive.py": "mounted = []\nmount = mounted.append\n",
    "pip/__init__.py": "",
    "pip/__main__.py": "import json, sys\nwith open('pip.jsonl', 'a') as f: print(json.dumps(sys.argv[1:]), file=f)",
}
ON_COLAB = "import google.colab"
TRAIN = "trainer = train_on(shop, run_name)"
STOP = """
from transformers import TrainerCallback

class Stop(TrainerCallback):
    def on_step_end(self, *args, **kwargs): raise KeyboardInterrupt

unstopped = SDPOTrainer
def SDPOTrainer(*parts, callbacks, **named): return unstopped(*parts, callbacks=[*callbacks, Stop()], **named)
"""
PIP = """
import sys
from IPython import get_ipython

pip, can_install = get_ipython().find_line_magic("pip"), True
sys.modules["sdpo_nb"] = None

def install(line):
    pip(line)
    if can_install: del sys.modules["sdpo_nb"]

get_ipython().register_magic_function(install, magic_name="pip")
"""
CLOCKS = "time", "per_second", "memory"
LAST = Path("quickstart", "orders", "random_qwen3", "checkpoint-2")


def parts() -> list[list[str]]:
    """The code cells above the first numbered heading, and those beneath each."""
    found: list[list[str]] = [[]]
    for cell in CELLS:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code": found[-1].append(text)
        elif re.search(r"^## \d", text, re.M): found.append([])
    return found


CODE = [cell for part in parts() for cell in part]


def form(title: str) -> str:
    """The cell that Colab shows as a form of this title."""
    return next(cell for cell in CODE if cell.startswith(f"#@title {title}"))


def filled(cell: str, name: str, value: object) -> str:
    """A form with something in its field."""
    found, count = re.subn(rf"(?m)^{name} = .*?(?=  #@param)", f"{name} = {value!r}", cell)
    assert count == 1, name
    return found


def printed(said: list[dict], name: str = "stdout") -> str:
    """What a cell wrote."""
    streams = [one["content"] for one in said if one["msg_type"] == "stream"]
    return "".join(one["text"] for one in streams if one["name"] == name)


def kept(said: list[dict]) -> str:
    """The HTML that a cell has put in the place of what it showed at first."""
    news = [one["content"]["data"] for one in said if one["msg_type"] == "update_display_data"]
    return "".join(one["text/html"] for one in news)


def numbers(checkpoint: Path) -> list[dict]:
    """All that a run had logged, save what a clock or the memory said."""
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in line.items() if not any(clock in name for clock in CLOCKS)} for line in log]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with what is stood in for."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# All of it, from an empty folder

@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An empty folder."""
    return tmp_path_factory.mktemp("newcomer")


@pytest.fixture(scope="module")
def first(place, stand_ins) -> Iterator[tuple[Run, list[list[dict]]]]:
    """A kernel that has run every cell, and what each said; Colab's own where there are its packages."""
    with kernel(place, stand_ins) as run:
        if IS_COLAB: run(ON_COLAB)
        yield run, [run(cell) for cell in CODE]


def test_the_small_model_learned(first):
    run, said = first
    before, after = tell(run, "[reports[0].held_out, reports[-1].held_out]")
    assert before < 0.05 and after > 0.9
    assert any(f"{before:.0%} before, {after:.0%} after 2,560 attempts" in printed(one) for one in said)


def test_both_runs_leave_their_pictures(first):
    small, real = filter(None, map(kept, first[1]))
    assert [f'data-step="{step}"' in small for step in (0, 40, 41)] == [True, True, False] and "step 40 of 40" in small
    assert [f'data-step="{step}"' in real for step in (0, 2, 3)] == [True, True, False] and "step 2 of 2" in real


def test_nothing_is_said_that_was_not_asked_for(first):
    assert [printed(cell, "stderr") for cell in first[1] if printed(cell, "stderr")] == []


def test_the_real_run_is_one_of_four_bits_with_an_adapter(first, place):
    run, _ = first
    layer = "trainer.model.get_base_model().model.layers[0].mlp.up_proj"
    assert tell(run, f"[type({layer}).__name__, trainer.model.config.model_type]") == ["Linear4bit", "qwen3"]
    assert tell(run, "[trainer.state.global_step, trainer.teacher.updates, trainer.teacher.gap() > 0]") == [2, 2, True]
    assert [sum(line.get(name, 0) > 0 for line in numbers(place / LAST)) for name in ("loss", "grad_norm")] == [2, 2]
    assert sorted(path.name for path in (place / LAST).parent.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(first, place, stand_ins):
    again, whole = place / LAST, place / "whole"
    shutil.move(again, whole)  # as if it had been stopped before
    above, _, real, _ = parts()
    with kernel(place, stand_ins) as run:
        if IS_COLAB: run(ON_COLAB)
        said = [run(cell) for cell in above + real]
        assert numbers(again) == numbers(whole) and len(numbers(again)) == 5
        for name in "adapter_model.safetensors", "teacher.safetensors":
            assert (again / name).read_bytes() == (whole / name).read_bytes(), name
        trained = first[1][CODE.index(TRAIN)], said[(above + real).index(TRAIN)]
        begun, went_on = (printed(one).splitlines() for one in trained)
        assert begun[0] == f"begins anew: no checkpoint in {LAST.parent}"
        assert went_on[0] == f"goes on from {LAST.with_name('checkpoint-1')}"
        assert begun[1:] == went_on[1:] == [f"step {step}: 0% of held-out questions right" for step in range(3)]


def test_a_run_that_was_interrupted_before_its_first_checkpoint_begins_anew(first, place):
    run, again = first[0], LAST.parts[2:]
    run("run_name = 'again'")
    run(STOP)
    with pytest.raises(AssertionError, match="KeyboardInterrupt"): run(TRAIN)
    run("SDPOTrainer = unstopped")
    assert printed(run(TRAIN)).startswith("begins anew: no checkpoint in quickstart/again/")
    assert numbers(place.joinpath("quickstart", "again", *again)) == numbers(place / LAST)
    assert tell(run, "[*trainer.model.peft_config]") == ["default", "teacher"]
    run("run_name = 'orders'")


def test_the_small_model_begins_anew_when_its_cell_runs_again(first):
    run, cell = first[0], parts()[1][1]
    assert "steps=40" in cell and tell(run, "reports[-1].held_out") > 0.9
    run("learned = reports")
    run(cell.replace("steps=40", "steps=1"))
    assert tell(run, "reports[0].held_out == learned[0].held_out")
    run("reports = learned")


def test_your_own_task_is_trained_when_its_field_is_ticked(first, place):
    run, _ = first
    said = printed(run(filled(form("Train on your task"), "train_mine", True)))
    assert said.startswith("begins anew: no checkpoint in quickstart/bins/") and "step 2: " in said
    assert tell(run, "[my_trainer.state.global_step, my_trainer.teacher.updates]") == [2, 2]
    assert place.joinpath("quickstart", "bins", *LAST.parts[2:]).is_dir()


def test_the_mixture_that_the_page_names_trains(first):
    run, _ = first
    [call] = re.findall(r"`(train_on\(.*?\))`", "\n".join("".join(cell["source"]) for cell in CELLS))
    run(f"mixed = {call}")
    assert tell(run, "[mixed.state.global_step, mixed.args.is_hybrid]") == [2, True]


# Colab

def test_the_badge_opens_this_page():
    text = "\n".join("".join(cell["source"]) for cell in CELLS)
    [link] = re.findall(r"\[!\[Open in Colab\]\(\S+\)\]\((\S+)\)", text)
    page = link.removeprefix("https://colab.research.google.com/github/sdpo-nb/sdpo-nb/blob/main/")
    assert page != link and ROOT / page == PAGE


@pytest.fixture
def bare(tmp_path, stand_ins) -> Iterator[Run]:
    """A kernel on Colab, in which the package cannot be imported."""
    with kernel(tmp_path, stand_ins) as run:
        run(ON_COLAB)
        run(PIP)
        yield run


def asked_of_pip(folder: Path) -> list[list[str]]:
    """What pip was called with."""
    log = folder / "pip.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_it_installs_the_release_or_what_the_form_names(bare, tmp_path):
    for reference in "", "main":
        bare(filled(form("Install"), "git_reference", reference))
        bare("sys.modules['sdpo_nb'] = None")
    asked = asked_of_pip(tmp_path)
    assert [call[:-1] for call in asked] == [["install", "-q"]] * 2
    release, branch = (Requirement(call[-1]) for call in asked)
    assert (release.name, release.url, str(release.specifier)) == ("sdpo-nb", None, "")
    assert (branch.name, branch.url) == ("sdpo-nb", "git+https://github.com/sdpo-nb/sdpo-nb@main")
    assert release.extras == branch.extras == {"quant", "json"}


def test_it_installs_newer_data_sets_than_colab_has():
    needed = {one.name: one.specifier for one in map(Requirement, requires("sdpo-nb"))}
    assert "4.0.0" not in needed["datasets"]
    trl = {one.name: one.specifier for one in map(Requirement, requires("trl"))}
    if "1.15.0" not in needed["trl"] or "pyarrow" in trl: assert "18.1.0" not in trl["pyarrow"]


def test_it_asks_for_a_restart_where_what_it_raised_was_in_use(bare, tmp_path):
    bare("from types import SimpleNamespace; sys.modules['pyarrow'] = SimpleNamespace(__version__='18.1.0')")
    with pytest.raises(AssertionError, match="was in use: choose Runtime, Restart session, and then Run all"):
        bare(form("Install"))
    bare("sys.modules['sdpo_nb'] = None")
    bare("from importlib.metadata import version; sys.modules['pyarrow'].__version__ = version('pyarrow')")
    bare(form("Install"))
    assert len(asked_of_pip(tmp_path)) == 2


def test_it_says_so_where_pip_fails(bare):
    bare("can_install = False")
    with pytest.raises(AssertionError, match="Where it found no release, set git_reference to main"):
        bare(form("Install"))


def test_it_installs_nothing_where_the_package_is(tmp_path, stand_ins):
    with kernel(tmp_path, stand_ins) as run:
        for place in "at home", "on Colab":
            if place == "on Colab": run(ON_COLAB)
            run(filled(form("Install"), "git_reference", "main"))
    assert asked_of_pip(tmp_path) == []


def test_it_goes_to_drive_on_colab_alone_and_when_asked(tmp_path, stand_ins):
    asked, not_asked = (filled(form("Where"), "on_drive", value) for value in (True, False))
    mounted = "__import__('google.colab.drive').colab.drive.mounted"
    with kernel(tmp_path, stand_ins) as run:
        run("import sys")
        run(asked)
        assert tell(run, "folder") == "quickstart"
        run(ON_COLAB)
        run(not_asked)
        assert tell(run, f"[folder, {mounted}]") == ["quickstart", []]
        run(asked)
        assert tell(run, f"[folder, {mounted}]") == ["/content/drive/MyDrive/sdpo_quickstart", ["/content/drive"]]


# The page

def test_the_page_keeps_the_pictures():
    data = [output.get("data", {}) for cell in CELLS for output in cell.get("outputs", ())]
    pictures = ["".join(one.get("text/html", "")) for one in data]
    for last in 40, 2: assert sum(f'data-step="{last}"' in html for html in pictures) == 1
    assert "jupyter.widget-" not in PAGE.read_text(encoding="utf-8"), "a widget says nothing without its kernel"
