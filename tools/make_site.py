"""Build the documentation site from the notebooks, and refuse what a reader would stumble over.

    python -m tools.make_site                  _proc (nbdev's pages) -> _docs
    python -m tools.make_site --check          only judge the notebooks
    python -m tools.make_site --check-site X   only judge a site that is built: links, anchors, pictures, requests
    python -m tools.make_site --finish X       mend what Quarto does to what notebooks showed, and judge its site

Pages come from nbdev's `proc_nbs`, which ran what `show_doc` needs; navigation from nbs/sidebar.yml; addresses are
those that Quarto gives them; figures have their words from tools/describe_figures.py. zensical makes the site. Beside
each page stands its text for machines, page.html.md, where the docstrings of modules look for it: Quarto writes one too.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from string import Template
from urllib.parse import unquote, urlsplit

import yaml

from tools.site_pages import Page, Refused, Tree, check, read_pages, read_sidebar
from tools.site_writer import Writer, switched

ROOT = Path(__file__).resolve().parent.parent
LOOK = Path(__file__).resolve().parent / "site"  # zensical.toml and a style sheet


def toml(value: object) -> str:
    """Texts, lists and tables as TOML."""
    if isinstance(value, list): return f"[{', '.join(map(toml, value))}]"
    if not isinstance(value, dict): return json.dumps(value, ensure_ascii=False)
    return "{ " + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + " }"


def navigation(tree: Tree, pages: dict[str, Page]) -> list[dict]:
    """The sidebar as zensical wants it; "The book: Core" and "The book: Loss" become two parts of one section."""
    def entry(title, item):
        if isinstance(item, list): return {title: navigation(item, pages)}
        page = pages.get(item)
        return {title or page.front["title"]: str(page.url.with_suffix(".md"))} if page else {title: item}
    made = []
    for title, item in tree:
        whole, _, part = title.partition(": ")
        if not (part and isinstance(item, list)): made.append(entry(title, item))
        elif made and whole in made[-1]: made[-1][whole].append(entry(part, item))
        else: made.append({whole: [entry(part, item)]})
    return made


def write(path: Path, content: bytes | str) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_pages(root: Path, folder: Path, pages: list[Page], website: dict) -> dict[str, list[str]]:
    """Write the pages' Markdown, for zensical and for machines, and the files that they show; the HTML that they lack."""
    repository, docs = f"{website['repo-url']}/blob/{website['repo-branch']}", folder / "docs"
    known, slots, missing = {str(page.path): page.url for page in pages}, {}, []
    for page in pages:
        writer = Writer(page, known, website["site-url"].rstrip("/") + "/", repository, root)
        write(docs / page.url.with_suffix(".md"), writer.markdown())
        write(folder / "texts" / f"{page.url}.md", writer.text())
        for name, content in writer.files.items(): write(docs / name, content)
        slots[str(page.url)] = writer.slots
        missing += writer.missing
    if missing: raise Refused("\n".join(dict.fromkeys(missing)))
    return slots


def write_look(root: Path, folder: Path, nav: list[dict], website: dict) -> None:
    """Write zensical's settings, and the style sheets."""
    for path in (LOOK / "site.css", root / "nbs" / "styles.css", root / "nbs" / "images" / "icon.svg"):
        write(folder / "docs" / "assets" / path.name, path.read_bytes())
    shutil.copytree(LOOK, folder / "overrides", ignore=shutil.ignore_patterns("*.css", "*.toml"))
    settings = {"title": website["title"], "address": website["site-url"], "description": website["description"],
                "repository": website["repo-url"], "navigation": nav}
    template = Template((LOOK / "zensical.toml").read_text(encoding="utf-8"))
    write(folder / "zensical.toml", template.substitute({name: toml(value) for name, value in settings.items()}))


def fill(site: Path, slots: dict[str, list[str]]) -> None:
    """Put into each page what was kept out of its Markdown."""
    for name, contents in slots.items():
        path = site / name
        text = path.read_text(encoding="utf-8")
        mark = re.compile(r'<(div|span) data-slot="?(\d+)"?></\1>')
        path.write_text(mark.sub(lambda found: contents[int(found[2])], steady(text)), encoding="utf-8")
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('<html lang="en"', '<html lang="en-GB"', 1), encoding="utf-8")


def layer(site: Path) -> None:
    """Put the theme beneath all other style sheets, so that what a notebook shows can be kept free of it (site.css)."""
    for path in (site / "assets" / "stylesheets").rglob("*.css"):
        text = path.read_text(encoding="utf-8").removeprefix('@charset "UTF-8";')
        path.write_text(f"@layer theme{{{text}}}", encoding="utf-8")


def steady(page: str) -> str:
    """A page whose tables scroll on a phone: cells of sentences keep a width, and a few words keep to one line."""
    def cell(found):
        length = len(re.sub(r"<[^>]+>", "", found[2]))
        return "<td class=prose" if length > 40 else "<td class=brief" if length < 21 else "<td"
    return re.sub(r"<td(?=([^>]*)>(.*?)</td>)", cell, page, flags=re.DOTALL)


