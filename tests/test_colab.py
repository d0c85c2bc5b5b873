"""The widgets with the packages of Google Colab, in a kernel of theirs; Colab's own page cannot be had here.

What Colab adds to a kernel is in COLAB below: a function that asks for its manager of other people's widgets, and a
note for the page in every message that displays one (github.com/googlecolab/colabtools, google/colab/output/_widgets.py).
Of its page only this is simulated: it keeps of every widget what the messages of the widget's comm say.
"""
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from test_browser_widgets import MADE

IS_COLAB = version("ipywidgets").startswith("7.")
pytestmark = pytest.mark.skipif(
    not IS_COLAB,
    reason="needs the older packages of Google Colab, in a folder of their own: make test-colab",
)
VIEW = "application/vnd.jupyter.widget-view+json"
MANAGER = "https://ssl.gstatic.com/colaboratory-static/widgets/manager.min.js"
COLAB = f"""
from types import SimpleNamespace
from IPython import get_ipython

_widgets, asked = SimpleNamespace(_installed_url=None), []

def enable_custom_widget_manager():
    asked.append("enable")
    _widgets._installed_url = "{MANAGER}"
    get_ipython().display_pub.register_hook(note)

def note(message):
    shown = message["content"]
    if "{VIEW}" in shown.get("data", {{}}):
        shown["metadata"]["{VIEW}"] = {{"colab": {{"custom_widget_manager": {{"url": "{MANAGER}"}}}}}}
    return message
"""
NOTE = {VIEW: {"colab": {"custom_widget_manager": {"url": MANAGER}}}}
WIRE = """
import threading
import google.colab.output
from ipykernel.comm import Comm

publish, is_main = Comm._publish_msg, []

def listened(self, *args, **keys):
    is_main.append(threading.current_thread() is threading.main_thread())
    return publish(self, *args, **keys)

Comm._publish_msg = listened
"""
TRAIN = """
class Kept(WidgetCallback):
    def __call__(self, report):
        reports[report.step] = report
        super().__call__(report)

reports, callback = {}, Kept(every=2)
trainer(callback, 6, disable_tqdm=False).train();
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the kernel works, beside the simulated package of Colab."""
    folder = tmp_path_factory.mktemp("colab")
    (folder / "google" / "colab" / "output").mkdir(parents=True)
    (folder / "google" / "colab" / "__init__.py").write_text("")
    (folder / "google" / "colab" / "output" / "__init__.py").write_text(COLAB)
    return folder


@contextmanager
def kernel(folder: Path, *paths: Path) -> Iterator[Callable[[str], list[dict]]]:
    """A kernel in a folder. The function runs a cell, as a page does: what the kernel says meanwhile, by message."""
    from jupyter_client.manager import start_new_kernel

    path = os.pathsep.join(map(str, (*filter(None, [os.environ.get("PYTHONPATH")]), *paths, Path(__file__).parents[1])))
    quiet = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    manager, client = start_new_kernel(cwd=str(folder), env=os.environ | quiet)

    def run_one(code: str) -> list[dict]:
        said: list[dict] = []
        reply = client.execute_interactive(code, output_hook=said.append, timeout=300)["content"]
        assert reply["status"] == "ok", "\n".join(reply["traceback"])
        return said

    try: yield run_one
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def run(folder) -> Iterator[Callable[[str], list[dict]]]:
    """A kernel of Colab."""
    with kernel(folder, folder) as run:
        run(WIRE)
        yield run


@pytest.fixture(scope="module")
def trained(run) -> list[dict]:
    """What the kernel says while a cell trains the demo for six steps."""
    run(MADE)
    return run(TRAIN)


def tell(run, expression: str) -> object:
    """The value of an expression in the kernel."""
    said = run(f"import json; print(json.dumps({expression}))")
    return json.loads("".join(one["content"]["text"] for one in said if one["msg_type"] == "stream"))


def shown(said: list[dict]) -> list[dict]:
    """The messages that display a widget."""
    return [one for one in said if one["msg_type"] == "display_data" and VIEW in one["content"]["data"]]


