"""What a notebook cannot say of the project: its settings and layers, and what an import costs."""
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.config import get_config

import sdpo_nb

from tools import drift

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdpo_nb"


def run(*command: object, cwd: Path = ROOT) -> str:
    """A command's standard output; its error where it fails."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "IN_TEST")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_where_the_table_says():
    for name, home in sdpo_nb._HOMES.items():
        assert getattr(sdpo_nb, name) is getattr(importlib.import_module(f"sdpo_nb.{home}"), name), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): sdpo_nb.nothing


def test_type_checkers_are_told_the_same_names():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    stated = {(alias.asname, node.module) for node in imports for alias in node.names}
    assert stated == {(name, f"sdpo_nb.{home}") for name, home in sdpo_nb._HOMES.items()}
    assert set(sdpo_nb._HOMES) <= set(dir(sdpo_nb)) and sdpo_nb.__all__ == list(sdpo_nb._HOMES)


def test_a_type_checker_sees_a_public_name(tmp_path):
    (tmp_path / "snippet.py").write_text("from sdpo_nb import Task\nreveal_type(Task)\n")
    seen = run(sys.executable, "-m", "mypy", "--follow-imports=skip", "--cache-dir", tmp_path / "cache",
               tmp_path / "snippet.py", PACKAGE / "__init__.pyi", PACKAGE / "core" / "records.py")
    assert 'Revealed type is "def (' in seen and "sdpo_nb.core.records.Task" in seen


def test_settings_reach_every_file():
    run(sys.executable, "tools/sync_settings.py", "--check")


def test_nbdev_reads_all_it_needs():
    config = get_config(ROOT)
    assert "Self-Distillation" in config.description and config.author == "The sdpo-nb authors"
    assert (config.lib_name, config.lib_path, config.version) == ("sdpo-nb", PACKAGE, sdpo_nb.__version__)
    assert (config.user, config.repo, config.branch) == ("sdpo-nb", "sdpo-nb", "main")
    assert (config.doc_host, config.doc_baseurl) == ("https://sdpo-nb.github.io", "/sdpo-nb")
    assert config.tst_flags == "gpu slow net" and config.custom_sidebar


def test_chapters_import_only_earlier_chapters():
    graph = run(sys.executable, "-S", "tools/layers.py")  # -S: the standard library must do
    assert graph.startswith(" 01 core.records")


def test_an_upward_import_is_refused(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("_*"))
    shutil.copytree(PACKAGE, tmp_path / "sdpo_nb", ignore=shutil.ignore_patterns("data"))
    first = tmp_path / "nbs" / "01_core.records.ipynb"
    notebook = json.loads(first.read_text(encoding="utf-8"))
    lesson = next(cell for cell in reversed(notebook["cells"]) if cell["cell_type"] == "code")
    lesson["source"] = ["from sdpo_nb.core.models import need"]
    first.write_text(json.dumps(notebook), encoding="utf-8")
    command = [sys.executable, ROOT / "tools" / "layers.py", "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"01_core.records.ipynb#{lesson['id']} imports sdpo_nb.core.models.need of 02_core" in done.stderr


@pytest.fixture
def exported(tmp_path, monkeypatch) -> Path:
    """A project of one chapter and the file that is made of it, committed; its export writes what the chapter says."""
    def export(root): (root / "made.py").write_text((root / "page.ipynb").read_text())
    monkeypatch.setattr(drift, "export", export)
    for name, text in {"page.ipynb": "1", "made.py": "1", ".gitignore": "/run/"}.items(): (tmp_path / name).write_text(text)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"]):
        run("git", *words, cwd=tmp_path)
    return tmp_path


def test_a_hand_that_edits_a_generated_file_is_told_what_to_do(exported):
    assert drift.drifted(exported) == []
    (exported / "made.py").write_text("2")
    told = "made.py differs from its notebook: edit the notebook, make export, commit both"
    assert drift.drifted(exported) == [told] and (exported / "made.py").read_text() == "2"
    (exported / "made.py").unlink()
    assert drift.drifted(exported) == ["made.py comes of a notebook and is not there: make export, commit both"]


def test_what_nobody_committed_is_named(exported, monkeypatch):
    (exported / "run").mkdir()
    (exported / "run" / "left.txt").write_text("ignored")
    monkeypatch.setattr(sys, "argv", ["drift.py", "--committed", "--root", str(exported)])
    drift.main()
    (exported / "left.txt").write_text("not ignored")
    with pytest.raises(SystemExit, match="^left.txt: not committed and not ignored$"): drift.main()


def test_the_sidebar_names_every_page():
    sidebar = (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8")
    patterns = [word for word in sidebar.split() if word.endswith(".ipynb")]
    named = [path for pattern in patterns for path in (ROOT / "nbs").glob(pattern)]
    assert sorted(named) == sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs").glob("[a-z]*/*.ipynb")])


def test_the_site_has_one_configuration():
    assert (ROOT / "nbs" / "_quarto.yml").readlink() == Path("../_quarto.yml")


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'trl', 'transformers', 'peft'}"
    code = f"import sys, sdpo_nb; dir(sdpo_nb); print({heavy} & set(sys.modules))"
    assert run(sys.executable, "-c", code) == "set()\n"


def test_pages_hold_no_path_of_the_machine_that_ran_them():
    for page in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()): assert "site-packages" not in json.dumps(output), page.name


def test_every_file_that_the_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    inner = [link for link in links if "://" not in link]
    assert len(inner) > 10 and [link for link in inner if not (ROOT / link).exists()] == []
