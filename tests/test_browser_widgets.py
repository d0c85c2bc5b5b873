"""Widgets in a real JupyterLab, above a cell that trains the demo with `SDPOTrainer`; and what is left of them afterwards."""
import re
import time
from pathlib import Path

import pytest
from browsing import faint_texts, hidden_width, shot

pytestmark = pytest.mark.browser

MADE = """
import tempfile, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
from datasets import Dataset
from sdpo_nb.core.demo import Codebook, load_demo
from sdpo_nb.learn.hosting import as_reward, as_rows
from sdpo_nb.learn.presets import demo
from sdpo_nb.learn.trainer import SDPOTrainer
from sdpo_nb.run.live import WidgetCallback
from sdpo_nb.view.widgets import CompareLens, RolloutBrowser, TokenLens, TrainingMonitor

def trainer(callback, steps, **settings):
    environment, (model, tokenizer) = Codebook("omega"), load_demo("cpu")
    quiet = dict(disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, save_strategy="no", report_to="none")
    config = demo(output_dir=tempfile.mkdtemp(), seed=0, max_steps=steps, logging_steps=1, **quiet | settings)
    data = Dataset.from_list(as_rows(environment.tasks(64)))
    return SDPOTrainer(model, as_reward(environment), config, data, processing_class=tokenizer, callbacks=[callback])
"""
TRAIN = """
callback = WidgetCallback(every=10, title="SDPO on omega")
trainer(callback, 40).train();
"""
KEPT = """
lens, monitor = callback.widgets
lens.snapshot("lens.html"), monitor.snapshot("monitor.html")
before, after = (widget for widget in (lens.pieces[0], lens.pieces[-1]))
print(before[0], after[0])
"""


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> dict[str, Path]:
    """Files that the first test leaves for those that follow."""
    return {}


def test_tokens_are_clicked_while_the_demo_trains(open_notebook, lab, snapshots, record_property):
    notebook = open_notebook(MADE, TRAIN, KEPT)
    notebook.run_all()
    page, cell = notebook.page, notebook.cell(1)
    cell.locator(".token").first.wait_for(timeout=120_000)
    at = lambda: int(re.search(r"step (\d+)", cell.locator(".monitor h3").inner_text())[1])
    cell.locator(".monitor h3").wait_for()
    seen = [at()]
    page.wait_for_function("before => +document.querySelector('.monitor h3').innerText.match(/step (\\d+)/)[1] > before", arg=seen[0], timeout=60_000)
    seen.append(at())

    card = cell.locator(".attempt").first
    first, second = card.locator(".token").nth(1), card.locator(".token").nth(3)
    begin = time.perf_counter()
    second.click()
    page.wait_for_function("""() => {
        const card = document.querySelector('.attempt'), data = JSON.parse(card.querySelector('script').textContent);
        return card.querySelector('caption').textContent.endsWith(data[3][0]) && card.querySelectorAll('.bars tbody tr').length > 1;
    }""")
    latency = time.perf_counter() - begin
    assert notebook.is_running(), "the bars of a token have to appear while the cell is busy"
    record_property("seconds from a click to the bars", round(latency, 3))
    print(f"{latency:.2f} s from a click to the bars")
    assert second.evaluate("token => token.matches('.chosen')") and not first.evaluate("token => token.matches('.chosen')")
    page.keyboard.press("ArrowLeft")
    assert card.locator(".token").nth(2).evaluate("token => token.matches('.chosen')") and notebook.is_running()
    shot(page, "widgets_training")

    page.wait_for_function("document.querySelector('.slide input').max >= 2", timeout=120_000)
    slider = cell.get_by_label("Step of training")
    slider.fill("0")
    assert cell.locator(".slide output").inner_text() == "step 0" and cell.locator(".step:visible h3").inner_text().startswith("Step 0")
    slider.press("ArrowRight")
    assert cell.locator(".slide output").inner_text() == "step 10"
    assert notebook.is_running()
    notebook.wait_done(300)
    cell.locator(".slide output", has_text="step 0").wait_for()  # a snapshot has taken the widget's place
    assert (slider.get_attribute("max"), at()) == ("4", 40) and seen[0] < seen[1] < 40
    slider.fill("4")
    cell.scroll_into_view_if_needed()
    shot(page, "widgets_trained")
    assert notebook.text(2) == "0 40"
    snapshots.update({name: lab.folder / f"{name}.html" for name in ("lens", "monitor")})


