"""Pages as a reader sees them: a report that is a file, text that wants to be a script, and a live JupyterLab."""
import math
import sys
from pathlib import Path

import pytest
from browsing import complaints_of, faint_texts, hidden_width, shot

from sdpo_nb.core.records import AttemptReading, Feedback, StepReport, TeacherView, TokenReading
from sdpo_nb.view.report import write_report

pytestmark = pytest.mark.browser


# The harness

def test_a_page_that_complains_is_heard(browser):
    page = browser.new_page()
    heard = complaints_of(page)
    page.set_content("<img src='https://example.org/x.png'><script>console.error('oh'); throw Error('no')</script>")
    page.wait_for_load_state("networkidle")
    said = "\n".join(sorted(heard))
    assert "asked for https://example.org/x.png" in said and "logged oh" in said and "threw no" in said
    page.close()


def test_a_page_that_is_too_wide_or_too_faint_is_seen(browser):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_content("<div style='width: 500px'>plain</div><p style='color: rgb(0 0 0 / .3)'>faint</p>")
    assert hidden_width(page) > 100
    assert [line.split()[-1] for line in faint_texts(page)] == ["faint"]
    page.close()


# The report of a real run

@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of two steps of the demo."""
    from sdpo_nb.run.cli import main

    path = tmp_path_factory.mktemp("demo") / "report.html"
    assert main(["demo", "--steps", "2", "--out", str(path)]) == 0
    return path


def said_row(card) -> list[str]:
    """The row of both opinions that holds the token itself: student, token, teacher."""
    return card.locator(".bars tr.said").locator("th, td").all_inner_texts()


def test_the_report_opens_without_a_network(open_page, report):
    page = open_page(report)
    assert page.locator("h1").inner_text() == "SDPO on omega, feedback: full"
    assert page.locator(".figures").is_visible() and page.locator(".drawing.wide").is_visible()
    assert hidden_width(page) == 0
    shot(page, "report_wide", full_page=True)


def test_a_token_that_is_clicked_shows_both_opinions(open_page, report):
    card = open_page(report).locator(".attempt").first
    token = card.locator(".token:not(.chosen):has(em:not(:empty))").first
    name, opinions = token.get_attribute("aria-label").split(";")[0].split(": student ")
    token.click()
    card.page.mouse.move(0, 0)  # what is under the mouse is shown as well
    assert card.locator(".token.chosen span").inner_text() == name
    assert said_row(card) == [opinions.split(", teacher ")[0], name, opinions.split(", teacher ")[1]]
    longest = card.locator(".bars td:last-child i").evaluate_all("all => Math.max(...all.map(i => i.offsetWidth))")
    assert longest > 40  # the teacher's favourite
    shot(card.page, "report_token")


def test_the_mouse_looks_and_a_click_stays(open_page, report):
    card = open_page(report).locator(".attempt").first
    before = said_row(card)
    card.locator(".token:not(.chosen)").first.hover()
    assert said_row(card) != before
    card.page.mouse.move(0, 0)
    assert said_row(card) == before


def test_arrow_keys_move_through_an_attempt(open_page, report):
    page = open_page(report)
    tokens = page.locator(".attempt").first.locator(".token")
    tokens.first.click()
    places = []
    for key in "ArrowRight", "ArrowDown", "ArrowLeft", "End", "ArrowRight", "Home", "ArrowUp":
        page.keyboard.press(key)
        places.append(tokens.evaluate_all("all => all.findIndex(token => token.matches('.chosen:focus'))"))
    last = tokens.count() - 1
    assert places == [1, 2, 1, last, last, 0, 0]


def test_the_slider_goes_through_the_steps(open_page, report):
    page = open_page(report)
    steps = lambda: page.locator(".step:visible").evaluate_all("all => all.map(step => step.dataset.step)")
    assert steps() == ["0"]
    page.get_by_label("Step of training").press("ArrowRight")
    assert steps() == ["2"] and page.locator(".slide output").inner_text() == "step 2"
    page.get_by_label("Step of training").press("ArrowLeft")
    assert steps() == ["0"]


def test_what_the_teacher_read_unfolds(open_page, report):
    card = open_page(report).locator(".attempt").first
    mark = card.locator("mark.feedback")
    assert not mark.is_visible()
    card.get_by_text("What the teacher read").click()
    assert mark.is_visible() and mark.inner_text() in card.locator(".verdict").inner_text()
    shot(card.page, "report_unfolded")


def test_the_colours_can_be_those_of_the_credit(open_page, report):
    page = open_page(report)
    colours = lambda: page.locator(".step:visible .token span").evaluate_all(
        "all => all.map(span => getComputedStyle(span).backgroundColor)")
    before, legend = colours(), page.locator(".legend")
    assert legend.inner_text().startswith("the two differ")
    page.get_by_role("button", name="credit").click()
    assert colours() != before and "the teacher likes it less" in legend.inner_text()
    shot(page, "report_credit")
    page.get_by_role("button", name="disagreement").click()
    assert colours() == before


def test_values_are_read_off_the_curve_with_the_keyboard(open_page, report):
    page = open_page(report)
    page.locator(".drawing.wide").focus()
    assert page.locator(".readout").inner_text().startswith("128 attempts")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".readout").inner_text().startswith("0 attempts")


def test_a_phone_needs_no_scrolling_sideways(open_page, report):
    page = open_page(report, width=390, height=844, has_touch=True, is_mobile=True, device_scale_factor=2)
    card = page.locator(".attempt").first
    card.get_by_text("What the teacher read").tap()
    card.locator(".token").first.tap()
    assert card.locator(".token").first.evaluate("token => token.matches('.chosen')")
    assert hidden_width(page) == 0
    assert page.locator(".drawing.narrow").is_visible() and not page.locator(".drawing.wide").is_visible()
    shot(page, "report_phone", full_page=True)


@pytest.mark.parametrize("scheme, is_bright", [("light", True), ("dark", False)])
def test_every_word_stands_out(open_page, report, scheme, is_bright):
    page = open_page(report, color_scheme=scheme)
    page.get_by_text("What the teacher read").first.click()
    paper = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(paper) > 200) == is_bright
    assert faint_texts(page) == []
    shot(page, f"report_{scheme}", full_page=True)


def test_the_report_can_be_read_without_its_script(open_page, report):
    page = open_page(report, java_script_enabled=False)
    attempts = page.locator(".step .attempt")
    assert attempts.count() > 4 and all(card.is_visible() for card in attempts.all())
    assert page.locator(".step").count() == 2
    first = attempts.first
    assert "go=" in first.locator(".tokens").inner_text() and first.locator(".bars tr.said").is_visible()
    assert not page.locator(".controls").is_visible()
    first.get_by_text("What the teacher read").click()
    assert first.locator("mark.feedback").is_visible()
    shot(page, "report_no_script", full_page=True)


# Text that wants to be a script

HACK = "window.hacked=1"
SHOWN = {  # as a token of an attempt, and what is seen of it
    f"<script>{HACK}</script>": f"<script>{HACK}</script>",
    f'<img src=x onerror="{HACK}">': f'<img src=x onerror="{HACK}">',
    f"\" onmouseover=\"{HACK}\" x='": f"\" onmouseover=\"{HACK}\" x='",
    f"</script></style></title><!--<script>{HACK}//": f"</script></style></title><!--<script>{HACK}//",
    "&lt;b&gt; ${1} `{{x}}`": "&lt;b&gt; ${1} `{{x}}`",
    "two\nlines\r": "two\u21b5lines\\r",
    "\ud83d": "\\ud83d",  # half of a character
    "\U0001f600 \U0001f44d\U0001f3fd": "\U0001f600 \U0001f44d\U0001f3fd",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd": "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u202eturned\u2028": "\\u202eturned\\u2028",
    "\x00\x1b[31m": "\\x00\\x1b[31m",
    "m" * 5000: "m" * 5000,
    "": "\u2205",
    "  ": "\u2423\u2423",
}
HOSTILE = list(SHOWN)
ALL = "\n".join(HOSTILE)  # all of it in one text
NAME = "/".join(HOSTILE[:-3])  # what a person may choose: no word of 5,000 letters


def hostile_token(i: int) -> TokenReading:
    """A token, told from the next three: fewer candidates than others have, and some without a number."""
    text, others = HOSTILE[i], [HOSTILE[(i + j) % len(HOSTILE)] for j in (1, 2, 3)]
    teacher = tuple(zip(others, (0.6, 0.2, math.nan)))
    number = (-4.0, math.nan, -math.inf)[i % 3]
    return TokenReading(text, -0.5, number, 0.7 if i % 3 == 0 else math.nan, ((text, 0.6),), teacher)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A report whose every text is hostile."""
    feedback = Feedback(0.0, ALL)
    parts = ({"type": "text", "text": ALL}, {"type": "image"})
    view = TeacherView(({"role": HOSTILE[2], "content": parts},), demonstration=HOSTILE[0], feedback=HOSTILE[1])
    full = AttemptReading(ALL, ALL, feedback, view, tuple(map(hostile_token, range(len(HOSTILE)))))
    empty = AttemptReading("", "", Feedback(0.0), TeacherView(()))
    reports = [StepReport(step, 8 * step, step / 2, math.nan, readings=(full, empty)) for step in (0, 1)]
    path, runs = tmp_path_factory.mktemp("hostile") / "report.html", {NAME: reports, HOSTILE[0]: reports[:1]}
    return write_report(path, runs, title=NAME, settings={NAME: NAME, "path": "/models" * 12}, note=NAME)


