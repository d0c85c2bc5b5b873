"""What a notebook cannot say of the project: its settings and layers, what an import costs, what the wheel holds."""
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools
from nbdev.config import get_config

import sdpo_nb

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdpo_nb"


def run(*command: object, cwd: Path = ROOT) -> str:
    """A command's standard output; its error where it fails."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "IN_TEST")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the tree so that no older build leaks into it."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(PACKAGE, tree / "sdpo_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in "pyproject.toml", "README.md", "LICENSE": shutil.copy(ROOT / name, tree)
    has_backend = int(setuptools.__version__.split(".")[0]) >= 77
    run(sys.executable, "-m", "build", "--wheel", *(["--no-isolation"] if has_backend else []), cwd=tree)
    return next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of a fresh environment that has our wheel, and borrows this one's other packages."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]  # their .pth files stay unread
    (next(home.glob("lib/*/site-packages")) / "borrowed.pth").write_text("\n".join(borrowed))
    return python.parent


def test_wheel_holds_the_whole_package(wheel):
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    ours = {path.relative_to(ROOT).as_posix() for path in files}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("sdpo_nb/")}
    assert held == ours
    assert {"sdpo_nb/py.typed", "sdpo_nb/__init__.pyi"} <= held
    assert any(name.startswith("sdpo_nb/data/demo/") for name in held)


def test_wheel_runs_the_demo_without_the_source(installed, tmp_path):
    home = run(installed / "python", "-c", "import sdpo_nb; print(sdpo_nb.__file__)", cwd=tmp_path)
    assert Path(home).is_relative_to(installed.parent)
    result = json.loads(run(installed / "sdpo-nb", "demo", "--steps", "2", "--json", cwd=tmp_path).splitlines()[-1])
    assert {"before", "after", "attempts", "seconds", "curve"} <= set(result)


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


def test_the_sidebar_names_every_page():
    sidebar = (ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8")
    named = {word for word in sidebar.split() if word.endswith(".ipynb") and "*" not in word}
    assert named == {path.name for path in (ROOT / "nbs").glob("*.ipynb")}


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
