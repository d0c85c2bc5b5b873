"""Carry settings.ini into pyproject.toml's marked block and `__version__`; `--check` only names what drifted."""
import argparse
import configparser
import json
import re
import sys
from pathlib import Path

BEGIN = "# >>> written from settings.ini by tools/sync_settings.py: edit settings.ini, not this block"
END = "# <<< written from settings.ini"
LICENSES = {"apache2": "Apache-2.0", "mit": "MIT", "bsd3": "BSD-3-Clause"}
NBDEV_KEYS = ("lib_path title nbs_path doc_path readme_nb branch tst_flags export_procs doc_procs "
              "custom_sidebar clean_ids clear_all allowed_metadata_keys").split()
NBDEV_LISTS = {"export_procs", "doc_procs", "allowed_metadata_keys"}


def read_settings(root: Path) -> dict[str, str]:
    """The settings as text, one entry for each key."""
    parser = configparser.ConfigParser(interpolation=None, delimiters="=")
    parser.read_string((root / "settings.ini").read_text(encoding="utf-8"))
    return dict(parser["DEFAULT"])


def lines(value: str) -> list[str]:
    """The filled lines of a setting that spans several."""
    return [line.strip() for line in value.splitlines() if line.strip()]


def toml(value: str | list[str]) -> str:
    """A setting as a TOML value; `true` and `false` are booleans, a list stands one item a line."""
    if isinstance(value, str): return value if value in ("true", "false") else json.dumps(value, ensure_ascii=False)
    return "[\n" + "".join(f"    {json.dumps(item)},\n" for item in value) + "]" if value else "[]"


def block(settings: dict[str, str]) -> str:
    """The part of pyproject.toml that settings.ini decides."""
    package = settings["lib_path"]
    extras = dict(line.split(":", 1) for line in lines(settings["extras"]))
    scripts = dict(map(str.strip, line.split("=", 1)) for line in lines(settings["console_scripts"]))
    nbdev = {key: settings[key].split() if key in NBDEV_LISTS else settings[key] for key in NBDEV_KEYS}
    return "\n".join([
        BEGIN,
        "[build-system]", 'requires = ["setuptools>=77"]', 'build-backend = "setuptools.build_meta"', "",
        "[project]", f'name = {toml(settings["lib_name"])}', 'dynamic = ["version"]',
        f'description = {toml(settings["description"])}', 'readme = "README.md"',
        f'requires-python = {toml(">=" + settings["min_python"])}',
        f'license = {toml(LICENSES[settings["license"]])}', 'license-files = ["LICENSE"]',
        f'authors = [{{name = {toml(settings["author"])}}}]',
        f'keywords = {toml(settings["keywords"].split())}',
        f'classifiers = {toml(lines(settings["classifiers"]))}',
        f'dependencies = {toml(settings["requirements"].split())}', "",
        "[project.optional-dependencies]",
        *(f"{extra.strip()} = {toml(packages.split())}" for extra, packages in extras.items()), "",
        "[project.urls]", f'Repository = {toml(settings["git_url"])}',
        f'Documentation = {toml(settings["doc_host"] + settings["doc_baseurl"])}', "",
        "[project.scripts]", *(f"{name} = {toml(target)}" for name, target in scripts.items()), "",
        "[project.entry-points.nbdev]", f'{package} = "{package}._modidx:d"', "",
        "[tool.setuptools.dynamic]", f'version = {{attr = "{package}.__version__"}}', "",
        "[tool.setuptools.packages.find]", f'include = ["{package}*"]', "",
        "[tool.setuptools.package-data]", f'{package} = ["data/**/*", "static/**/*", "py.typed", "**/*.pyi"]', "",
        "[tool.nbdev]", *(f"{key} = {toml(value)}" for key, value in nbdev.items()),
        END])


def synced(root: Path) -> dict[Path, str]:
    """The text that each file that follows settings.ini must have."""
    settings = read_settings(root)
    project, init = root / "pyproject.toml", root / settings["lib_path"] / "__init__.py"
    managed = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    version = re.compile(r"^__version__ = .*$", re.MULTILINE)
    wanted = {}
    for path, pattern, text in ((project, managed, block(settings)),
                                (init, version, f'__version__ = "{settings["version"]}"')):
        old = path.read_text(encoding="utf-8")
        if len(pattern.findall(old)) != 1:
            raise ValueError(f"{path} needs one place for settings.ini to write to: {pattern.pattern[:40]!r}...")
        wanted[path] = pattern.sub(lambda _: text, old)
    return wanted


def main() -> None:
    """Write the files that follow settings.ini, or say which of them have drifted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name the files that drifted")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    args = parser.parse_args()
    drifted = {path: text for path, text in synced(args.root).items() if path.read_text(encoding="utf-8") != text}
    if args.check and drifted:
        sys.exit(f"out of step with settings.ini: {', '.join(str(path.relative_to(args.root)) for path in drifted)}; "
                 "run python tools/sync_settings.py")
    for path, text in drifted.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(args.root)}")


if __name__ == "__main__": main()
