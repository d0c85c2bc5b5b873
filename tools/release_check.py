"""Build sdist and wheel, look into both, install each into a fresh environment, and run what the README promises.

    python tools/release_check.py              environments that hold all they need, as a user's does: minutes
    python tools/release_check.py --shared     environments that borrow this one's other packages: a minute
    python tools/release_check.py --tag v0.1.0 --keep dist       before a release: what is published is what was checked
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable
from email import message_from_string
from email.message import Message
from pathlib import Path, PurePosixPath

from markdown_it import MarkdownIt
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script has its own folder on the path, and not this one
from tools.make_readme import from_afar  # noqa: E402
from tools.sync_settings import LICENSES, lines, read_settings  # noqa: E402

NEEDED = {f"sdpo_nb/{name}" for name in ("py.typed", "__init__.pyi", "data/demo/model.safetensors", "static/widget.js")}
KINDS = {".py", ".pyi", ".typed", ".json", ".jinja", ".safetensors", ".md", ".js", ".css"}  # none of them a pickle
BESIDE = {"pyproject.toml", "settings.ini", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in"}
LARGEST = 4 * 2**20  # bytes of either file; the demo's weights are 1.7 MiB
ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*:|#")  # where a link may begin, on a page that is not GitHub's
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


class Wrong(Exception):
    """A reason not to release."""


def need(holds: bool, otherwise: str) -> None:
    """Refuse to go on where something does not hold."""
    if not holds: raise Wrong(otherwise)


def run(*command: object, cwd: Path = ROOT) -> str:
    """What a command prints, with no other package on its path than its own."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "IN_TEST")
    env = {name: value for name, value in os.environ.items() if name not in ours} | {"PYTHONUTF8": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, encoding="utf-8", errors="replace")
    said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
    need(done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{said}")
    return done.stdout


# -- build


def copy_source(tree: Path) -> None:
    """What git knows of or would, as it is now: no older build leaks in. The README's links lead to GitHub."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if not os.path.lexists(ROOT / name): continue  # removed, and not committed yet
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    readme = from_afar((tree / "README.md").read_text(encoding="utf-8"), tree)
    (tree / "README.md").write_text(readme, encoding="utf-8", newline="\n")


def build(folder: Path) -> tuple[Path, Path, Path]:
    """The sdist, the wheel that comes of it, and the wheel that comes of the tree."""
    import setuptools

    copy_source(tree := folder / "tree")
    alone = ["--no-isolation"] if int(setuptools.__version__.split(".")[0]) >= 77 else []  # as pyproject.toml asks
    run(sys.executable, "-m", "build", *alone, "--outdir", folder / "dist", tree)
    run(sys.executable, "-m", "build", *alone, "--wheel", "--outdir", folder / "straight", tree)
    patterns = ("dist/*.tar.gz", "dist/*.whl", "straight/*.whl")
    return tuple(next(folder.glob(pattern)) for pattern in patterns)


# -- look


def contents(archive: Path) -> dict[str, bytes]:
    """Every file of a wheel, or of an sdist without the folder that it comes in."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file: return {name: file.read(name) for name in file.namelist()}
    with tarfile.open(archive) as file:
        held = [member for member in file.getmembers() if not member.isdir()]
        need(all(member.isfile() for member in held), "the sdist holds links or devices")
        return {member.name.partition("/")[2]: file.extractfile(member).read() for member in held}


def metadata(files: dict[str, bytes]) -> Message:
    """What an archive says of itself: a wheel in METADATA, an sdist in PKG-INFO."""
    name = next(name for name in files if name == "PKG-INFO" or name.endswith(".dist-info/METADATA"))
    return message_from_string(files[name].decode())


def look_at_metadata(wheel: Path, sdist: Path) -> str:
    """Both say what settings.ini says."""
    settings, said = read_settings(ROOT), metadata(contents(wheel))
    need(said.as_string() == metadata(contents(sdist)).as_string(), "wheel and sdist say different things")
    extras = dict(line.split(":", 1) for line in lines(settings["extras"]))
    wanted = {
        "Name": [settings["lib_name"]], "Version": [settings["version"]], "Summary": [settings["description"]],
        "Requires-Python": [f'>={settings["min_python"]}'], "License-Expression": [LICENSES[settings["license"]]],
        "License-File": ["LICENSE"], "Classifier": lines(settings["classifiers"]),
        "Keywords": [",".join(settings["keywords"].split())], "Provides-Extra": [name.strip() for name in extras],
        "Description-Content-Type": ["text/markdown"],
        "Project-URL": [f'Repository, {settings["git_url"]}',
                        f'Documentation, {settings["doc_host"]}{settings["doc_baseurl"]}'],
    }
    for name, values in wanted.items():
        need(said.get_all(name) == values, f"{name} is {said.get_all(name)}, not {values}")
    needed = [Requirement(line) for line in said.get_all("Requires-Dist")]
    always = {str(one) for one in needed if one.marker is None}
    need(always == {str(Requirement(one)) for one in settings["requirements"].split()}, f"it requires {sorted(always)}")
    return f'{settings["lib_name"]} {settings["version"]}, {len(always)} requirements, {len(extras)} extras'


def look_at_readme(wheel: Path) -> str:
    """PyPI can show the README: it is Markdown, and every link and picture says where it is."""
    page, found = MarkdownIt("commonmark").parse(metadata(contents(wheel)).get_payload()), []
    for token in (inner for outer in page for inner in (outer, *(outer.children or ()))):
        found += [token.attrs[name] for name in ("href", "src") if name in token.attrs]
        if token.type.startswith("html"): found += re.findall(r' (?:href|src|srcset)="([^"]*)"', token.content)
    lost = [link for link in found if not ABSOLUTE.match(link)]
    need(not lost, f"these lead nowhere from PyPI: {lost}")
    need(len(found) > 10, "the README is hardly one")
    ours = (ROOT / "README.md").read_text(encoding="utf-8")
    here, there = (FENCE.findall(text) for text in (ours, metadata(contents(wheel)).get_payload()))
    need(here == there, "its code was changed on the way")
    return f"{len(found)} links and pictures"


def look_into_wheel(wheel: Path) -> str:
    """The whole package, its licence, and nothing else."""
    files, here = contents(wheel), {path for path in (ROOT / "sdpo_nb").rglob("*") if path.is_file()}
    ours = {path.relative_to(ROOT).as_posix() for path in here if "__pycache__" not in path.parts}
    held = {name for name in files if name.startswith("sdpo_nb/")}
    need(held == ours, f"missing: {sorted(ours - held)}; too much: {sorted(held - ours)}")
    need(NEEDED <= held, f"missing: {sorted(NEEDED - held)}")
    strange = {name for name in held if PurePosixPath(name).suffix not in KINDS}
    need(not strange, f"of a kind that no wheel of ours holds: {sorted(strange)}")
    beside = {name.partition("/")[0] for name in files.keys() - held}
    need(len(beside) == 1 and beside.pop().endswith(".dist-info"), "something stands beside the package")
    licence = [body for name, body in files.items() if name.endswith(".dist-info/licenses/LICENSE")]
    need(licence == [(ROOT / "LICENSE").read_bytes()], "the licence is not there, or is another")
    need(wheel.stat().st_size < LARGEST, f"{wheel.stat().st_size:,} bytes are too many")
    return f"{len(held)} files, {wheel.stat().st_size / 2**20:.1f} MiB"


def look_into_sdist(sdist: Path) -> str:
    """What it takes to build the wheel, and no tests, notebooks or machinery."""
    files = contents(sdist)
    roots = {PurePosixPath(name).parts[0] for name in files}
    made = {"PKG-INFO", "setup.cfg", "sdpo_nb.egg-info"}
    need(roots == BESIDE | made | {"sdpo_nb"}, f"at its root: {sorted(roots ^ (BESIDE | made | {'sdpo_nb'}))} amiss")
    for name in BESIDE - {"README.md"}: need(files[name] == (ROOT / name).read_bytes(), f"{name} is not ours")
    need(sdist.stat().st_size < LARGEST, f"{sdist.stat().st_size:,} bytes are too many")
    return f"{len(files)} files, {sdist.stat().st_size / 2**20:.1f} MiB"


def compare(wheel: Path, straight: Path) -> str:
    """The wheel from the sdist is the wheel from the tree."""
    one, two = contents(wheel), contents(straight)
    differ = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    need(not differ, f"these differ: {differ}")
    return f"sha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]}, the same contents"


def look_at_tag(tag: str) -> str:
    """A release is of this version, of what is committed, and dated."""
    version = read_settings(ROOT)["version"]
    need(tag == f"v{version}", f"the tag is {tag}, and settings.ini says {version}")
    changed = run("git", "status", "--porcelain").splitlines()
    need(not changed, f"not committed: {changed[:5]}")
    newest = re.search(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    dated = re.fullmatch(rf"## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)", newest)
    need(dated is not None, f"CHANGELOG.md begins with {newest!r}, not with {version} and a date")
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    need(f'date-released: "{dated[1]}"' in cited, f"CITATION.cff has no date-released of {dated[1]}")
    return dated[1]


# -- install and run


def programs_of(home: Path) -> Path:
    """Where an environment keeps its programs."""
    return home / ("Scripts" if os.name == "nt" else "bin")


def borrowing(home: Path, archive: Path) -> Path:
    """The programs of a fresh environment that has our package, and everything else from this one."""
    venv.create(home, symlinks=os.name != "nt")
    python = programs_of(home) / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if archive.suffix != ".whl":  # built here, where setuptools is; what is installed here stays as it is
        alone = ("--no-deps", "--no-index", "--no-build-isolation")
        run(*pip, "wheel", "--quiet", *alone, "--wheel-dir", home / "made", archive)
        archive = next((home / "made").iterdir())
    run(*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", archive)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]  # their .pth files stay unread
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(place, "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    return python.parent


def whole(home: Path, archive: Path, torch: str = "torch", index: str = "") -> Path:
    """The programs of a fresh environment, with everything as pip brings it today."""
    venv.create(home, with_pip=True, symlinks=os.name != "nt")
    pip = [programs_of(home) / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try: run(*pip, *(["--retries", 0, "--timeout", 15, "--index-url", index] if index else []), torch)
    except Wrong: run(*pip, torch)  # where that index cannot be reached the plain package must do, as for `make`
    run(*pip, archive)
    return programs_of(home)


def look_at_home(programs: Path, folder: Path) -> str:
    """What runs is what was installed."""
    code = "import sdpo_nb; print(sdpo_nb.__version__, sdpo_nb.__file__)"
    version, _, place = run(programs / "python", "-c", code, cwd=folder).strip().partition(" ")
    need(Path(place).is_relative_to(programs.parent), f"it is imported from {place}")
    wanted = f'sdpo-nb {read_settings(ROOT)["version"]}'
    need(run(programs / "sdpo-nb", "--version", cwd=folder).strip() == wanted == f"sdpo-nb {version}", f"no {wanted}")
    return wanted


def run_demo(programs: Path, folder: Path, steps: int = 2) -> str:
    """The demo trains, counts and writes its page."""
    said = run(programs / "sdpo-nb", "demo", "--steps", steps, "--json", cwd=folder)
    result = json.loads(said.splitlines()[-1])
    need(result["attempts"] == 64 * steps and result["is_complete"], f"the demo says {said.splitlines()[-1][:200]}")
    page = (folder / "report.html").read_text(encoding="utf-8")
    need(page.startswith("<!") and "<script" in page, "report.html is no page")
    return f'{result["attempts"]} attempts in {result["seconds"]:.1f} s, a report of {len(page) // 1024} KiB'


def run_doctor(programs: Path, folder: Path) -> str:
    """The doctor finds nothing that stops a run."""
    return f'{len(run(programs / "sdpo-nb", "doctor", cwd=folder).splitlines())} lines'


def readme_example(readme: str) -> tuple[str, str]:
    """The first block of Python, and what the README says that it prints."""
    found = re.search(r"^```python\n(.*?)^```\n+(?:^```\n(.*?)^```$)?", readme, re.MULTILINE | re.DOTALL)
    need(found is not None, "the README has no block of Python")
    return found[1], found[2] or ""


def run_readme(programs: Path, folder: Path) -> str:
    """The first example runs as it stands, and prints what the README says, give or take another machine's luck."""
    code, wanted = readme_example((ROOT / "README.md").read_text(encoding="utf-8"))
    said = run(programs / "python", "-c", code, cwd=folder)
    number = re.compile(r"\d[\d.,]*%")
    need(number.sub("%", said).split() == number.sub("%", wanted).split(), f"it prints {said!r}, not {wanted!r}")
    values = [[float(value.rstrip("%")) for value in number.findall(text)] for text in (said, wanted)]
    far = [pair for pair in zip(*values) if abs(pair[0] - pair[1]) > 10]
    need(not far, f"shares more than ten points from the README's (here, there): {far}")
    return said.splitlines()[-1]


# -- the table


class Table:
    """What was checked, what came of it, and how long it took."""

    def __init__(self) -> None: self.rows: list[tuple[str, bool, str, float]] = []

    def check(self, what: str, work: Callable[..., object], *arguments: object) -> object:
        """Do one piece of work and note it; None where it failed."""
        print(f"== {what}", flush=True)
        start, is_right = time.monotonic(), True
        try: found = work(*arguments)
        except (Wrong, OSError, LookupError, ValueError) as error:
            found, is_right = f"{type(error).__name__}: {error}", False
        self.rows.append((what, is_right, found if isinstance(found, str) else "", time.monotonic() - start))
        return found if is_right else None

    def show(self) -> bool:
        """Print it; whether all is right."""
        wide = max(len(what) for what, *_ in self.rows)
        print()
        for what, is_right, said, seconds in self.rows:
            print(f"{what:<{wide}}  {'ok   ' if is_right else 'WRONG'}  {seconds:6.1f} s  {said}", flush=True)
        return all(is_right for _, is_right, *_ in self.rows)


Install = Callable[[Path, Path], Path]  # a new environment's folder, an archive -> where its programs are


def check_installed(table: Table, name: str, archive: Path, folder: Path, install: Install) -> None:
    """Install one archive, and use it in an empty folder."""
    programs = table.check(f"{name}: install", install, folder / f"{name}_venv", archive)
    if programs is None: return
    (empty := folder / f"{name}_empty").mkdir()
    parts = {"version": look_at_home, "demo": run_demo, "doctor": run_doctor}
    if name == "wheel": parts["README's example"] = run_readme  # the sdist's wheel is the same, byte for byte
    for part, work in parts.items(): table.check(f"{name}: {part}", work, programs, empty)


def check_all(table: Table, folder: Path, options: argparse.Namespace) -> None:
    """Everything, in the order in which it is needed."""
    if options.tag: table.check("tag", look_at_tag, options.tag)
    if (built := table.check("build", build, folder)) is None: return
    sdist, wheel, straight = built
    table.check("metadata", look_at_metadata, wheel, sdist)
    table.check("README on PyPI", look_at_readme, wheel)
    table.check("wheel: contents", look_into_wheel, wheel)
    table.check("sdist: contents", look_into_sdist, sdist)
    table.check("sdist: same wheel", compare, wheel, straight)
    def fresh(home: Path, archive: Path) -> Path: return whole(home, archive, options.torch, options.torch_index)
    for name, archive in (("wheel", wheel), ("sdist", sdist)):
        check_installed(table, name, archive, folder, borrowing if options.shared else fresh)


def main() -> None:
    """Check, print the table, and keep what was checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--shared", action="store_true", help="borrow this environment's other packages")
    option("--tag", default="", help="the version's tag, e.g. v0.1.0: everything committed, dated and named so")
    option("--keep", type=Path, help="an empty folder for the two files, where all is right")
    option("--torch", default="torch", help="the torch of the fresh environments (default: torch)")
    option("--torch-index", default="", help="where pip finds it, e.g. https://download.pytorch.org/whl/cpu")
    options, table = parser.parse_args(), Table()
    with tempfile.TemporaryDirectory(prefix="release-") as place:
        check_all(table, Path(place), options)
        if not table.show(): sys.exit("not fit for release")
        if options.keep: shutil.copytree(Path(place) / "dist", options.keep, dirs_exist_ok=True)
    print("fit for release")


if __name__ == "__main__": main()
