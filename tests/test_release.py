"""What is published, and how: wheel and sdist, workflows, the papers beside them; and that nothing unpickles."""
import ast
import functools
import json
import pickle
import re
import shlex
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import sdpo_nb
from tools import release_check
from tools.release_check import Wrong
from tools.sync_settings import LICENSES, lines, read_settings

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = read_settings(ROOT)
WORKFLOWS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
FORMS = [path for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
UNIX = {"fcntl", "resource", "grp", "pwd", "termios", "pty"}  # modules that Windows has not
LEFT_OUT = {  # tests of the pure parts' families that stay on Linux, and why
    "test_experience_walls.py": "the sandbox is made of Linux's namespaces, Landlock and seccomp",
    "test_experience_sandbox.py": "the same",
    "test_experience_coding.py": "runs programs in the sandbox",
    "test_experience_maths.py": "ends processes that take too long, tried on Linux and on one disguised as Windows",
    "test_experience_formats.py": "matches patterns in such processes",
    "test_experience_judging.py": "servers that break off connections, each system in its own way",
}


# -- what is built


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, Path]:
    """The sdist, the wheel that comes of it, and the wheel that comes of the tree."""
    return release_check.build(tmp_path_factory.mktemp("built"))


def changed(archive: Path, folder: Path, files: dict[str, str | None]) -> Path:
    """A copy of a wheel in which some files say something else, or are gone."""
    copy = folder / archive.name
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(copy, "w") as new:
        bodies = {name: old.read(name) for name in old.namelist()} | files
        for name, body in bodies.items():
            if body is not None: new.writestr(name, body)
    return copy


def test_sdist_and_wheel_are_fit_for_release(built):
    sdist, wheel, straight = built
    assert release_check.look_at_metadata(wheel, sdist).startswith(f"sdpo-nb {SETTINGS['version']}")
    for look, archive in (("wheel", wheel), ("sdist", sdist)): getattr(release_check, f"look_into_{look}")(archive)
    assert release_check.compare(wheel, straight).endswith("the same contents")
    release_check.look_at_readme(wheel)


@pytest.mark.parametrize("files, look, said", [
    ({"sdpo_nb/py.typed": None}, release_check.look_into_wheel, r"missing: \['sdpo_nb/py.typed'\]"),
    ({"sdpo_nb/data/memory.pkl": ""}, release_check.look_into_wheel, r"too much: \['sdpo_nb/data/memory.pkl'\]"),
    ({"tests/test_it.py": ""}, release_check.look_into_wheel, "something stands beside the package"),
    ({f"sdpo_nb-{SETTINGS['version']}.dist-info/licenses/LICENSE": "mine"}, release_check.look_into_wheel, "another"),
])
def test_a_wheel_that_is_not_is_refused(built, tmp_path, files, look, said):
    with pytest.raises(Wrong, match=said): look(changed(built[1], tmp_path, files))


def test_metadata_and_readme_of_somebody_else_are_refused(built, tmp_path):
    sdist, wheel, _ = built
    name = f"sdpo_nb-{SETTINGS['version']}.dist-info/METADATA"
    own = release_check.contents(wheel)[name].decode()
    beside = own + "\n[a page](nbs/index.ipynb)\n"
    with pytest.raises(Wrong, match="different things"):
        release_check.look_at_metadata(changed(wheel, tmp_path, {name: own.replace("Version: ", "Version: 9")}), sdist)
    with pytest.raises(Wrong, match=r"lead nowhere from PyPI: \['nbs/index.ipynb'\]"):
        release_check.look_at_readme(changed(wheel, tmp_path, {name: beside}))
    with pytest.raises(Wrong, match=r"differ: \['sdpo_nb/py.typed'\]"):
        release_check.compare(wheel, changed(wheel, tmp_path, {"sdpo_nb/py.typed": "partial"}))


def test_an_sdist_without_its_settings_is_refused(built, tmp_path):
    with tarfile.open(built[0]) as old, tarfile.open(tmp_path / "poor.tar.gz", "w:gz") as new:
        for member in old.getmembers():
            if not member.name.endswith("settings.ini"): new.addfile(member, old.extractfile(member))
    with pytest.raises(Wrong, match=r"at its root: \['settings.ini'\] amiss"):
        release_check.look_into_sdist(tmp_path / "poor.tar.gz")


def test_the_wheel_runs_the_demo_without_the_source(built, tmp_path):
    programs = release_check.borrowing(tmp_path / "venv", built[1])
    (empty := tmp_path / "empty").mkdir()
    assert release_check.look_at_home(programs, empty) == f"sdpo-nb {SETTINGS['version']}"
    assert release_check.run_demo(programs, empty).startswith("128 attempts")
    assert sorted(path.name for path in empty.iterdir()) == ["report.html"]


