"""The notebooks as pages of the documentation site: where they stand in it, and what they are refused for."""
import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import yaml

FLAGS = ("gpu", "slow", "net")  # what nbdev-test leaves out
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
OPTION = re.compile(r"^#\| *([\w-]+) *:? *(.*)$", re.MULTILINE)
CODE = re.compile(
    r"^(?P<fence>`{3,}|~{3,})[^\n]*\n(?:.*?\n)??(?P=fence)[`~]*[ \t]*$"  # fenced,
    r"|(?<![`\\])(?P<tick>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=tick)(?!`)"  # within a line,
    r"|(?:(?<=\n\n)|\A)(?: {4}[^\n]*\n?)+",  # or indented
    re.DOTALL | re.MULTILINE)
Tree = list[tuple[str, "str | Tree"]]  # the sidebar: (title or nothing, page) and (title, tree)


class Refused(Exception):
    """What is wrong with the pages, a line each."""


@dataclass(frozen=True)
class Page:
    """A notebook on its way into the site."""
    path: PurePosixPath  # from nbs/
    written: dict  # the notebook as its author left it
    processed: dict  # and as nbdev processed it

    @cached_property
    def front(self) -> dict:
        """What stands in the page's front matter: title, description and output-file, at least."""
        first = self.processed["cells"][0] if self.processed["cells"] else {"cell_type": "none"}
        found = first["cell_type"] == "raw" and re.match(r"---\n(.*?)\n---", source_of(first), re.DOTALL)
        return yaml.safe_load(found[1]) or {} if found else {}

    @property
    def url(self) -> PurePosixPath:
        """Its address in the site, as in Quarto's: numbers of chapters do not appear."""
        return self.path.with_name(self.front.get("output-file") or f"{self.path.stem}.html")

    @property
    def module(self) -> str:
        """What it exports, nothing for most pages."""
        source = "\n".join(map(source_of, code_cells(self.written)))
        found = re.search(r"^#\| *default_exp:? +(\S+)", source, re.MULTILINE)
        return found[1].removesuffix(".__init__") if found else ""


