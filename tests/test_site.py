"""The documentation site: what it refuses, how notebooks become pages, and that Quarto can read its settings."""
import html
import json
import re
import struct
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import yaml
from nbdev.quarto import refresh_quarto_yml
from sdpo_nb.view.style import INK

from tools import describe_figures, make_readme, make_site, site_pages, site_writer

ROOT = Path(__file__).resolve().parent.parent
FRONT = "---\ntitle: A page\ndescription: What it is for.\noutput-file: {name}.html\n---\n"
SEEN = {"output_type": "stream", "name": "stdout", "text": "seen\n"}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
DRAWN = {"output_type": "display_data", "metadata": {}, "data": {"image/png": PNG, "text/plain": "<Figure>"}}


def code(source: str, *outputs: dict, id: str = "c0de") -> dict:
    """A code cell and what it showed."""
    return {"cell_type": "code", "id": id, "metadata": {}, "source": source, "outputs": list(outputs)}


def prose(source: str) -> dict:
    """A Markdown cell."""
    return {"cell_type": "markdown", "id": "prose", "metadata": {}, "source": source}


def page(*cells: dict, path: str = "page.ipynb", front: str = FRONT) -> site_pages.Page:
    """A page of these cells, as its author wrote it and, the same but for the front matter, as nbdev left it."""
    front = {"cell_type": "raw", "metadata": {}, "source": front.format(name=Path(path).stem)}
    return site_pages.Page(PurePosixPath(path), {"cells": list(cells)}, {"cells": [front, *cells]})


