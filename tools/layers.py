"""Check that every chapter, lesson cells included, imports only earlier chapters; print the graph. Needs no package."""
import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "sdpo_nb"


@dataclass(frozen=True)
class Chapter:
    """One numbered notebook that exports a module."""
    path: Path
    module: str  # without the package's name
    cells: dict[str, ast.Module]  # code cells by id
    names: frozenset[str]  # what its exported cells define

    @property
    def number(self) -> str:
        """What its file name starts with."""
        return self.path.name.split("_")[0]


def read_cell(source: str) -> ast.Module:
    """A code cell's syntax tree, magics left out."""
    try: return ast.parse(source)
    except SyntaxError: return ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))


def read_chapters(nbs: Path) -> list[Chapter]:
    """The chapters in reading order."""
    chapters = []
    for path in sorted(nbs.glob("[0-9]*.ipynb")):
        sources = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
                   if cell["cell_type"] == "code"}
        default = re.search(r"^#\| *default_exp:? +(\S+)", "\n".join(sources.values()), re.MULTILINE)
        if not default: continue
        cells = {id: read_cell(source) for id, source in sources.items()}
        exported = [id for id, source in sources.items() if re.search(r"^#\| *export[si]?\b", source, re.MULTILINE)]
        names = {name for id in exported for node in cells[id].body for name in defined(node)}
        chapters.append(Chapter(path, default[1].removesuffix(".__init__"), cells, frozenset(names)))
    return chapters


def defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement at a module's top level defines, imports apart."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): yield node.name
    elif not isinstance(node, (ast.Import, ast.ImportFrom)):
        names = (inner for inner in ast.walk(node) if isinstance(inner, ast.Name))
        yield from (name.id for name in names if isinstance(name.ctx, ast.Store))


def lazy_names(root: Path) -> dict[str, str]:
    """The table of public names in the package's hand-written `__init__`: name -> module."""
    init = (root / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(init).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            return ast.literal_eval(node.value)
    raise ValueError(f"{PACKAGE}/__init__.py has no table _HOMES of its public names")


def imports(tree: ast.Module, lazy: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Each import of our own in a cell, wherever it stands: (module without the package's name, name or nothing)."""
    roots = {PACKAGE}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, module = alias.name.partition(".")
                if package == PACKAGE and module: yield module, ""
                if alias.name == PACKAGE and alias.asname: roots.add(alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names: yield node.module.partition(".")[2], alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in lazy and ast.unparse(node.value) in roots:
            yield "", node.attr


def sources(module: str, name: str, chapters: list[Chapter], lazy: dict[str, str]) -> list[str] | None:
    """The modules of chapters that an import may come from; none if it is hand-written; None if nothing makes it."""
    made = {chapter.module for chapter in chapters}
    full = f"{module}.{name}".strip(".")
    if full in made: return [full]
    if module in made: return [module]
    if not module and name in lazy: return sources(lazy[name], name, chapters, lazy)
    room = [chapter for chapter in chapters if chapter.module.startswith(f"{module}." if module else f"{name}.")]
    if not module: return [chapter.module for chapter in room]  # the room as a whole, or __version__ and its like
    if name and name != "*": room = [chapter for chapter in room if name in chapter.names]
    return [chapter.module for chapter in room] or None


def main() -> None:
    """Print which chapter leans on which, then every import that looks ahead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    chapters, lazy = read_chapters(root / "nbs"), lazy_names(root)
    order, wrong = {chapter.module: place for place, chapter in enumerate(chapters)}, []
    for chapter in chapters:
        leans_on = set()
        for id, tree in chapter.cells.items():
            for module, name in imports(tree, lazy):
                origins = sources(module, name, chapters, lazy)
                what = ".".join(filter(None, [PACKAGE, module, name]))
                if origins is None: wrong.append(f"{chapter.path.name}#{id} imports {what}, which no chapter makes")
                leans_on.update(origins or [])
                wrong += [f"{chapter.path.name}#{id} imports {what} of {chapters[order[origin]].path.name}: "
                          "a chapter imports only earlier chapters"
                          for origin in origins or [] if order[origin] >= order[chapter.module]]
        below = ", ".join(sorted(leans_on, key=order.get)) or "(nothing of ours)"
        print(f"{chapter.number:>3} {chapter.module:26} <- {below}")
    if wrong: sys.exit("\n".join(wrong))


if __name__ == "__main__": main()
