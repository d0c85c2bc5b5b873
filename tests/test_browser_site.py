"""Every page of the documentation site in Chromium; pictures of some for people to look at.

The site is the one in _docs, or SDPO_SITE; where there is none, it is built.
"""
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browsing import HERE, ROOT, faint_texts, hidden_width, need, shot
from sdpo_nb.view.lens import snapshot

from tools import make_site

pytestmark = pytest.mark.browser
PROC = "from nbdev import quarto; quarto.refresh_quarto_yml(); quarto.proc_nbs(force=True, n_workers=0)"
FIRST_PAGE = 1_500_000  # bytes that a newcomer waits for
AT_A_GLANCE = {  # pictures to look at
    "home": "index.html", "chapter": "loss.objectives.html", "api": "learn.config.html", "widgets": "view.widgets.html",
    "experiment": "experiments/2026-11-20_demo.html", "tutorial": "tutorials/quickstart.html", "names": "api.html"}


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing of it."""

    def log_message(self, *args: object) -> None:
        """Leave it out."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the site's files are."""
    given = Path(os.environ.get("SDPO_SITE", ROOT / "_docs"))
    if (given / "assets" / "site.css").exists(): return given
    for package in ("zensical", "latex2mathml"): need(package)
    made = tmp_path_factory.mktemp("site") / "made"
    for command in (["-c", PROC], ["-m", "tools.make_site", "--out", str(made)]):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return made


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory) -> Iterator[str]:
    """The site as GitHub Pages serves it: in a folder of the machine."""
    root = tmp_path_factory.mktemp("served")
    (root / "sdpo-nb").symlink_to(folder.resolve())
    server = ThreadingHTTPServer((HERE, 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{HERE}:{server.server_port}/sdpo-nb/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def names(folder) -> list[str]:
    """The pages' addresses within the site."""
    return [str(path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*.html"))]


def flaws(page) -> list[str]:
    """What is wrong with the page in sight, on a screen and on a phone."""
    headings = "article :is(h1, h2, h3, h4):not(.output *)"  # a report that is shown has its own
    levels = page.locator(headings).evaluate_all("all => all.map(one => +one.tagName[1])")
    jumps = [(one, two) for one, two in zip(levels, levels[1:]) if two > max(one, 2) + 1]  # `show_doc` writes level 3
    found = [f"a heading of level {two} after one of {one}" for one, two in jumps]
    if levels[:1] != [1] or levels.count(1) > 1: found.append(f"{levels.count(1)} headings of level 1")
    wordless = page.locator("img:not([alt]), img[alt='']").count()
    if wordless: found.append(f"{wordless} images without words")
    if "\\(" in page.evaluate("[...document.querySelectorAll('article p, article li')].map(p => p.textContent).join()"):
        found.append("raw mathematics")
    if page.locator("[data-slot]").count(): found.append("something was left out")
    found += faint_texts(page)
    page.set_viewport_size({"width": 390, "height": 844})
    if (hidden := hidden_width(page)) > 0: found.append(f"{hidden} pixels hidden on a phone")
    page.set_viewport_size({"width": 1280, "height": 900})
    return found


def test_every_page_is_whole(open_page, address, names):
    """And none logs an error or asks another machine: the fixture hears it."""
    page, gone, wrong = open_page(address), [], {}
    page.on("response", lambda answer: gone.append(answer.url) if answer.status >= 400 else None)
    for name in names:
        page.goto(address + name)
        if found := flaws(page): wrong[name] = found
    assert gone == [] and wrong == {} and len(names) > 60


def test_every_word_stands_out_in_the_dark(open_page, address, names):
    page, faint = open_page(address, color_scheme="dark"), {}
    for name in names:
        page.goto(address + name)
        if found := faint_texts(page): faint[name] = found
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate" and faint == {}


def test_the_first_page_is_light(open_page, address):
    page, sizes = open_page("about:blank"), []
    page.on("response", lambda answer: sizes.append(len(answer.body())))
    page.goto(address, wait_until="networkidle")
    assert len(sizes) > 5 and sum(sizes) < FIRST_PAGE


def test_the_first_page_can_be_read_without_a_script(open_page, address):
    page = open_page(address, java_script_enabled=False)
    assert page.locator("h1").inner_text().startswith("sdpo-nb") and page.locator("article img").first.is_visible()
    words = page.locator("article").inner_text()
    assert "held-out pass rate: 0% before" in words and "pip install" in words
    assert page.locator(".md-sidebar--primary a:visible").count() and page.locator(".md-tabs a").count() >= 4
    shot(page, "site_no_script")


def test_the_doors_stand_open_on_the_first_page(open_page, address):
    page = open_page(address)
    doors = page.locator("#four-doors ~ * tr:visible").filter(has=page.locator("strong"))
    assert [door.locator("strong").first.inner_text().lower() for door in doors.all()[:4]] == [
        "tutorials", "how to", "explanations", "the book"]
    assert len({round(door.bounding_box()["y"]) for door in doors.all()[:4]}) == 2  # two rows of two


def test_the_navigation_stands_beside_the_page(open_page, address):
    page = open_page(address + "loss.objectives.html", width=1200)
    column, article = (page.locator(place).bounding_box() for place in (".md-sidebar--primary", "article"))
    assert page.get_by_role("link", name="Distillation loss").first.is_visible()
    assert column["x"] >= 0 and column["x"] + column["width"] <= article["x"] + 40


def test_the_search_finds(open_page, address):
    page = open_page(address)
    page.locator(".md-search__button:visible").click()
    page.get_by_role("combobox").fill("collapse")
    page.get_by_text("results").first.wait_for()
    page.get_by_text("Why the teacher is held back").first.wait_for()
    shot(page, "site_search")


def test_the_dark_mode_is_a_switch_that_widgets_follow(open_page, address):
    page = open_page(address + "view.widgets.html")
    paper = "one => getComputedStyle(one).backgroundColor"
    papers = lambda: [page.locator(place).first.evaluate(paper) for place in ("body", "article .sdpo")]
    before = papers()
    page.locator("label[for^=__palette]:visible").click()
    page.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")
    assert all(old != new for old, new in zip(before, papers()))


@pytest.mark.parametrize("machine", ["light", "dark"])
def test_widgets_follow_the_switch_of_quarto_and_not_the_machine(open_page, tmp_path, machine):
    """There is no Quarto here: a page with what a notebook kept, and the classes that Quarto's switch gives a body."""
    (tmp_path / "index.html").write_text(f'<body class="quarto-light">{snapshot("<p>A part</p>")}</body>')
    make_site.finish(tmp_path)
    page = open_page(tmp_path / "index.html", color_scheme=machine)
    paper = lambda: page.locator(".sdpo").evaluate("one => getComputedStyle(one).backgroundColor")
    light = paper()
    page.evaluate("document.body.className = 'quarto-dark'")
    assert (light, paper()) == ("rgb(247, 248, 249)", "rgb(15, 18, 22)")


def test_a_widget_answers(open_page, address):
    page = open_page(address + "view.widgets.html")
    tokens = page.locator("article .lens").first.locator(".token:visible")
    chosen = tokens.evaluate_all("all => all.map(one => one.matches('.chosen'))")
    token = tokens.nth(chosen.index(False))
    token.click()
    assert token.evaluate("token => token.matches('.chosen')")
    token.scroll_into_view_if_needed()
    shot(page, "site_lens")


def test_formulas_are_drawn(open_page, address):
    page = open_page(address + "learn.trees.html")
    assert page.locator("article math").count() >= 5 and page.locator("article math msup").count() >= 3
    assert all(one["width"] > 4 for one in (formula.bounding_box() for formula in page.locator("article math").all()))


def test_code_can_be_copied(open_page, address):
    page = open_page(address, permissions=["clipboard-read", "clipboard-write"])
    page.locator("article .highlight").first.hover()
    page.locator("article .highlight").first.get_by_role("button").first.click()
    assert "make demo" in page.evaluate("navigator.clipboard.readText()")


@pytest.mark.parametrize("name", AT_A_GLANCE)
def test_pictures_are_taken(open_page, address, names, name):
    assert AT_A_GLANCE[name] in names
    looks = {"light": {}, "dark": {"color_scheme": "dark"}, "phone": {"width": 390, "height": 844}}
    for look, options in looks.items():
        assert shot(open_page(address + AT_A_GLANCE[name], **options), f"site_{name}_{look}").stat().st_size > 10_000
