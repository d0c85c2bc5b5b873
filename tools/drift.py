"""Refuse generated files that are not what their notebooks make: a hand's edit of one, or an export that was forgotten.

    python tools/drift.py              look at the files as they are
    python tools/drift.py --committed  and at what is neither committed nor ignored

The export is made in a copy, so that no edit is lost.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(root: Path, *words: str) -> list[str]:
    """What git says, a line or a path each."""
    done = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True)
    return [line for line in done.stdout.split("\0" if "-z" in words else "\n") if line]


def copied(root: Path, copy: Path) -> None:
    """A repository of its own with the files that git knows or would add, as they are."""
    for name in git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"):
        if not os.path.lexists(root / name): continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, copy / name, follow_symlinks=False)
    git(copy, "init", "--quiet")
    git(copy, "add", "--all")


def export(root: Path) -> None:
    """Do what `make export` does."""
    env, programs = os.environ | {"PYTHONPATH": "."}, Path(sys.executable).parent
    for command in ([programs / "nbdev-export"], [programs / "nbdev-clean"], [sys.executable, "tools/make_readme.py"]):
        subprocess.run(command, cwd=root, env=env, check=True, stdout=subprocess.DEVNULL)


def drifted(root: Path) -> list[str]:
    """What an export would change."""
    with tempfile.TemporaryDirectory() as name:
        copied(root, copy := Path(name))
        export(copy)
        changed = git(copy, "diff", "--name-only")
        new = git(copy, "ls-files", "--others", "--exclude-standard")
    pages = [path for path in changed if path.endswith(".ipynb")]
    return [f"{path} differs from its notebook: edit the notebook, make export, commit both"
            for path in changed if path not in pages] + [
        f"{path} holds what nbdev-clean takes out: make export, commit it" for path in pages] + [
        f"{path} comes of a notebook and is not there: make export, commit both" for path in new]


def main() -> None:
    """Look, and say what to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project")
    parser.add_argument("--committed", action="store_true", help="refuse what is not committed, too")
    chosen = parser.parse_args()
    if not (chosen.root / ".git").exists(): return print("no repository here, so nobody looked for drift")
    wrong = drifted(chosen.root)
    if chosen.committed:
        wrong += [f"{line[3:]}: not committed and not ignored" for line in git(chosen.root, "status", "--porcelain")]
    if wrong: sys.exit("\n".join(wrong))


if __name__ == "__main__": main()
