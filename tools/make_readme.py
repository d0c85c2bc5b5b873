"""Write README.md from nbs/index.ipynb: its text, its code and what the code printed. `--check` fails where they differ.

`--afar` writes what PyPI shows, where no files lie beside the page: its links lead to the repository.
"""

import argparse
import configparser
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
            yield re.sub(r"(\]\(|src(?:set)?=\")(?=[\w.]+\.ipynb|images/|tutorials/|how_to/|explanations/|experiments/)", r"\1nbs/", source)
        elif source and "#| hide" not in source:
            yield "```python\n" + re.sub(r"(?m)^#\|.*\n", "", source) + "\n```"
            if printed(cell): yield f"```\n{printed(cell)}\n```"


def readme(root: Path) -> str:
    "The README's text."
    cells = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    return NOTICE + "\n\n".join(blocks(cells)) + "\n"


def from_afar(page: str, root: Path) -> str:
    "A page whose links to files beside it lead to the repository."
    settings = configparser.ConfigParser()
    settings.read(root / "settings.ini", encoding="utf-8")
    url, branch = settings["DEFAULT"]["git_url"], settings["DEFAULT"]["branch"]
    raw = url.replace("github.com", "raw.githubusercontent.com")
    page = re.sub(r"(!\[[^]]*\]\(|src(?:set)?=\")(?!https?:)", rf"\g<1>{raw}/{branch}/", page)
    return re.sub(r"\]\((?!https?:|#)", f"]({url}/blob/{branch}/", page)


def main() -> None:
    "Write, or check."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--afar", action="store_true")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    options = parser.parse_args()
    path, page = options.root / "README.md", readme(options.root)
    if options.afar: page = from_afar(page, options.root)
    if not options.check: path.write_text(page, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != page:
        sys.exit("README.md differs from nbs/index.ipynb; run: python tools/make_readme.py")


if __name__ == "__main__": main()
