"""The widgets in Notebook 7, and in a notebook that was saved and is opened again when its kernel is gone."""
import re
from collections.abc import Iterator

import pytest
from browsing import Lab, Notebook, complaints_of, running, shot
from test_browser_widgets import MADE

pytestmark = pytest.mark.browser

TRAIN = """
callback = WidgetCallback(every=4, title="SDPO on omega")
trainer(callback, 12).train();
"""


def step_of(cell) -> int:
    """The step that the monitor has come to."""
    return int(re.search(r"step (\d+)", cell.locator(".monitor h3").inner_text())[1])


def choose(card, i: int) -> None:
    """Click a token, and wait for the bars of both opinions on it."""
    token = card.locator(".token").nth(i)
    token.click()
    card.page.mouse.move(0, 0)  # what is under the mouse is shown as well
    card.locator(".token.chosen").and_(token).wait_for(timeout=5000)
    assert card.locator(".bars tr.said th").inner_text() == token.locator("span").inner_text()
    assert card.locator(".bars tbody tr").count() > 1


# Notebook 7

@pytest.fixture(scope="module")
def classic(tmp_path_factory, browser) -> Iterator[Lab]:
    """A running Notebook 7."""
    with running(tmp_path_factory.mktemp("notebook"), "notebook") as classic: yield classic


def test_tokens_are_clicked_in_notebook_7_while_the_demo_trains(classic, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    heard = complaints_of(page)
    page.goto(f"{classic.address}/notebooks/{classic.add(MADE, TRAIN)}?token={classic.token}")
    notebook = Notebook(page)
    heard.clear()  # Notebook 7.6.5 throws an error of its own as it starts
    notebook.run_all()
    cell = notebook.cell(1)
    cell.locator(".monitor h3").wait_for(timeout=120_000)
    seen = [step_of(cell)]
    page.wait_for_function("last => +document.querySelector('.monitor h3').innerText.match(/step (\\d+)/)[1] > last", arg=seen[0])
    seen.append(step_of(cell))
    for i in (3, 5): choose(cell.locator(".attempt").first, i)
    assert notebook.is_running(), "the bars of a token have to appear while the cell is busy"
    shot(page, "notebook7_training")
    notebook.wait_done()
    assert seen[0] < seen[1] < step_of(cell) == 12
    assert cell.get_by_label("Step of training").get_attribute("max") == "3"
    shot(page, "notebook7_trained")
    notebook.close()
    page.close()
    assert heard == [], "the page complained"


# A notebook that was saved

SMALL = """
from sdpo_nb.core.records import AttemptReading, Feedback, StepReport, TeacherView, TokenReading
from sdpo_nb.run.live import WidgetCallback

token = TokenReading("left", -0.1, -4.0, 0.9, (("left", 0.9),), (("right", 0.9), ("left", 0.1)))
callback = WidgetCallback(title="A small run")
callback(StepReport(1, 8, 0.0, readings=(AttemptReading("", "", Feedback(0.0), TeacherView(()), (token,)),)))
callback.close()
"""


def open_lab(page, lab: Lab, name: str) -> Notebook:
    """A notebook of a JupyterLab in a page of its own."""
    page.goto(f"{lab.address}/lab/tree/{name}?token={lab.token}&reset")
    return Notebook(page)


def leave(notebook: Notebook) -> None:
    """Save a notebook, stop its kernel, and close the page."""
    notebook.page.evaluate("jupyterapp.commands.execute('docmanager:save').then(() => null)")
    notebook.page.evaluate(f"{notebook.SHOWN}.sessionContext.shutdown()")
    notebook.page.close()


def test_a_notebook_that_is_opened_again_shows_what_was_there(browser, lab):
    name = lab.add(SMALL)
    notebook = open_lab(browser.new_page(), lab, name)
    notebook.run_all()
    notebook.wait_done()
    leave(notebook)
    page = browser.new_page()
    cell = open_lab(page, lab, name).cell(0)
    cell.locator(".jp-OutputArea-output").get_by_text(re.compile("A small run|not found")).first.wait_for()
    tokens = cell.locator(".token").count()
    page.close()
    assert tokens == 1


def test_a_run_that_was_saved_lives_without_its_kernel(browser, lab):
    name = lab.add(MADE, TRAIN)
    notebook = open_lab(browser.new_page(), lab, name)
    notebook.run_all()
    notebook.wait_done()
    leave(notebook)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    heard = complaints_of(page)
    notebook = open_lab(page, lab, name)
    cell, slider = notebook.cell(1), notebook.cell(1).get_by_label("Step of training")
    slider.wait_for()
    page.evaluate(f"{notebook.SHOWN}.sessionContext.shutdown()")
    assert step_of(cell) == 12 and slider.get_attribute("max") == "3"
    slider.fill("0")
    assert cell.locator(".step:visible h3").inner_text().startswith("Step 0")
    for i in (3, 5): choose(cell.locator(".step:visible .attempt").first, i)
    slider.press("ArrowRight")
    assert cell.locator(".slide output").inner_text() == "step 4"
    shot(page, "lab_saved")
    page.close()
    assert heard == [], "the page complained"