def test_the_first_example_of_a_page_and_what_it_prints():
    page = "# A\n\n```sh\nmake\n```\n\n```python\nprint(1)\n```\n\n```\n1\n```\n\n```python\nprint(2)\n```\n"
    assert release_check.readme_example(page) == ("print(1)\n", "1\n")
    assert release_check.readme_example("```python\nx = 1\n```\n\nText.\n\n```\n3\n```\n") == ("x = 1\n", "")
    with pytest.raises(Wrong, match="no block of Python"): release_check.readme_example("# A\n\n```sh\nmake\n```\n")


def test_a_tag_of_another_version_is_refused():
    with pytest.raises(Wrong, match=f"the tag is v9.9.9, and settings.ini says {SETTINGS['version']}"):
        release_check.look_at_tag("v9.9.9")


def test_a_table_with_one_failure_is_not_right(capsys):
    table = release_check.Table()
    assert table.check("one", lambda: "fine") == "fine" and table.show()
    assert table.check("two", release_check.need, False, "it is broken") is None and not table.show()
    assert re.search(r"two +WRONG .* Wrong: it is broken", capsys.readouterr().out)


@pytest.mark.gpu
def test_the_demo_learns_on_a_gpu(tmp_path, capsys):
    from sdpo_nb.run.cli import main

    assert main(["demo", "--device", "cuda", "--json", "--out", str(tmp_path / "report.html")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["before"] < 0.1 and result["after"] > 0.9


# -- the workflows


@functools.cache
def workflow(name: str) -> dict:
    """A workflow as GitHub reads it, every value as text: `on` is no boolean."""
    return yaml.load(WORKFLOWS[name], yaml.BaseLoader)


def jobs() -> Iterator[tuple[str, dict]]:
    """Every job with its name, e.g. test.linux."""
    for name in WORKFLOWS:
        for key, job in workflow(name)["jobs"].items(): yield f"{name}.{key}", job


def steps(action: str = "") -> list[dict]:
    """Every step, or those that use a certain action."""
    every = [step for _, job in jobs() for step in job.get("steps", ())]
    return [step for step in every if step.get("uses", "").startswith(action)] if action else every


def scripts() -> list[str]:
    """Every script that a workflow runs."""
    return [step["run"] for step in steps() if "run" in step]


def commands() -> list[list[str]]:
    """Every line of them, as words."""
    return [shlex.split(line) for script in scripts() for line in script.splitlines()]


def test_every_target_that_a_workflow_makes_is_there():
    there = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = {word for words in commands() if words[:1] == ["make"] for word in words[1:] if "=" not in word}
    assert len(made) > 8 and made <= there


def test_every_file_that_a_workflow_names_is_there():
    named = {word for words in commands() for word in words if "/" in word and not word.startswith(".venv/")}
    assert len(named) > 8 and [word for word in named if not list(ROOT.glob(word))] == []
    called = [job["uses"] for _, job in jobs() if "uses" in job]
    assert called == ["./.github/workflows/test.yml"]


def test_the_pythons_are_those_that_settings_promise():
    promised = [text.rpartition(" ")[2] for text in lines(SETTINGS["classifiers"]) if re.search(r":: 3\.\d", text)]
    tried = {name: job["strategy"]["matrix"]["python"] for name, job in jobs() if "python" in str(job.get("strategy"))}
    assert promised[0] == SETTINGS["min_python"] and tried.keys() == {"test.linux", "test.pure", "weekly.fresh"}
    assert tried["test.linux"] == tried["weekly.fresh"] == promised and set(tried["test.pure"]) <= set(promised)
    asked = {step["with"]["python-version"] for step in steps("actions/setup-python@")}
    assert asked <= {*promised, "${{ matrix.python }}"}


def test_each_job_may_do_what_it_must_and_no_more():
    assert all(workflow(name)["permissions"] == {"contents": "read"} for name in WORKFLOWS)
    assert {name: job["permissions"] for name, job in jobs() if "permissions" in job} == {
        "docs.deploy": {"pages": "write", "id-token": "write"}, "release.publish": {"id-token": "write"},
    }
    assert all(step["with"]["persist-credentials"] == "false" for step in steps("actions/checkout@"))
    assert not re.search(r"secrets\.|pull_request_target", "".join(WORKFLOWS.values()))


def test_actions_and_machines_are_pinned():
    used = {step["uses"] for step in steps() if "uses" in step}
    assert all(re.fullmatch(r"[\w-]+/[\w/-]+@(v\d+(\.\d+\.\d+)?|[0-9a-f]{40})", action) for action in used)
    assert len(used) == len({action.partition("@")[0] for action in used})  # one version of each
    assert "latest" not in " ".join(re.findall(r"(?:runs-on|machine): (.*)", "".join(WORKFLOWS.values())))
    exact = [steps("quarto-dev/")[0]["with"]["version"], steps("pypa/")[0]["uses"].partition("@v")[2]]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in exact)


def test_jobs_end_and_do_not_run_twice_at_a_time():
    assert all("group" in workflow(name)["concurrency"] for name in WORKFLOWS)
    assert all(0 < int(job["timeout-minutes"]) <= 60 for _, job in jobs() if "uses" not in job)


def test_no_text_of_an_outsider_becomes_a_command():
    assert len(scripts()) > 10 and not [script for script in scripts() if "${{" in script]


def test_a_machine_of_our_own_runs_no_pull_request():
    own = {name for name, job in jobs() if "self-hosted" in job.get("runs-on", ())}
    assert own == {"gpu.gpu"} and set(workflow("gpu")["on"]) == {"push", "workflow_dispatch"}
    assert "vars.SDPO_GPU" in workflow("gpu")["jobs"]["gpu"]["if"]


def test_a_release_is_tested_built_checked_and_then_published():
    release = workflow("release")
    needs = {name: job.get("needs") for name, job in release["jobs"].items()}
    assert needs == {"test": None, "build": "test", "publish": "build"}
    publish = release["jobs"]["publish"]
    assert release["on"] == {"push": {"tags": ["v*.*.*"]}} and publish["environment"]["name"] == "pypi"
    assert [step["uses"].partition("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact", "pypa/gh-action-pypi-publish"]  # nothing else runs where PyPI would believe it


def pure() -> list[Path]:
    """The test files that macOS and Windows run."""
    [words] = [words for words in commands() if "pytest" in words and "-m" in words[:2] and "--dist" in words]
    return [path for word in words if word.startswith("tests/") for path in sorted(ROOT.glob(word))]


def test_the_pure_parts_are_tested_elsewhere_too_or_say_why_not():
    kinds, tested = ("core", "loss", "view", "experience"), [path.name for path in pure()]
    ours = {path.name for kind in kinds for path in ROOT.glob(f"tests/test_{kind}*.py")}
    assert len(tested) == len(set(tested)) and set(tested) - ours == {"test_batches.py", "test_rollouts_families.py"}
    assert ours - set(tested) == LEFT_OUT.keys()


def imports_of(path: Path) -> Iterator[str]:
    """What is imported when a file is, by whole names; `from sdpo_nb import fit` imports fit's home."""
    place = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if not isinstance(node, ast.ImportFrom): continue
        room = ".".join([*place[: -node.level], *filter(None, [node.module])]) if node.level else node.module
        homes = [f"sdpo_nb.{sdpo_nb._HOMES[alias.name]}" for alias in node.names if alias.name in sdpo_nb._HOMES]
        yield from homes if room == "sdpo_nb" else [room]


def test_the_pure_tests_import_nothing_that_only_unix_has():
    waiting, found = set(pure()), {}
    while waiting:
        names = set(imports_of(path := waiting.pop()))
        found[path] = {name.partition(".")[0] for name in names} & UNIX
        ours = {ROOT / name.replace(".", "/") for name in names if name.startswith("sdpo_nb.")}
        files = {file for one in ours for file in (one.with_suffix(".py"), one.parent / "__init__.py")}
        waiting |= {file for file in files if file.exists()} - found.keys()
    assert len(found) > 50 and {path: names for path, names in found.items() if names} == {}
    assert UNIX & set(imports_of(ROOT / "benchmarks" / "loss.py"))  # so one would be seen


# -- the papers beside them


def test_the_citation_is_whole_and_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cited.keys()
    assert (cited["title"], cited["version"]) == (SETTINGS["lib_name"], SETTINGS["version"])
    assert cited["license"] == LICENSES[SETTINGS["license"]] and cited["repository-code"] == SETTINGS["git_url"]
    assert cited["url"] == SETTINGS["doc_host"] + SETTINGS["doc_baseurl"]
    [paper] = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys() and paper["identifiers"][0]["value"] == "arXiv:2601.20802"
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])