def is_hacked(page) -> bool:
    """Whether any of the text ran, or became more than text."""
    made = page.locator("main img, main script:not([type]), [onerror], [onmouseover]").count()
    return made > 0 or page.evaluate("'hacked' in window")


def test_hostile_text_stays_text(open_page, hostile):
    page = open_page(hostile)
    card = page.locator(".attempt").first
    assert card.locator(".token span").all_inner_texts() == list(SHOWN.values())
    for place in "h1", ".note", ".question", ".verdict", ".settings dd":
        words = page.locator(place).first.inner_text()
        assert all(text in words for text in HOSTILE[:5]), place
    assert not is_hacked(page)
    shot(page, "hostile_wide", full_page=True)


def test_hostile_text_stays_text_when_it_is_touched(open_page, hostile):
    page = open_page(hostile)
    card = page.locator(".attempt").first
    for i, token in enumerate(card.locator(".token").all()):
        token.click(position={"x": 4, "y": 4})
        told = [name.replace("\\n", "\u21b5") for name in card.locator(".bars tbody th").all_inner_texts()]
        assert SHOWN[HOSTILE[(i + 1) % len(HOSTILE)]] in told, i
        for name in card.locator(".bars tbody th").all(): name.hover()
    card.get_by_text("What the teacher read").click()
    marks = card.locator("mark.demonstration").inner_text(), card.locator("mark.feedback").inner_text()
    assert marks == (HOSTILE[0], HOSTILE[1])
    card.locator("mark.feedback").hover()
    page.locator(".drawing.wide").focus()
    page.get_by_label("Step of training").press("ArrowRight")
    assert not is_hacked(page)


