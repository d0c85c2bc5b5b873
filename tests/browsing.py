"""A Chromium that looks at pages, and a JupyterLab for it to look at; the fixtures reach every test through conftest.

    import pytest
    from browsing import shot

    pytestmark = pytest.mark.browser


    def test_a_file(open_page, tmp_path):
        page = open_page(tmp_path / "report.html", width=390, color_scheme="dark")  # a Page of Playwright, offline
        page.locator(".token").nth(3).click()
        shot(page, "report_token")  # build/shots/report_token.png, or in the folder SDPO_SHOTS


    def test_a_notebook(open_notebook):
        notebook = open_notebook("x = 1", "import time\\ntime.sleep(9)\\nprint(x)")  # a cell each
        notebook.run_all()
        notebook.cell(1).locator(".jp-InputPrompt").click()
        assert notebook.is_running()
        notebook.wait_done()  # fails with the traceback of a cell that failed
        assert notebook.text(1) == "1"

A test whose page logged an error, threw one, or asked for anything that is neither a file nor on this machine fails as
it ends. Browser and JupyterLab live for a module each: a notebook has a kernel of its own, but shares its page with
those before it, so put back what you set with `page.emulate_media` or `page.set_viewport_size`.
`make test-browser` installs what is needed.
"""
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

if TYPE_CHECKING: from playwright.sync_api import Browser, Locator, Page