def test_changes_stand_newest_first_a_line_each():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d|unreleased)$", text, re.MULTILINE)
    assert headings and headings[0][0] == SETTINGS["version"]
    versions = [tuple(map(int, version.split("."))) for version, _ in headings]
    assert versions == sorted(versions, reverse=True) and len(versions) == text.count("\n## ")
    body = text.partition("\n## ")[2].splitlines()[1:]
    assert {line[:2] for line in body if line} <= {"- ", "##", "[0", "[U"}
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_what_an_answer_needs(form):
    said = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= said.keys()
    asked = {field["id"]: field for field in said["body"] if field["type"] != "markdown"}
    assert len(asked) == sum(field["type"] != "markdown" for field in said["body"])
    assert any(field.get("validations", {}).get("required") for field in asked.values())
    if form.stem != "feature": assert asked["doctor"]["validations"]["required"]
    if form.stem == "not_learning": assert "report.html" in asked["report"]["attributes"]["label"]


# -- nothing unpickles


LOADERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MARSHAL = {"experience/walls.py", "experience/sandbox.py"}  # our own functions and reports, for our own launcher


def imported(tree: ast.AST) -> set[str]:
    """The top-level modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def calls(tree: ast.AST, name: str = "") -> list[str]:
    """Every call in a file as text, or those of one function."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in found if not name or ast.unparse(call.func) == name]