def test_what_is_found_and_what_is_hidden(open_page, snapshots):
    page = open_page(snapshots["lens"])
    cards = page.locator(".step:visible article:visible")
    assert cards.count() == 2
    page.get_by_label("Which attempts").select_option("succeeded")
    assert cards.count() == 0 and page.get_by_text("No attempt of this step is like that.").is_visible()
    page.get_by_label("Step of training").fill("4")
    assert cards.count() > 0
    page.get_by_label("Which attempts").select_option("all")
    words = cards.first.locator(".question").text_content().split()[-1]
    page.get_by_label("Find in the attempts").fill(words.upper())
    assert cards.count() >= 1
    page.get_by_label("Find in the attempts").fill("no such word")
    assert cards.count() == 0


def test_a_snapshot_needs_no_network_and_no_kernel(open_page, snapshots):
    page = open_page(snapshots["lens"])
    card = page.locator(".step:visible .attempt").first
    card.locator(".token").nth(3).click()
    told = card.locator(".bars caption").text_content()
    assert card.locator(".token.chosen").count() == 1
    page.keyboard.press("ArrowRight")
    assert card.locator(".bars caption").text_content() != told
    card.get_by_text("What the teacher read").click()
    assert card.locator("mark.feedback").is_visible()
    asked = card.locator(".question").text_content()
    page.get_by_label("Step of training").press("ArrowRight")
    after = page.locator(".step:visible .attempt").first
    assert after.locator(".question").text_content() == asked
    assert after.locator(".token.chosen").count() == 1
    shot(page, "snapshot_lens")


def test_a_place_that_was_chosen_stays_chosen_at_another_step(open_page, snapshots):
    page = open_page(snapshots["lens"])
    page.locator(".step:visible .attempt").first.locator(".token").nth(5).click()
    page.get_by_label("Step of training").press("ArrowRight")
    tokens = page.locator(".step:visible .attempt").first.locator(".token")
    assert tokens.nth(5).evaluate("token => token.matches('.chosen')")


@pytest.mark.parametrize("name", ["lens", "monitor"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_snapshot_reads_well_everywhere(open_page, snapshots, name, scheme):
    page = open_page(snapshots[name], color_scheme=scheme)
    assert faint_texts(page) == []
    shot(page, f"snapshot_{name}_{scheme}", full_page=True)
    page.set_viewport_size({"width": 390, "height": 844})
    assert hidden_width(page) == 0


def test_a_snapshot_can_be_read_without_its_script(open_page, snapshots):
    page = open_page(snapshots["lens"], java_script_enabled=False)
    assert page.locator(".attempt").count() == 10 and all(step.is_visible() for step in page.locator(".step").all())


LONG = """
import time
callback = WidgetCallback()
start = time.perf_counter()
trainer(callback, 500, per_device_train_batch_size=16).train()
seconds = time.perf_counter() - start;
"""
COST = "print(len(callback.widgets[0].pieces), len(callback.widgets[1].reports), round(callback.spent / (seconds - callback.spent), 4), round(seconds))"


def test_a_run_of_500_steps_stays_small(open_notebook, lab, record_property):
    notebook = open_notebook(MADE, LONG, COST)
    page, kept = notebook.page, []
    session = page.context.new_cdp_session(page)

    def heap() -> int:
        session.send("HeapProfiler.collectGarbage")
        return session.send("Runtime.getHeapUsage")["usedSize"]

    notebook.run_all()
    for step in (60, 490):
        page.wait_for_function("least => +(document.querySelector('.monitor h3')?.innerText.match(/step (\\d+)/)?.[1] ?? 0) >= least",
                               arg=step, timeout=300_000)
        kept.append(heap())
    notebook.wait_done(300)
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    steps, points, share, seconds = map(float, notebook.text(2).split())
    size = max(path.stat().st_size for path in lab.folder.glob("*.ipynb"))
    print(f"heap {kept[0] / 2**20:.1f} and {kept[1] / 2**20:.1f} MiB, notebook {size / 1024:.0f} KiB, "
          f"widgets took {share:.2%} of the training's {seconds:.0f} s")
    record_property("heap", kept), record_property("notebook", size), record_property("share", share)
    assert 3 <= steps <= 9 and points == 200
    assert share < 0.03
    assert kept[1] - kept[0] < 8 * 2**20 and size < 300 * 1024


FOLLOW = """
from sdpo_nb.view.style import example_run
run, lens = example_run(), TokenLens()
lens"""


def test_who_reads_a_place_reads_it_on_at_the_next_step(open_notebook):
    notebook = open_notebook(MADE, FOLLOW, "lens(run[0])", "lens(run[20])")
    for cell in (0, 1, 2): notebook.run(cell), notebook.wait_done()
    tokens = notebook.cell(1).locator(".token")
    tokens.nth(3).click()
    notebook.run(3), notebook.wait_done()
    notebook.cell(1).locator(".slide output", has_text="step 20").wait_for()
    assert tokens.nth(3).evaluate("token => token.matches('.chosen')")
    page = notebook.page
    tokens.nth(3).focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(4).evaluate("token => token.matches('.chosen') && token === document.activeElement")