def shorten(site: Path) -> None:
    """Leave code out of the search: headings name what it defines, and newcomers load less."""
    path = site / "search.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for item in index["items"]: item["text"] = re.sub(r"<pre.*?</pre> ?", "", item["text"], flags=re.DOTALL)
    path.write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def widen(site: Path) -> None:
    """Let the navigation stand in its column from 1200 pixels on, not from 1220."""
    widths = {"76.25em": "75em", "76.234375em": "74.984375em", "76.2344em": "74.9844em", "1220px": "1200px",
              "1219px": "1199px"}
    changed = []
    for path in [*site.rglob("*.css"), *site.rglob("*.js")]:
        text = path.read_text(encoding="utf-8")
        wider = re.sub("|".join(map(re.escape, widths)), lambda found: widths[found[0]], text)
        if wider != text: changed.append(path.suffix)
        path.write_text(wider, encoding="utf-8")
    if ".css" not in changed: raise Refused("this zensical has other breakpoints: see widen() in tools/make_site.py")


def build(root: Path, out: Path) -> None:
    """Judge the pages, make the site of them, judge it, and put it in its place."""
    pages = read_pages(root)
    tree = read_sidebar(root, pages)
    check(pages, tree)
    website = yaml.safe_load((root / "nbs" / "nbdev.yml").read_text(encoding="utf-8"))["website"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slots = write_pages(root, folder, pages, website)
        write_look(root, folder, navigation(tree, {str(page.path): page for page in pages}), website)
        command = [sys.executable, "-m", "zensical", "build", "--config-file", str(folder / "zensical.toml")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode: raise Refused(done.stdout + done.stderr)
        fill(folder / "site", slots)
        shorten(folder / "site")
        widen(folder / "site")
        layer(folder / "site")
        shutil.copytree(folder / "texts", folder / "site", dirs_exist_ok=True)
        check_site(folder / "site")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "site", out)
    print(f"{len(pages)} pages stand in {os.path.relpath(out)}")


LOADERS = re.compile(  # Quarto adds them wherever a notebook shows HTML; nothing of ours asks for them
    r"<script[^>]*cdnjs\.cloudflare\.com/ajax/libs/(?:require\.js|jquery)/[^>]*></script>\s*"
    r"|<script[^>]*>\s*define\('jquery'[^<]*</script>\s*")


def finish(site: Path) -> None:
    """Let dark colours follow Quarto's switch, take out the scripts that it would fetch from elsewhere, and judge."""
    for path in site.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        path.write_text(LOADERS.sub("", switched(page, "body.quarto-dark")), encoding="utf-8")
    check_site(site)


class Links(HTMLParser):
    """What a page leads to, asks for, shows and can be led to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets, self.asked, self.anchors, self.wordless = [], [], {"", "top"}, []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what matters of a tag."""
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"): self.targets.append(given["href"])
        if tag == "img" and not (given.get("alt") or "").strip(): self.wordless.append(given.get("src") or "a picture")
        if tag == "link" and not {"canonical", "next", "prev", "alternate"} & set((given.get("rel") or "").split()):
            self.asked.append(given.get("href") or "")
        elif tag in ("img", "script", "iframe", "video", "audio", "source", "embed") and given.get("src"):
            self.asked.append(given["src"])
        if tag == "source" and given.get("srcset"): self.asked.append(given["srcset"])


def lost(site: Path, path: Path, target: str, anchors: dict[Path, set[str]]) -> str:
    """Why a link within the site leads nowhere, nothing where it does not."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or target.startswith("/"): return ""
    goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if goal.is_dir(): goal /= "index.html"
    if not goal.exists() or not goal.is_relative_to(site): return f"leads to {target}, which is not there"
    place = unquote(parts.fragment)
    return "" if place in anchors.get(goal, {place}) else f"leads to {target}: no such anchor"


def check_site(site: Path) -> None:
    """Refuse a site for links and anchors that lead nowhere, pictures without words, and requests to other machines."""
    site, wrong = site.resolve(), []
    found = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    anchors = {path: page.anchors for path, page in found.items()}
    for path, page in found.items():
        what = [lost(site, path, target, anchors) for target in dict.fromkeys([*page.targets, *page.asked])]
        what += [f"shows {picture} without words for it" for picture in page.wordless]
        what += [f"asks another machine for {address}" for address in page.asked if urlsplit(address).netloc]
        wrong += [f"{path.relative_to(site)}: {one}" for one in what if one]
    if wrong: raise Refused("\n".join(wrong))


def main() -> None:
    """Build, or judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project")
    parser.add_argument("--out", type=Path, help="where the site shall stand, _docs in the project unless told")
    parser.add_argument("--check", action="store_true", help="judge the notebooks, and build nothing")
    parser.add_argument("--check-site", type=Path, metavar="X", help="judge a site that is built")
    parser.add_argument("--finish", type=Path, metavar="X", help="mend a site that Quarto built, and judge it")
    chosen = parser.parse_args()
    try:
        if chosen.check_site: check_site(chosen.check_site)
        elif chosen.finish: finish(chosen.finish)
        elif chosen.check: check(pages := read_pages(chosen.root), read_sidebar(chosen.root, pages))
        else: build(chosen.root.resolve(), chosen.out or chosen.root / "_docs")
    except Refused as wrong: sys.exit(f"{wrong}\nrefused; things to mend: {len(str(wrong).splitlines())}")


if __name__ == "__main__": main()
