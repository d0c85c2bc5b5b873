"""An nbdev `doc_procs` hook: on its way into the documentation every figure gets words for those who cannot see it.

What the author wrote stands: `#| fig-alt: ...`, or `#| fig-cap`, with quotes round it or without; every page but a chapter
writes it (tools/site_pages.py). Else the words are the heading above the figure with what the figure says itself: titles,
axes and lines that its cell names, or what the function of sdpo_nb.view that draws it says of itself. Where there is
neither, the sentence that ends the prose directly before the cell. They are written as Quarto's own option, `fig-alt`,
which tools/make_site.py reads too. And source that is exported is folded.
"""
import ast
import json
import re
from functools import cache
from pathlib import Path

PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
FOLDS = '#| code-fold: show\n#| code-summary: "Exported source"\n', '#| code-fold: true\n#| code-summary: "Exported source"\n'
LABELS = {
    "xlabel": "x", "ylabel": "y", "title": "title", "set_xlabel": "x", "set_ylabel": "y", "set_title": "title",
    "suptitle": "title", "label": "line"}
DRAWERS = Path(__file__).resolve().parent.parent / "sdpo_nb" / "view"


def plain(markdown: str) -> str:
    """Markdown as one line of words."""
    words = re.sub(r"^```.*?^```|^\s*\|.*?$|<!--.*?-->", "", markdown, flags=re.DOTALL | re.MULTILINE)
    words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", words)
    return " ".join(re.sub(r"[`*$#>]|\\(?=\W)", "", words).split())


def calls(source: str) -> list[ast.Call]:
    """Every call in a cell's source, in the order of the text."""
    try: found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError: return []  # magics
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def named(source: str) -> dict[str, str]:
    """What a cell calls titles, axes and lines, each kind where it is all plain strings: {"x": "alpha"}."""
    texts: dict[str, list[str | None]] = {}
    for call in calls(source):
        given = [(call.func.attr, call.args[0])] if isinstance(call.func, ast.Attribute) and call.args else []
        for name, value in given + [(word.arg, word.value) for word in call.keywords]:
            if name in LABELS: texts.setdefault(LABELS[name], []).append(getattr(value, "value", None))
    return {kind: ", ".join(filter(None, dict.fromkeys(found))) for kind, found in texts.items()
            if all(isinstance(text, str) for text in found) and any(found)}


@cache
def drawers() -> dict[str, str]:
    """What each function of sdpo_nb.view that draws a figure says of itself."""
    nodes = [node for name in ("plots", "attempts") for node in ast.parse((DRAWERS / f"{name}.py").read_text("utf-8")).body]
    return {node.name: ast.get_docstring(node) or "" for node in nodes
            if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) == "'Figure'"}


def described(source: str, heading: str, before: str) -> str:
    """Words for a figure, from the code that draws it, the heading above it and the prose directly before it."""
    words, last = named(source), re.split(r"(?<=[.!?])\s", plain(before))[-1]
    axes = " over ".join(words[kind] for kind in "yx" if kind in words)
    drawn = {call.func.id for call in calls(source) if isinstance(call.func, ast.Name)} & set(drawers())
    if "y" in words or "title" in words: what = "; ".join(filter(None, [words.get("title"), axes, words.get("line")]))
    elif len(drawn) == 1: what = drawers()[drawn.pop()]
    elif axes and not last.endswith(":"): what = f"a figure, its axis: {axes}"
    else: what = last or "a figure"
    return ": ".join(filter(None, [plain(heading), what.rstrip(".: ")]))


def quoted(source: str) -> str:
    """A cell whose words for figures stand in quotes, as YAML wants them where they hold a colon."""
    bare = re.compile(r"^(#\| *fig-(?:alt|cap): *)([^\s\"'\[].*?)\s*$", re.MULTILINE)
    return bare.sub(lambda found: found[1] + json.dumps(found[2], ensure_ascii=False), source)


def pictures(cell: dict) -> int:
    """How many pictures a cell shows."""
    return sum(any(kind in output.get("data", {}) for kind in PICTURES) for output in cell.get("outputs", ()))


class DescribeFigures:
    """The hook that nbdev runs on each notebook that it turns into a page."""

    def __init__(self, nb: dict):
        self.nb = nb

    def end(self) -> None:
        """Give each picture that has none its words."""
        heading, before = (getattr(self.nb, "frontmatter_", None) or {}).get("title", ""), ""
        for cell in self.nb.cells:
            source = cell.source = (cell.source or "").replace(*FOLDS)
            if cell.cell_type == "markdown":
                *above, before = re.split(r"^#+ +(.+?)(?: *\{.*\})?$", source, flags=re.MULTILINE)
                heading = above[-1] if above else heading
                continue
            if re.search(r"^#\| *fig-(alt|cap)\b", source, re.MULTILINE): cell.source = quoted(source)
            elif count := pictures(cell):
                words = described(re.sub(r"^#\|.*\n", "", source, flags=re.MULTILINE), heading, before)
                each = [f"{words} ({i} of {count})" for i in range(1, count + 1)] if count > 1 else words
                cell.source = f"#| fig-alt: {json.dumps(each, ensure_ascii=False)}\n{source}"
            if cell.get("outputs"): before = ""  # it was about that
