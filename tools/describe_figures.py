"""An nbdev `doc_procs` hook: on its way into the documentation every figure gets words for those who cannot see it.

What the author wrote stands: `#| fig-alt: ...`, or `#| fig-cap`, with quotes round it or without. Else the words are
those of the heading above the figure, with the labels of its axes where the cell names them, or the first sentence of the prose before it. They are
written as Quarto's own option, `fig-alt`, which tools/make_site.py reads too. And source that is exported is folded.
"""
import ast
import json
import re
from collections.abc import Iterator

PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
FOLDS = '#| code-fold: show\n#| code-summary: "Exported source"\n', '#| code-fold: true\n#| code-summary: "Exported source"\n'
LABELS = {"xlabel": "x", "ylabel": "y", "title": "title", "set_xlabel": "x", "set_ylabel": "y", "set_title": "title"}


def plain(markdown: str) -> str:
    """Markdown as one line of words."""
    words = re.sub(r"^```.*?^```|^\s*\|.*?$|<!--.*?-->", "", markdown, flags=re.DOTALL | re.MULTILINE)
    words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", words)
    return " ".join(re.sub(r"[`*$#>]|\\(?=\W)", "", words).split())


def named(source: str) -> Iterator[tuple[str, str]]:
    """The axes and titles that a cell names with plain strings: ("x", "alpha")."""
    try: nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError: return  # magics
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        texts = [(word.arg, word.value) for word in call.keywords]
        texts += [(call.func.attr, call.args[0])] if isinstance(call.func, ast.Attribute) and call.args else []
        for name, value in texts:
            if name in LABELS and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield LABELS[name], value.value


def described(source: str, heading: str, prose: str) -> str:
    """Words for a figure, from the code that draws it, the heading above it and the prose before it."""
    labels = dict(reversed(list(named(source))))
    axes = f"{labels['y']} over {labels['x']}" if {"x", "y"} <= set(labels) else labels.get("y", labels.get("x"))
    what = ", ".join(filter(None, [labels.get("title"), axes]))
    if not what: what = re.split(r"(?<=[.!?])\s", plain(prose), maxsplit=1)[0][:200].rstrip(".: ")
    return ": ".join(filter(None, [plain(heading), what]))


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
        heading, prose = (getattr(self.nb, "frontmatter_", None) or {}).get("title", ""), ""
        for cell in self.nb.cells:
            source = cell.source = (cell.source or "").replace(*FOLDS)
            if cell.cell_type == "markdown":
                titles = re.findall(r"^#+ +(.+?)(?: *\{.*\})?$", source, re.MULTILINE)
                heading, prose = (titles or [heading])[-1], re.sub(r"^#+ .*$", "", source, flags=re.MULTILINE)
            elif re.search(r"^#\| *fig-(alt|cap)\b", source, re.MULTILINE): cell.source = quoted(source)
            elif count := pictures(cell):
                words = described(re.sub(r"^#\|.*\n", "", source, flags=re.MULTILINE), heading, prose)
                each = [f"{words} ({i} of {count})" for i in range(1, count + 1)] if count > 1 else words
                if words: cell.source = f"#| fig-alt: {json.dumps(each, ensure_ascii=False)}\n{source}"