def project(root: Path, pages: list[site_pages.Page], sidebar: object) -> Path:
    """A project of its own with these pages."""
    website = {"title": "Ours", "description": "A site.", "site-url": "https://example.org/ours",
               "repo-url": "https://example.org/code", "repo-branch": "main"}
    for folder, name in (("nbs", "written"), ("_proc", "processed")):
        for one in pages:
            path = root / folder / one.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(getattr(one, name)), encoding="utf-8")
    (root / "nbs" / "nbdev.yml").write_text(yaml.safe_dump({"website": website}))
    (root / "nbs" / "sidebar.yml").write_text(yaml.safe_dump({"website": {"sidebar": {"contents": sidebar}}}))
    (root / "nbs" / "styles.css").write_text("")
    (root / "nbs" / "images").mkdir()
    (root / "nbs" / "images" / "icon.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return root


def written(
    *cells: dict, path: str = "page.ipynb", root: Path = ROOT, known: dict | None = None
) -> tuple[str, site_writer.Writer]:
    """A page's Markdown, and what wrote it."""
    ours, code = "https://example.org/ours/", "https://example.org/code"
    writer = site_writer.Writer(page(*cells, path=path), known or {}, ours, code, root)
    return writer.markdown(), writer


# What is refused


@pytest.mark.parametrize("given, complaint", [
    (page(front="---\ntitle: A page\n---\n"), "has no description; begin with `# Title`"),
    (page(front="---\ndescription: What it is for.\n---\n"), "has no title"),
    (page(code("1 + 1")), "has code and no outputs"),
    (page(code("x", {"output_type": "error", "ename": "NameError", "evalue": "no x"})), "NameError: no x"),
    (page(code("model.to('cuda')", SEEN)), "would run on a GPU in cell c0de"),
    (page(code("load(device='cuda:0')", SEEN)), "would run on a GPU"),
    (page(code("torch.cuda.synchronize()", SEEN)), "would run on a GPU"),
    (page(code("#| gpu\nimport torch\nmodel.cuda()", SEEN)), "would run on a GPU"),
    (page(code("draw()", DRAWN)), "shows a figure without words in cell c0de"),
    (page(code("draw()", DRAWN), path="how/page.ipynb"), "shows a figure in cell c0de and does not say of what"),
    (page(code("#| fig-alt: One: and two\ndraw()", DRAWN)), "has words that YAML misreads"),
    (page(prose("# A page\n> What it is for.\n- key: value\n\nLost.")), "loses `Lost.`: nbdev drops"),
    (page(prose("See ![](flow.svg)")), "shows flow.svg without words for it"),
])
def test_a_page_is_refused(given, complaint):
    with pytest.raises(site_pages.Refused, match=re.escape(complaint)): site_pages.check([given], [("", "page.ipynb")])


@pytest.mark.parametrize("given", [
    page(prose("No code at all, and `![](shown)` is code.")),
    page(code("#| eval: false\n# not run here: needs a GPU\nmodel.cuda()"), code("1", SEEN)),
    page(code("#| gpu\nmodel.cuda()"), code("1", SEEN)),
    page(code("#| exports\ndef run(model): return model.to('cuda')"), code("1", SEEN)),
    page(code("torch.cuda.is_available() and model.cuda()", SEEN)),
    page(code("pick('cuda', torch.device('cuda'))", SEEN)),
    page(code("1"), front=FRONT.replace("output-file", "no-outputs: they are secret\noutput-file")),
    page(code('#| fig-alt: "A curve."\ndraw()', DRAWN)),
])
def test_a_page_is_not_refused(given):
    site_pages.check([given], [("", "page.ipynb")])


def test_all_that_is_wrong_is_said_at_once():
    given = [page(code("1"), path="one.ipynb"), page(prose("![](x.png)"), path="two.ipynb")]
    with pytest.raises(site_pages.Refused) as said: site_pages.check(given, [("", "one.ipynb"), ("", "gone.ipynb")])
    assert [line.split(":")[0] for line in str(said.value).splitlines()] == [
        "one.ipynb", "two.ipynb", "two.ipynb", "nbs/sidebar.yml"]


def test_a_sidebar_names_every_page_once():
    given = [page(path="one.ipynb"), page(path="01_one.ipynb", front=FRONT.replace("{name}", "one"))]
    wrong = list(site_pages.outside_navigation(given, [("", "one.ipynb"), ("More", [("", "one.ipynb")])]))
    assert wrong == ["01_one.ipynb: is not in nbs/sidebar.yml", "one.ipynb: is in nbs/sidebar.yml 2 times",
                     "one.ipynb: shares its address, one.html", "01_one.ipynb: shares its address, one.html"]


def test_a_sidebar_has_patterns_sections_and_words_of_its_own():
    contents = [{"section": "Book", "contents": "book/*.ipynb"}, {"section": "More", "contents": [
        "index.ipynb", {"text": "Words", "href": "glossary.ipynb"}]}]
    tree = list(site_pages.entries(contents, ["book/02.ipynb", "book/03.ipynb", "index.ipynb", "glossary.ipynb"]))
    assert tree == [("Book", [("", "book/02.ipynb"), ("", "book/03.ipynb")]),
                    ("More", [("", "index.ipynb"), ("Words", "glossary.ipynb")])]
    assert site_pages.named(tree) == ["book/02.ipynb", "book/03.ipynb", "index.ipynb", "glossary.ipynb"]


def test_sections_of_one_book_are_put_together():
    pages = {name: page(path=name) for name in ("a.ipynb", "b.ipynb")}
    tree = [("The book: Core", [("", "a.ipynb")]), ("The book: Loss", [("Loss", "b.ipynb")])]
    parts = [{"Core": [{"A page": "a.md"}]}, {"Loss": [{"Loss": "b.md"}]}]
    assert make_site.navigation(tree, pages) == [{"The book": parts}]


def test_pages_that_nbdev_has_not_seen_are_refused(tmp_path):
    root = project(tmp_path, [page(path="one.ipynb")], ["one.ipynb"])
    (root / "_proc" / "one.ipynb").unlink()
    with pytest.raises(site_pages.Refused, match="one.ipynb: not in _proc"): site_pages.read_pages(root)


# How a notebook becomes a page


@pytest.mark.parametrize("title, name", [
    ("See it learn", "see-it-learn"), ("`fit` and *why*", "fit-and-why"), ("kept_words", "kept_words"),
    ("Prompting.fill", "prompting.fill"), ("2. What's next?", "whats-next"), ("[A link](x.html), two", "a-link-two"),
    ("42", "section"),
])
def test_headings_have_the_anchors_of_quarto(title, name):
    assert site_writer.anchor(title) == name
    assert f"## {title} {{ #{name} }}" in written(prose(f"## {title}"))[0]


def test_an_anchor_that_is_taken_gets_a_number():
    text = written(prose("## Twice\n\n```sh\n# no heading\n```\n\n## Twice\n\n## Own {#mine}"))[0]
    assert re.findall(r"\{ #(.+) \}", text) == ["twice", "twice-1", "mine"] and "\n# no heading\n" in text


def test_maths_becomes_mathml_and_money_stays():
    text, writer = written(prose("It is $k \\le q$, not `$x$`, \\$5 or $6.\n\n$$\\frac{1}{2}$$"))
    assert "`$x$`, \\$5 or $6" in text and len(writer.slots) == 2
    assert writer.slots[0].startswith("<math") and "<mfrac>" in writer.slots[1] and 'display="block"' in writer.slots[1]


def test_a_bar_in_a_table_is_a_bar():
    assert "| `float | None` | a \\| b |" in written(prose("| type | what |\n|---|---|\n| `float \\| None` | a \\| b |"))[0]


@pytest.mark.parametrize("source, spaced", [
    (r"p \log q", "p log q"), (r"2\log(x)", "2 log(x)"), (r"-\log\theta", "−log θ"), (r"\exp x", "exp x")])
def test_a_function_in_a_formula_stands_apart(source, spaced):
    drawn = site_writer.mathml(source, "inline").replace('<mspace width="0.1667em"/>', " ")
    assert html.unescape(re.sub(r"<[^>]+>", "", drawn)) == spaced


def test_a_formula_is_not_parted_from_its_full_stop():
    text, writer = written(prose("## Of $f$, too\n\nNot ($g$).\n\nIt is $h$ alone."))
    assert '<span class="formula"><span data-slot="0"></span>,</span> too { #of-too }' in text
    assert '<span class="formula">(<span data-slot="1"></span>).</span>' in text
    assert 'is <span data-slot="2"></span> alone' in text and len(writer.slots) == 3


def test_links_lead_to_pages_files_and_the_repository(tmp_path):
    (tmp_path / "nbs" / "data").mkdir(parents=True)
    (tmp_path / "nbs" / "data" / "run.json").write_text("{}")
    (tmp_path / "setup.py").write_text("")
    known = {"11_loss.ipynb": PurePosixPath("loss.html"), "how/page.ipynb": PurePosixPath("how/page.html")}
    links = ("[`a`](../11_loss.ipynb#x) [b](../data/run.json) [c](../../setup.py)",
             "[d](https://example.org/ours/loss.html) [e](gone.ipynb) [f](#here) `[g](../11_loss.ipynb)`")
    text, writer = written(prose(" ".join(links)), path="how/page.ipynb", root=tmp_path, known=known)
    assert "[`a`](../loss.html#x) [b](../data/run.json) [c](https://example.org/code/setup.py)" in text
    assert "[d](../loss.html)" in text
    assert "[f](#here) `[g](../11_loss.ipynb)`" in text
    assert writer.files == {"data/run.json": b"{}"}
    assert writer.missing == ["how/page.ipynb: links to gone.ipynb, which is not there"]


def test_a_picture_for_phones_comes_along():
    both = '<picture><source srcset="images/flow_narrow.svg"><img src="images/flow.svg" alt="A flow"></picture>'
    assert sorted(written(prose(both))[1].files) == ["images/flow.svg", "images/flow_narrow.svg"]
    assert make_site.Links(both).asked == ["images/flow_narrow.svg", "images/flow.svg"]


def test_callouts_become_admonitions():
    callout, shown = "::: {.callout-warning}\n## Mind the gap\n\nIt is *wide*.\n:::", "```\n::: {.callout-tip}\n```"
    text = written(prose(f"{callout}\n\n{shown}"))[0]
    assert '<div class="admonition warning" markdown="block">\n<p class="admonition-title">Mind the gap</p>' in text
    assert text.count("admonition-title") == 1 and "\n::: {.callout-tip}\n" in text
    folded = written(prose('::: {.callout-note collapse="true" title="More"}\nText\n:::'))[0]
    assert '<details class="note" markdown="block">\n<summary>More</summary>' in folded


def test_a_cell_shows_what_quarto_would():
    shown = {"output_type": "execute_result", "data": {"text/markdown": "### `fit`"}}
    text, writer = written(
        code("#| echo: false\n#| output: asis\nshow()", shown),
        code('#| code-fold: true\n#| code-summary: "Exported source"\n#| exports: true\ndef f(): return "```"'),
        code("print('<b>')", {"output_type": "stream", "name": "stdout", "text": "\x1b[1m<b>\x1b[0m\n"}))
    assert "show()" not in text and "### `fit` { #fit }" in text and "exports" not in text
    assert '<details class="source" markdown="block">\n<summary>Exported source</summary>' in text  # folded, and there
    assert '</summary>\n\n````python\ndef f(): return "```"\n````\n\n</details>' in text
    assert writer.slots == ['<div class="output"><pre>&lt;b&gt;</pre></div>']


def test_the_readme_shows_pictures_from_near_and_afar(tmp_path):
    both = '<picture><source srcset="images/narrow.svg"><img src="images/flow.svg" alt="A flow"></picture>'
    near = "".join(make_readme.blocks([prose(both)]))
    assert near == both.replace('"images', '"nbs/images')
    afar = "https://raw.githubusercontent.com/sdpo-nb/sdpo-nb/main/"
    assert make_readme.from_afar(near, ROOT) == near.replace('"nbs', f'"{afar}nbs')


def test_a_figure_becomes_a_file_with_words():
    text, writer = written(code('#| fig-alt: "Up, \\"then\\" down"\ndraw()', DRAWN), path="how/page.ipynb")
    assert list(writer.files) == ["figures/how/page-c0de-0.png"] and 'data-slot="0"' in text
    words = 'alt="Up, &quot;then&quot; down" width="1" height="1"'
    assert f'src="../figures/how/page-c0de-0.png" {words}' in writer.slots[0]


def test_a_picture_is_as_large_as_its_resolution_says():
    def png(per_metre):
        return b"\x89PNG" + bytes(12) + struct.pack(">II", 1280, 640) + b"pHYs" + struct.pack(">II", *[per_metre] * 2)

    assert site_writer.png_size(png(10079)) == (480, 240) and site_writer.png_size(png(2835)) == (1280, 640)


def test_html_is_left_as_it_is_but_for_its_dark_colours_and_sizes():
    style = "@media (prefers-color-scheme: dark) { b { color: red } } @media (width < 40rem) { b { top: 1.5rem } }"
    shown = f"<style>{style}</style><script>go(1 < 2 && '$x$ 1rem')</script>"
    _, writer = written(code("lens", {"output_type": "display_data", "data": {"text/html": shown}}))
    assert "<script>go(1 < 2 && '$x$ 1rem')</script>" in writer.slots[0]
    assert "@media (width < 40rem) { b { top: 1.2rem } }" in writer.slots[0]
    assert '[data-md-color-scheme="slate"] { b { color: red } }' in writer.slots[0]


@pytest.mark.parametrize("source, words", [
    ('axes.plot(x, label="ours"); axes.set(xlabel="step", ylabel="loss")', "Two runs: loss over step; ours"),
    ('axes.plot(x, label=name); axes.set(xlabel="step", ylabel="loss")', "Two runs: loss over step"),  # some, not all
    ('axes.set_title("EMA"); axes.set_ylabel("loss"); other.set_title("Live")', "Two runs: EMA, Live; loss"),
    ('axes.set(xlabel="step")', "Two runs: a figure, its axis: step"),
    ("candidate_bars(token)",
     "Two runs: What the student would have said, and what the teacher would have said, side by side"),
    ("plot_curve(runs)", "Two runs: The other does not"),
])
def test_figures_are_described_from_what_they_say_themselves(source, words):
    prose = "The first [learns](x.html) `soon`. The other does not."
    assert describe_figures.described(source, "Two `runs`", prose) == words


def test_nbdev_is_told_the_words():
    class Cell(dict):
        __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__

    cells = [Cell(prose("Of something else.\n\n# Top\n\nOpening.")), Cell(code("draw()", DRAWN, DRAWN)), Cell(code("draw()", DRAWN)),
             Cell(code('#| fig-cap: "Own"\ndraw()', DRAWN)), Cell(code('#| fig-alt: Own: a "quote"\ndraw()', DRAWN)),
             Cell(code('#| code-fold: show\n#| code-summary: "Exported source"\ndef f(): ...'))]
    notebook = type("Notebook", (), {"cells": cells, "frontmatter_": {"title": "T"}})
    describe_figures.DescribeFigures(notebook).end()
    assert cells[1].source == '#| fig-alt: ["Top: Opening (1 of 2)", "Top: Opening (2 of 2)"]\ndraw()'
    assert cells[2].source == '#| fig-alt: "Top: a figure"\ndraw()'  # the opening was about the one before
    assert cells[3].source == '#| fig-cap: "Own"\ndraw()'
    assert cells[4].source == '#| fig-alt: "Own: a \\"quote\\""\ndraw()'
    assert cells[5].source == '#| code-fold: true\n#| code-summary: "Exported source"\ndef f(): ...'


def test_every_page_but_a_chapter_says_what_its_figures_show():
    paths = [path for path in sorted((ROOT / "nbs").glob("*/*.ipynb")) if path.parent.name[0] not in "._"]
    pages = [site_pages.Page(PurePosixPath(path.relative_to(ROOT / "nbs")), site_pages.read(path), {}) for path in paths]
    assert len(pages) >= 30 and [f"{one.path} {what}" for one in pages for what in site_pages.without_own_words(one)] == []


def test_a_page_is_told_to_machines_too():
    text = written(prose("See $a$ and [b](11_loss.ipynb)."), code("#| fig-alt: \"A curve\"\ndraw()", SEEN, DRAWN),
                   code("#| include: false\nhidden"), known={"11_loss.ipynb": PurePosixPath("loss.html")})[1].text()
    assert text == ("# A page\n\n> What it is for.\n\nSee $a$ and [b](loss.html).\n\n```python\ndraw()\n```\n\n"
                    "```\nseen\n```\n\nFigure: \"A curve\"\n")


# The site


def contrast(colour: str, page: str, brighter: float = 1) -> float:
    """WCAG's contrast of two colours, the first made brighter as CSS does it."""
    def light(colour, factor):
        parts = [min(1, factor * int(colour[i:i + 2], 16) / 255) for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(part * share for part, share in zip(linear, (0.2126, 0.7152, 0.0722))) + 0.05
    dark, bright = sorted((light(colour, brighter), light(page, 1)))
    return bright / dark


def test_the_ink_of_figures_stands_out_on_both_grounds():
    look = (ROOT / "tools" / "site" / "site.css").read_text(encoding="utf-8")
    ground = re.search(r"--md-default-bg-color: (#\w{6})", look)[1]
    brighter = float(re.search(r'\[data-md-color-scheme="slate"\] figure.output > \* \{ filter: brightness\((.+)\)', look)[1])
    assert contrast(INK, "#ffffff") > 4.5 > contrast(INK, ground) and contrast(INK, ground, brighter) > 4.5
    darkly, quarto = "#222222", (ROOT / "nbs" / "styles.css").read_text(encoding="utf-8")  # Bootswatch's ground
    brighter = float(re.search(r"body\.quarto-dark .cell-output img \{ filter: brightness\((.+?)\)", quarto)[1])
    assert contrast(INK, darkly) < 4.5 < contrast(INK, darkly, brighter)


def test_cells_of_sentences_keep_a_width():
    page = make_site.steady("<td>some twenty-five letters</td><td style=x><a href='" + "y" * 50 + "'>short</a></td><td>" + "A sentence. " * 4 + "</td>")
    assert re.findall("<td[^>]*>", page) == ["<td>", "<td class=brief style=x>", "<td class=prose>"]


@pytest.mark.parametrize("body, complaint", [
    ('<a href="gone.html">x</a>', "index.html: leads to gone.html, which is not there"),
    ('<a href="other.html#gone">x</a>', "index.html: leads to other.html#gone: no such anchor"),
    ('<a href="#gone">x</a>', "leads to #gone: no such anchor"),
    ('<img src="x.png" alt="X">', "leads to x.png, which is not there"),
    ('<img src="other.html" alt=" ">', "shows other.html without words"),
    ('<script src="https://cdn.example.org/x.js"></script>', "asks another machine for https://cdn.example.org/x.js"),
    ('<link rel="stylesheet" href="//fonts.example.org">', "asks another machine for //fonts.example.org"),
])
def test_a_site_is_refused(tmp_path, body, complaint):
    (tmp_path / "index.html").write_text(f"<h1 id=top>Ours</h1>{body}")
    (tmp_path / "other.html").write_text('<h2 id="there">Other</h2>')
    with pytest.raises(site_pages.Refused, match=re.escape(complaint)): make_site.check_site(tmp_path)


def test_a_site_without_fault_is_not_refused(tmp_path):
    (tmp_path / "index.html").write_text('<link rel="canonical" href="https://x.org"><a href="sub/#b">x</a>')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "index.html").write_text('<b id="b"></b><a href="../index.html">z</a><a href="#">top</a>')
    make_site.check_site(tmp_path)


def test_a_site_is_built(tmp_path):
    home = page(prose("## Doors\n\nTo [the loss](11_loss.objectives.ipynb#kl) and $a^2$."), path="index.ipynb")
    lens = {"output_type": "display_data", "data": {"text/html": "<script>1 && 2</script>"}}
    loss = page(prose("### kl"), code("kl()", SEEN, lens),
                code('#| fig-alt: "A curve"\ndraw()', DRAWN, id="d4aw"), path="11_loss.objectives.ipynb",
                front=FRONT.replace("{name}", "loss.objectives"))
    deep = page(prose("[Home](../index.ipynb)\n\n::: {.callout-tip}\nA tip.\n:::"), path="how/do.ipynb")
    book, how = {"section": "Book: Loss", "contents": [str(loss.path)]}, {"section": "How", "contents": "how/*.ipynb"}
    root = project(tmp_path, [home, loss, deep], ["index.ipynb", book, how])
    command = [sys.executable, "-m", "tools.make_site", "--root", root, "--out", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    names = "index.html", "loss.objectives.html", "how/do.html"
    home, loss, deep = ((tmp_path / "site" / name).read_text() for name in names)
    assert "<msup>" in home and 'href="loss.objectives.html#kl"' in home and 'id="kl"' in loss
    assert "<script>1 && 2</script>" in loss and "<pre>seen</pre>" in loss and 'alt="A curve"' in loss
    assert 'class="admonition tip"' in deep and "A tip." in deep and (tmp_path / "site" / "figures").is_dir()
    assert "data-slot" not in home + loss + deep and '<html lang="en-GB"' in home
    assert "<title>A page - Ours</title>" in deep and '<meta property="og:title" content="A page">' in deep
    assert '<meta property="og:url" content="https://example.org/ours/how/do.html">' in deep
    lost, text = ((tmp_path / "site" / name).read_text() for name in ("404.html", "loss.objectives.html.md"))
    assert 'href="/ours/index.html">the first page</a>' in lost and "<title>Ours</title>" in lost
    assert text.startswith("# A page\n\n> What it is for.") and "```\nseen\n```" in text
    sheets = [*(tmp_path / "site" / "assets" / "stylesheets").rglob("*.css")]
    assert sheets and all(sheet.read_text(encoding="utf-8").startswith("@layer theme{") for sheet in sheets)


QUARTO = """<html><head>
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="x" crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" data-relocate-top="true"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script src="own.js"></script></head><body class="quarto-light">%s</body></html>"""  # its src/core/jupyter/widgets.ts


def test_a_site_of_quarto_is_finished(tmp_path):
    shown = "<style>@media (prefers-color-scheme: dark) { .sdpo { color: red } }</style><pre>(prefers-color-scheme: dark)</pre>"
    (tmp_path / "own.js").write_text("")
    (tmp_path / "index.html").write_text(QUARTO % shown)
    with pytest.raises(site_pages.Refused, match="asks another machine for https://cdnjs"): make_site.check_site(tmp_path)
    make_site.finish(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<style>body.quarto-dark { .sdpo { color: red } }</style><pre>(prefers-color-scheme: dark)</pre>" in page
    assert re.findall("<script.*", page) == ['<script src="own.js"></script></head><body class="quarto-light">'
                                             + page.split('"quarto-light">')[1].split("</body>")[0] + "</body></html>"]


def test_a_build_that_is_refused_leaves_the_old_site(tmp_path):
    root, old = project(tmp_path, [page(code("1"))], ["page.ipynb"]), tmp_path / "site"
    old.mkdir()
    command = [sys.executable, "-m", "tools.make_site", "--root", root, "--out", old]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "page.ipynb: has code and no outputs" in done.stderr and old.exists()


# Quarto. What its settings may hold is from its schema: github.com/quarto-dev/quarto-cli, src/resources/schema/
# (project.yml 081bb49, definitions.yml 001b400, document-code.yml 150bc01), as far as we use it.

ITEM = {"aria-label": {str}, "href": {str}, "icon": {str}, "menu": {list}, "text": {str}, "rel": {str}, "target": {str}}
NAVBAR = {
    "title": {str, bool}, "logo": {str}, "background": {str}, "foreground": {str}, "search": {bool}, "pinned": {bool},
    "collapse": {bool}, "left": [ITEM], "right": [ITEM],
}
SIDEBAR = {
    "style": {"docked", "floating"}, "search": {bool}, "contents": {list}, "collapse-level": {int},
    "background": {str}, "border": {bool},
}
WEBSITE = {
    "title": {str}, "description": {str}, "favicon": {str}, "image": {str}, "site-url": {str}, "site-path": {str},
    "repo-url": {str}, "repo-subdir": {str}, "repo-branch": {str}, "repo-actions": {str, list},
    "search": {bool}, "page-navigation": {bool}, "back-to-top-navigation": {bool}, "bread-crumbs": {bool},
    "open-graph": {bool}, "twitter-card": {bool}, "page-footer": {str}, "navbar": NAVBAR, "sidebar": SIDEBAR,
}
HTML = {
    "theme": {"light": {str, list}, "dark": {str, list}}, "respect-user-color-scheme": {bool}, "css": {str, list}, "toc": {bool}, "toc-depth": {int},
    "code-copy": {bool, "hover"}, "code-overflow": {"scroll", "wrap"},
    "html-math-method": {"plain", "webtex", "gladtex", "mathml", "mathjax", "katex"},
}
SCHEMA = {
    "project": {"type": {"default", "website", "book", "manuscript"}, "render": {list}, "output-dir": {str},
                "resources": {str, list}, "execute-dir": {"file", "project"}},
    "lang": {str}, "metadata-files": {list}, "format-links": {list, bool}, "website": WEBSITE,
    "html-table-processing": {"none"},
    "execute": {"enabled": {bool}, "freeze": {bool, "auto"}, "echo": {bool, "fenced"}, "cache": {bool, "refresh"}},
    "format": {"html": HTML, "commonmark": {"default"}},
}


def misfits(given: object, schema: object, place: str = "") -> list[str]:
    """The places where settings are not as the schema wants them."""
    if isinstance(schema, set):
        return [] if type(given) in schema or (isinstance(given, str) and given in schema) else [place]
    if isinstance(schema, list):
        if not isinstance(given, list): return [place]
        items = {f"{place}/{i}": item for i, item in enumerate(given) if not isinstance(item, str)}
        return [wrong for where, item in items.items() for wrong in misfits(item, schema[0], where)]
    if not isinstance(given, dict): return [place]
    unknown = [f"{place}/{key}" for key in given if key not in schema]
    known = [key for key in given if key in schema]
    return unknown + [wrong for key in known for wrong in misfits(given[key], schema[key], f"{place}/{key}")]


@pytest.fixture(scope="module", autouse=True)
def nbdevs_own_settings() -> None:
    """nbs/nbdev.yml, which nbdev writes and git ignores."""
    refresh_quarto_yml()


def settings(name: str) -> dict:
    """One of the files that Quarto reads."""
    return yaml.safe_load((ROOT / "nbs" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["_quarto.yml", "nbdev.yml", "sidebar.yml"])
def test_quarto_knows_every_setting(name):
    assert misfits(settings(name), SCHEMA) == []


def test_a_setting_that_quarto_does_not_know_is_found():
    wrong = {"website": {"navbar": {"left": ["a.ipynb", {"txt": "A"}]}, "sidebar": {"style": "fixed"}}}
    assert misfits(wrong, SCHEMA) == ["/website/navbar/left/1/txt", "/website/sidebar/style"]


def test_what_quarto_is_told_to_use_is_there():
    found = settings("_quarto.yml")
    themes = [name for look in found["format"]["html"]["theme"].values() for name in look if name.endswith(".scss")]
    doors = [item["href"] for item in found["website"]["navbar"]["left"]]
    files = [found["website"]["favicon"], found["website"]["image"], found["format"]["html"]["css"]]
    files += found["metadata-files"]
    assert len(doors) == 7 and [name for name in files + themes + doors if not (ROOT / "nbs" / name).exists()] == []
    assert "$web-font-path: false" in (ROOT / "nbs" / "theme.scss").read_text()  # cosmo's are on Google's machines
    assert found["format"]["html"]["html-math-method"] == "mathml" and found["execute"]["enabled"] is False


def test_the_sidebar_leads_to_pages():
    pages = [path.relative_to(ROOT / "nbs").as_posix() for path in sorted((ROOT / "nbs").rglob("[!_.]*.ipynb"))]
    contents = settings("sidebar.yml")["website"]["sidebar"]["contents"]
    names = site_pages.named(list(site_pages.entries(contents, pages)))
    assert sorted(names) == sorted(set(pages))