def joined(text: list[str] | str) -> str:
    """A notebook's text, which is a string or a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def source_of(cell: dict) -> str:
    """A cell's source."""
    return joined(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    """The code cells that hold something."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and source_of(cell).strip()]


def options(source: str) -> dict[str, str]:
    """The options of a code cell, nbdev's and Quarto's."""
    return dict(OPTION.findall(source))


def read(path: Path) -> dict:
    """A notebook."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_pages(root: Path) -> list[Page]:
    """Every page; one that nbdev has not processed, or processed before it was changed, is refused."""
    pages, late = [], []
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        inner = path.relative_to(root / "nbs")
        if any(part[0] in "._" for part in inner.parts): continue
        made = root / "_proc" / inner
        if not made.exists() or made.stat().st_mtime < path.stat().st_mtime:
            late.append(f"{inner}: not in _proc, or older there")
        else: pages.append(Page(PurePosixPath(inner.as_posix()), read(path), read(made)))
    if late: raise Refused("\n".join(late))
    return pages


# Navigation


def matching(name: str, paths: list[str]) -> list[str]:
    """The pages that an entry of the sidebar stands for: one, or all that fit its pattern."""
    return [path for path in paths if PurePosixPath(path).match(name)] if "*" in name else [name]


def entries(contents: object, paths: list[str]) -> Iterator[tuple[str, "str | Tree"]]:
    """The sidebar, whose entries are (title or nothing, page) and (title, entries)."""
    for item in [contents] if isinstance(contents, (str, dict)) else contents:
        if isinstance(item, str): yield from (("", path) for path in matching(item, paths))
        elif "section" in item: yield item["section"], list(entries(item.get("contents", []), paths))
        elif "auto" in item: yield from entries(item["auto"], paths)
        else: yield item.get("text", ""), item.get("href") or item["file"]


def named(tree: Tree) -> list[str]:
    """Every page that the sidebar names."""
    return [name for _, item in tree for name in (named(item) if isinstance(item, list) else [item])]


def read_sidebar(root: Path, pages: list[Page]) -> Tree:
    """The tree of nbs/sidebar.yml."""
    found = yaml.safe_load((root / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
    return list(entries(found["website"]["sidebar"]["contents"], [str(page.path) for page in pages]))


# What is refused in a notebook


def without_front(page: Page) -> Iterator[str]:
    """A page needs a title and a description: search engines, cards and the sidebar show them."""
    for key in ("title", "description"):
        if not page.front.get(key): yield f"has no {key}; begin with `# Title`, and on the next line `> one sentence`"
    first = next((source_of(cell) for cell in page.written["cells"] if cell["cell_type"] == "markdown"), "")
    more = [line for line in first.splitlines() if not re.match(r"# |> |- [\w-]+: |\s*$", line)]
    if first.startswith("# ") and more: yield f"loses `{more[0][:40]}`: nbdev drops what follows the title in its cell"


def without_outputs(page: Page) -> Iterator[str]:
    """A page with code was run, and what it printed was kept."""
    outputs = [output for cell in code_cells(page.written) for output in cell["outputs"]]
    if code_cells(page.written) and not outputs and not page.front.get("no-outputs"):
        yield "has code and no outputs: run it and keep them, or write `- no-outputs: why` below its description"
    for output in outputs:
        if output["output_type"] == "error": yield f"failed when it was run: {output['ename']}: {output['evalue']}"


def needs_accelerator(source: str) -> bool:
    """Whether a cell uses CUDA as it stands, and does not ask before."""
    try: nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError: return False
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    moved = [call.args[:1] for call, name in zip(calls, names) if name.endswith(".to")]
    devices = [word.value for call in calls for word in call.keywords if word.arg in ("device", "device_map")]
    places = [value.value for value in [*sum(moved, []), *devices] if isinstance(value, ast.Constant)]
    is_used = any(name.endswith(".cuda") or re.match(r"torch\.cuda\.(?!is_|device_count)", name) for name in names)
    is_used = is_used or any(str(place).startswith("cuda") for place in places)
    return is_used and not any(name.endswith("is_available") for name in names)


def is_yaml(value: str) -> bool:
    """Whether an option's value is one text, or a list of texts."""
    try: found = yaml.safe_load(f"option: {value}")["option"]
    except yaml.YAMLError: return False
    return isinstance(found, str) or isinstance(found, list) and all(isinstance(one, str) for one in found)


def on_accelerator(page: Page) -> Iterator[str]:
    """Tests and the docs build run on a CPU; the docs build runs every cell that imports, whatever its flags."""
    for cell in code_cells(page.written):
        source = source_of(cell)
        chosen = options(source)
        if chosen.get("eval", "").lower() == "false" or {"export", "exports", "exporti"} & set(chosen): continue
        is_left_out = set(FLAGS) & set(chosen) and not re.search(r"^\s*(import|from)\b", source, re.MULTILINE)
        if needs_accelerator(source) and not is_left_out:
            yield f"would run on a GPU in cell {cell.get('id')}: begin it with `#| eval: false` and say why"


def without_own_words(page: Page) -> Iterator[str]:
    """In a chapter the code that draws a figure may speak for it; who reads another page reads what its author saw."""
    if len(page.path.parts) == 1: return
    for cell in code_cells(page.written):
        shown = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        if shown & set(PICTURES) and not {"fig-alt", "fig-cap"} & set(options(source_of(cell))):
            yield f"shows a figure in cell {cell.get('id')} and does not say of what: write `#| fig-alt: ...`"


def without_words(page: Page) -> Iterator[str]:
    """Whoever cannot see a picture reads its words."""
    for cell in page.processed["cells"]:
        source = source_of(cell)
        if cell["cell_type"] == "markdown":
            for path in re.findall(r"!\[\s*\]\(([^)\s]+)", CODE.sub("", source)):
                yield f"shows {path} without words for it"
        elif words := [value for key, value in options(source).items() if key in ("fig-alt", "fig-cap")]:
            if not is_yaml(words[0]): yield f"has words that YAML misreads; put quotes round them: {words[0][:40]}"
        elif cell["cell_type"] == "code":
            shown = {kind for output in cell.get("outputs", ()) for kind in output.get("data", {})}
            if shown & set(PICTURES):
                yield f"shows a figure without words in cell {cell.get('id')}: write `#| fig-alt: ...`"


def outside_navigation(pages: list[Page], tree: Tree) -> Iterator[str]:
    """Every page stands in the sidebar once, and every entry is a page."""
    counts, known = Counter(named(tree)), {str(page.path) for page in pages}
    for path in sorted(known - set(counts)): yield f"{path}: is not in nbs/sidebar.yml"
    for path in sorted(set(counts) - known):
        if "://" not in path: yield f"nbs/sidebar.yml: names {path}, which is not there"
    yield from (f"{path}: is in nbs/sidebar.yml {count} times" for path, count in counts.items() if count > 1)
    shared = Counter(page.url for page in pages)
    yield from (f"{page.path}: shares its address, {page.url}" for page in pages if shared[page.url] > 1)


def check(pages: list[Page], tree: Tree) -> None:
    """Refuse pages for all that is wrong with them at once."""
    rules = (without_front, without_outputs, on_accelerator, without_own_words, without_words)
    wrong = [f"{page.path}: {what}" for page in pages for rule in rules for what in rule(page)]
    if wrong := wrong + list(outside_navigation(pages, tree)): raise Refused("\n".join(wrong))