def sent(said: list[dict], model: str) -> list[dict]:
    """What a page is told of a widget: all of it at first, then what has changed."""
    data = [one["content"]["data"] for one in said if one["content"].get("comm_id") == model]
    return [one["state"] for one in data if "state" in one]


def test_the_packages_are_those_of_colab(run):
    names = "IPython", "ipykernel", "ipywidgets", "anywidget", "traitlets", "transformers", "accelerate", "peft"
    found = [tell(run, f"__import__('{name}').__version__") for name in names]
    assert found == ["7.34.0", "6.17.1", "7.7.1", "0.9.21", "5.7.1", "5.15.0", "1.14.0", "0.20.0"]


def test_every_widget_carries_colabs_note(run, trained):
    run("lens, monitor = callback.widgets")
    run("groups = RolloutBrowser([*reports.values()])")
    run("sides = CompareLens({'before': reports[0].readings, 'after': reports[6].readings})")
    for name in "lens", "monitor", "groups", "sides":
        data, metadata = tell(run, f"{name}._repr_mimebundle_()")
        assert data[VIEW]["model_id"] == tell(run, f"{name}.model_id") and metadata == NOTE
        for code in f"display({name})", name:
            [message] = shown(run(code))
            assert message["content"]["data"][VIEW]["model_id"] == data[VIEW]["model_id"]
            assert message["content"]["metadata"] == NOTE
    assert tell(run, "google.colab.output.asked") == ["enable"]
    assert all(tell(run, f"[{name}.html.count('<') > 9 for {name} in (monitor, sides)]"))
    assert [key for key, _ in tell(run, "groups.pieces")] == [1, 2, 3, 4, 5, 6]


def test_the_widgets_are_shown_in_the_cell_that_trains(run, trained):
    assert tell(run, "callback.is_notebook"), "a kernel of Colab is a notebook"
    models = [one["content"]["data"][VIEW]["model_id"] for one in shown(trained)]
    assert models == tell(run, "[widget.model_id for widget in callback.widgets]")
    opened = [one["content"]["comm_id"] for one in trained if one["msg_type"] == "comm_open"]
    assert set(models) <= set(opened)
    news = [one["content"]["data"]["state"] for one in trained[trained.index(shown(trained)[-1]):] if one["msg_type"] == "comm_msg"]
    assert sum("newest" in state for state in news) == 4, "they are shown before the first step is told"


def test_a_step_is_sent_once_and_all_of_them_at_the_end(run, trained):
    lens = tell(run, "callback.widgets[0].model_id")
    whole, empty, *steps, end = sent(trained, lens)
    assert whole["_esm"] and whole["_css"] and whole["pieces"] == [] and empty == {"pieces": []}
    assert [list(one) for one in steps] == [["newest"]] * 4
    assert [one["newest"][0] for one in steps] == [0, 2, 4, 6]
    assert [one["newest"][2] for one in steps] == [[0], [0, 2], [0, 2, 4], [0, 2, 4, 6]]
    assert end == {"pieces": [one["newest"][:2] for one in steps]}


def test_what_the_page_knows_at_the_end_is_all_there_is(run, trained):
    for i, names in enumerate((["html", "pieces", "newest"], ["html"])):
        known: dict = {}
        for state in sent(trained, tell(run, f"callback.widgets[{i}].model_id")): known |= state
        for name in names: assert known[name] == tell(run, f"callback.widgets[{i}].{name}"), name
    assert "step 6 of 6" in known["html"]


def test_messages_leave_from_the_main_thread(run, trained):
    assert tell(run, "len(is_main) > 20 and all(is_main)")


def test_a_snapshot_needs_no_widget(run, trained, folder):
    [message] = [one for one in run("callback.widgets[0].snapshot('lens.html')") if one["msg_type"] == "execute_result"]
    text = (folder / "lens.html").read_text(encoding="utf-8")
    for html in text, message["content"]["data"]["text/html"]:
        assert [f'data-step="{step}"' in html for step in range(7)] == [True, False] * 3 + [True]
    assert "http" not in text.replace("http://www.w3.org/", "")