@pytest.mark.parametrize("width", [390, 1280])
def test_a_word_of_5000_letters_does_not_widen_the_page(open_page, hostile, width):
    page = open_page(hostile, width=width)
    for folded in page.locator("details").all(): folded.evaluate("details => { details.open = true; }")
    assert hidden_width(page) == 0
    shot(page, f"hostile_{width}", full_page=True)


def test_an_empty_attempt_says_so(open_page, hostile):
    card = open_page(hostile).locator(".attempt").nth(1)
    card.scroll_into_view_if_needed()
    card.get_by_text("(an empty attempt)").wait_for()


# JupyterLab

COUNTER = '''import anywidget, traitlets

class Counter(anywidget.AnyWidget):
    _esm = """
    function render({ model, el }) {
      const count = document.createElement("output"), button = document.createElement("button");
      const show = () => { count.textContent = model.get("count"); };
      let clicks = 0;
      button.textContent = "never clicked";
      button.onclick = () => { button.textContent = `clicked ${++clicks} times`; };
      model.on("change:count", show);
      show();
      el.classList.add("counter");
      el.append(count, button);
    }
    export default { render };
    """
    count = traitlets.Int(0).tag(sync=True)

counter = Counter()
counter'''
LOOP = """import sys, time
for i in range(60):
    counter.count = i + 1
    time.sleep(0.1)
print(sys.executable)"""


def test_a_widget_lives_while_a_cell_runs(open_notebook):
    notebook = open_notebook(COUNTER, LOOP)
    assert not notebook.is_running()
    notebook.run_all()
    count, button = (notebook.cell(0).locator(f".counter {name}") for name in ("output", "button"))
    seen = [0]
    for _ in range(3):
        notebook.page.wait_for_function(f"+document.querySelector('.counter output')?.innerText > {seen[-1]}")
        seen.append(int(count.inner_text()))
        button.click()
    assert button.inner_text() == "clicked 3 times" and notebook.is_running()
    shot(notebook.page, "lab_counter")
    notebook.wait_done()
    assert seen[-1] < 60 and count.inner_text() == "60"
    assert notebook.text(1) == sys.executable


LENS = """from sdpo_nb.core.records import AttemptReading, Feedback, StepReport, TeacherView, TokenReading
from sdpo_nb.view.lens import lens_html

tokens = (TokenReading("left", -0.1, -4.0, 0.9), TokenReading("right", -0.2, -0.1, 0.1))
attempt = AttemptReading("Which way?", "left right", Feedback(0.0, "Only right."), TeacherView(()), tokens)
lens_html([StepReport(0, 0, 0.0, readings=(attempt,))])"""


def test_a_lens_that_is_shown_twice_is_alive_in_a_notebook(open_notebook):
    notebook = open_notebook(LENS, LENS)
    notebook.run_all()
    notebook.wait_done()
    for cell in map(notebook.cell, (0, 1)):
        assert said_row(cell) == ["90.5%", "left", "1.8%"]
        cell.locator(".token", has_text="right").click()
        assert said_row(cell) == ["81.9%", "right", "90.5%"]
    shot(notebook.page, "lab_lens")


def test_a_cell_that_fails_fails_the_test(open_notebook):
    notebook = open_notebook("1 / 0", "print('not reached')")
    notebook.run_all()
    with pytest.raises(AssertionError, match="ZeroDivisionError: division by zero"): notebook.wait_done()
    assert notebook.outputs(1) == []
    notebook.page.reload()
    notebook.wait_ready()
    assert notebook.count() == 2