def careless(tree: ast.AST) -> list[str]:
    """Lines that may make any object of a file: torch.load of more than weights, and what allows code."""
    found = [call for call in calls(tree, "torch.load") if "weights_only=True" not in call]
    found += [call for call in calls(tree) if re.match(r"(\w+\.)*(read_pickle|yaml\.load|torch\.hub\.\w+)\(", call)]
    found += [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
              and node.module == "torch" and "load" in {alias.name for alias in node.names}]
    words = [word for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords]
    allowed = [word for word in words if word.arg in ("allow_pickle", "trust_remote_code")]
    return found + [ast.unparse(word) for word in allowed if ast.unparse(word.value) != "False"]


def test_the_package_imports_no_pickle_and_loads_weights_only():
    files = {path.relative_to(ROOT / "sdpo_nb").as_posix(): path for path in (ROOT / "sdpo_nb").rglob("*.py")}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    found = {name: imported(tree) & LOADERS for name, tree in trees.items()}
    assert {name: loaders for name, loaders in found.items() if loaders} == dict.fromkeys(MARSHAL, {"marshal"})
    assert [line for tree in trees.values() for line in careless(tree)] == []
    assert sum(len(calls(tree, "torch.load")) for tree in trees.values()) == 2  # a loop's checkpoint, a trainer's


@pytest.mark.parametrize("line", [
    "torch.load(f)", "torch.load(f, weights_only=False)", "from torch import load", "numpy.load(f, allow_pickle=True)",
    "pd.read_pickle(f)", "yaml.load(f)", "load_model(name, trust_remote_code=True)", "torch.hub.load(name)",
])
def test_a_careless_line_is_seen(line):
    assert len(careless(ast.parse(line))) == 1
    assert careless(ast.parse("torch.load(f, weights_only=True); yaml.safe_load(f); json.load(f)")) == []


def test_a_loader_is_seen_where_it_is_imported_late():
    assert imported(ast.parse("def f():\n    from pickle import loads")) & LOADERS == {"pickle"}


class Trap:
    """Whoever unpickles it writes a file."""

    def __init__(self, mark: Path) -> None: self.mark = mark

    def __reduce__(self) -> tuple: return Path.touch, (self.mark,)


@pytest.fixture
def trap(tmp_path) -> Iterator[Trap]:
    """A trap that works, and that nobody may have stepped into in the end."""
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Trap(mark)))
    mark.unlink()  # it was there
    yield Trap(mark)
    assert not mark.exists()


def test_a_checkpoint_made_to_attack_is_refused(tmp_path, trap):
    import torch
    from sdpo_nb import SDPO, Codebook, LoopConfig, Sampling, fit, load_demo

    def go_on(): fit(*load_demo(), Codebook("omega"), SDPO(), config=size, folder=tmp_path / "run")

    size = LoopConfig(steps=1, tasks=1, attempts=2, evaluate_every=0, sampling=Sampling(8))
    go_on()
    torch.save({"optimizer": trap, "luck": {}}, tmp_path / "run" / "checkpoint" / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"): go_on()


def test_weights_made_to_attack_are_refused(tmp_path, trap):
    import torch
    from sdpo_nb import load_demo, load_model

    for part in load_demo(): part.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": trap}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no weights in safetensors"): load_model(tmp_path, device="cpu")
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        load_model(tmp_path, device="cpu", use_safetensors=False)


def test_packed_tests_made_to_attack_are_refused(trap):
    import base64
    import zlib
    from sdpo_nb.experience.coding import livecodebench_tests

    packed = base64.b64encode(zlib.compress(pickle.dumps(trap))).decode()
    with pytest.raises(ValueError, match="packed tests are one text"):
        livecodebench_tests({"public_test_cases": "[]", "private_test_cases": packed})