ROOT = Path(__file__).resolve().parent.parent
HERE = "127.0.0.1"  # the only machine that a page may ask
ARGS = ["--no-sandbox", f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HERE}"]
SETTINGS = {  # of JupyterLab: no news, no toasts, and every cell in the page even where nobody looks
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
PROGRAMS = {  # what each Jupyter has to be told besides
    "jupyterlab": ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"],
    "notebook": ["--JupyterNotebookApp.expose_app_in_browser=True"],
}

FAINT = """least => {
    const layers = element => element ? [...layers(element.parentElement), getComputedStyle(element)] : [];
    const numbers = colour => [...colour.matchAll(/[\\d.]+/g)].map(Number);  // red, green, blue, and perhaps alpha
    const over = (below, colour) => {
        const [red, green, blue, alpha = 1] = numbers(colour);
        return [red, green, blue].map((part, i) => alpha * part + (1 - alpha) * below[i]);
    };
    const light = colour => colour.map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = element => {
        const behind = layers(element).map(style => style.backgroundColor).reduce(over, [255, 255, 255]);
        const [dark, bright] = [behind, over(behind, getComputedStyle(element).color)].map(light).sort((a, b) => a - b);
        return (bright + 0.05) / (dark + 0.05);
    };
    const speaks = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    return [...document.body.querySelectorAll(":not(script, style, svg *)")]
        .filter(element => speaks(element) && element.checkVisibility() && contrast(element) < least)
        .map(element => `${contrast(element).toFixed(2)} ${element.tagName}.${element.className} ${element.innerText}`);
}"""


def find_chromium() -> str | None:
    """The browser's program, if there is one."""
    names = os.environ.get("SDPO_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def need(package: str) -> None:
    """Skip a test whose package is missing."""
    if not find_spec(package): pytest.skip(f"needs {package}; `make test-browser` installs it")


def shot(page: "Page", name: str, **options: object) -> Path:
    """Keep a picture of a page, with what is only drawn near the window; options are Playwright's: full_page."""
    path = Path(os.environ.get("SDPO_SHOTS", ROOT / "build" / "shots")) / f"{name}.png"
    page.screenshot(path=path, style="* { content-visibility: visible !important; }", **options)
    return path


def complaints_of(page: "Page") -> list[str]:
    """What a page complains of from now on: errors, and requests to other machines, which no one answers."""
    heard = []

    def judge(request):
        if urlsplit(request.url).hostname not in (None, HERE): heard.append(f"asked for {request.url}")

    def listen(said):
        if said.type == "error": heard.append(f"logged {said.text} ({said.location['url']})")

    page.on("request", judge)
    page.on("console", listen)
    page.on("pageerror", lambda error: heard.append(f"threw {error}"))
    return heard


def hidden_width(page: "Page") -> int:
    """How many pixels of a page lie beyond its right edge, where only scrolling sideways shows them."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def faint_texts(page: "Page", least: float = 4.5) -> list[str]:
    """Texts in sight whose contrast with what is behind them is below the least that WCAG's level AA asks for."""
    return page.evaluate(FAINT, least)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium without a window."""
    need("playwright")
    if not (program := find_chromium()):
        pytest.skip("needs Chromium: install it (Debian: apt install chromium), or name one in SDPO_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., "Page"]]:
    """Open a file or an address; options are those of Playwright's `new_context`: color_scheme, java_script_enabled."""
    contexts, heard = [], []

    def open_one(place: Path | str, width: int = 1280, height: int = 900, **options: object) -> "Page":
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_offline(isinstance(place, Path))
        page = context.new_page()
        heard.append(complaints_of(page))
        page.goto(place.resolve().as_uri() if isinstance(place, Path) else place)
        return page

    yield open_one
    for context in contexts: context.close()
    assert not sum(heard, []), "the page complained"


class Lab:
    """JupyterLab, or Notebook 7, in a folder of its own, with its own settings and the kernel of this Python."""

    def __init__(self, folder: Path, program: str = "jupyterlab") -> None:
        self.folder, self.program, self.token = folder, program, secrets.token_hex(8)
        with socket.socket() as free:
            free.bind((HERE, 0))
            self.address = f"http://{HERE}:{free.getsockname()[1]}"
        homes = {name: folder / "jupyter" / name.lower() for name in (
            "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
        for home in homes.values(): home.mkdir(parents=True)
        for name, values in SETTINGS.items():
            self._write(homes["JUPYTERLAB_SETTINGS_DIR"] / "@jupyterlab" / f"{name}.jupyterlab-settings", values)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel = {"argv": command, "display_name": "this Python", "language": "python"}
        self._write(homes["JUPYTER_DATA_DIR"] / "kernels" / "this" / "kernel.json", kernel)
        self.process = self._start({name: str(home) for name, home in homes.items()})

    @staticmethod
    def _write(path: Path, values: dict) -> None:
        """Write a settings file, and the folders above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")

    def _start(self, homes: dict[str, str]) -> subprocess.Popen:
        """Start the server; what it says goes into lab.log."""
        options = ["--no-browser", "--allow-root", f"--ip={HERE}", f"--port={urlsplit(self.address).port}",
                   f"--ServerApp.root_dir={self.folder}", f"--IdentityProvider.token={self.token}",
                   "--ServerApp.port_retries=0", "--ServerApp.terminals_enabled=False", *PROGRAMS[self.program]]
        env = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")} | homes
        with open(self.folder / "lab.log", "w", encoding="utf-8") as log:
            return subprocess.Popen([sys.executable, "-m", self.program, *options], cwd=self.folder, env=env,
                                    stdout=log, stderr=subprocess.STDOUT)

    def wait_ready(self, seconds: float = 60) -> None:
        """Wait until the server answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try: return urlopen(f"{self.address}/api?token={self.token}", timeout=5).close()
            except (URLError, TimeoutError): time.sleep(0.1)
        raise RuntimeError(f"{self.program} did not start: " + (self.folder / "lab.log").read_text(encoding="utf-8")[-2000:])

    def add(self, *cells: str) -> str:
        """Write a notebook of some code cells, and return its name."""
        import nbformat
        from nbformat.v4 import new_code_cell, new_notebook

        name = f"notebook_{len(list(self.folder.glob('*.ipynb')))}.ipynb"
        kernel = {"kernelspec": {"name": "this", "display_name": "this Python", "language": "python"}}
        nbformat.write(new_notebook(cells=[*map(new_code_cell, cells)], metadata=kernel), self.folder / name)
        return name

    def stop(self) -> None:
        """Stop the server, and with it the kernels."""
        self.process.terminate()
        try: self.process.wait(5)
        except subprocess.TimeoutExpired: self.process.kill()  # a kernel whose server is gone ends by itself
        self.process.wait()


class Notebook:
    """A notebook as Jupyter shows it; `page` is Playwright's, for all that is not here, such as `emulate_media`."""

    SHOWN = "window.jupyterapp?.shell.currentWidget"  # what stands in the middle
    KERNEL = f"{SHOWN}?.sessionContext?.session?.kernel"

    def __init__(self, page: "Page", name: str | None = None) -> None:  # a file to open; None: the page shows one
        self.page = page
        if name: page.evaluate("async path => { await jupyterapp.commands.execute('docmanager:open', { path }); }", name)
        self.wait_ready()
        self.wait_done()

    def wait_ready(self, seconds: float = 90) -> None:
        """Wait until the cells are there and the kernel is; also after `page.reload()`."""
        self.page.wait_for_function(f"{self.SHOWN}?.content?.widgets?.length && {self.KERNEL}?.connectionStatus "
                                    f"=== 'connected' && {self.KERNEL}.status !== 'starting'", timeout=1000 * seconds)
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()

    def _run(self, command: str) -> None:
        """Give JupyterLab a command, and return while it is at it."""
        self.page.evaluate("""command => {
            window.unfinished = (window.unfinished ?? 0) + 1;
            jupyterapp.commands.execute(command).finally(() => { window.unfinished -= 1; });
        }""", command)

    def run_all(self) -> None:
        """Start all cells, and return at once."""
        self._run("notebook:run-all-cells")

    def run(self, cell: int) -> None:
        """Start one cell, and return at once."""
        self.page.evaluate(f"cell => {{ {self.SHOWN.replace('?', '')}.content.activeCellIndex = cell; }}", cell)
        self._run("notebook:run-cell")

    def is_running(self) -> bool:
        """Whether a cell is running, or waits to be run."""
        return self.page.evaluate(f"(window.unfinished ?? 0) > 0 || {self.KERNEL}?.status === 'busy'")

    def wait_done(self, seconds: float = 120) -> None:
        """Wait until no cell is running; fail with the traceback of one that failed."""
        self.page.wait_for_function(f"!window.unfinished && {self.KERNEL}?.status === 'idle'", timeout=1000 * seconds)
        failed = [out for i in range(self.count()) for out in self.outputs(i) if out["output_type"] == "error"]
        assert not failed, re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(failed[0]["traceback"]))

    def count(self) -> int:
        """How many cells there are."""
        return self.page.locator(".jp-Notebook .jp-Cell").count()

    def cell(self, i: int) -> "Locator":
        """A cell: its code and its outputs."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(i)

    def outputs(self, i: int) -> list[dict]:
        """The outputs of a code cell as the notebook's file would hold them."""
        shown = self.SHOWN.replace("?", "")
        return self.page.evaluate(f"i => {shown}.content.widgets[i].outputArea.model.toJSON()", i)

    def text(self, i: int) -> str:
        """What the outputs of a cell say, as a reader sees it."""
        return "\n".join(self.cell(i).locator(".jp-OutputArea-output").all_inner_texts()).strip()

    def close(self) -> None:
        """Stop the kernel, and take the notebook off the page."""
        self.page.evaluate(f"{self.SHOWN}.sessionContext.shutdown().then(() => {self.SHOWN}.dispose())")


@contextmanager
def running(folder: Path, program: str) -> Iterator[Lab]:
    """A Jupyter that answers, and is stopped in the end."""
    need(program)
    lab = Lab(folder, program)
    try:
        lab.wait_ready()
        yield lab
    finally: lab.stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser) -> Iterator[Lab]:
    """A running JupyterLab."""
    with running(tmp_path_factory.mktemp("lab"), "jupyterlab") as lab: yield lab


@pytest.fixture(scope="module")
def lab_page(lab, browser) -> Iterator[tuple["Page", list[str]]]:
    """JupyterLab in a page, and what that page complains of."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    heard = complaints_of(page)
    page.add_locator_handler(page.locator(".jp-Dialog"), lambda _: page.keyboard.press("Escape"))
    page.goto(f"{lab.address}/lab?token={lab.token}")
    page.wait_for_function("window.jupyterapp?.restored", timeout=90_000)
    page.evaluate("jupyterapp.restored.then(() => null)")
    yield page, heard
    page.close()


@pytest.fixture
def open_notebook(lab, lab_page) -> Iterator[Callable[..., Notebook]]:
    """Open a new notebook of some cells in JupyterLab; nothing of it runs yet."""
    (page, heard), opened = lab_page, []

    def open_one(*cells: str) -> Notebook:
        opened.append(Notebook(page, lab.add(*cells)))
        return opened[-1]

    heard.clear()
    yield open_one
    for notebook in reversed(opened): notebook.close()
    assert heard == [], "the page complained"
