"Write README.md from nbs/index.ipynb: its text, its code and what the code printed. `--check` fails where they differ."

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

NOTICE = "<!-- written from nbs/index.ipynb by tools/make_readme.py: edit the notebook -->\n\n"


def printed(cell: dict) -> str:
    "What a cell printed or displayed, as text."
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "".join("".join(part) for part in parts).rstrip()


def blocks(cells: list[dict]) -> Iterator[str]:
    "The page, block by block; hidden cells are left out, links and pictures are seen from the root."
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            source = re.sub(r"\]\((images|tutorials|experiments|explanations)/", r"](nbs/\1/", source)
            yield re.sub(r"\]\((\d\d[a-z]*_[\w.]+\.ipynb)", r"](nbs/\1", source)
        elif source and "#| hide" not in source:
            yield f"```python\n{source}\n```"
            if printed(cell): yield f"```\n{printed(cell)}\n```"


def readme(root: Path) -> str:
    "The README's text."
    cells = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    return NOTICE + "\n\n".join(blocks(cells)) + "\n"


def main() -> None:
    "Write, or check."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    options = parser.parse_args()
    path = options.root / "README.md"
    if not options.check: path.write_text(readme(options.root), encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != readme(options.root):
        sys.exit("README.md differs from nbs/index.ipynb; run: python tools/make_readme.py")


if __name__ == "__main__": main()
