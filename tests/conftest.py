"""The conditions under which every test runs: offline, seeded, quiet, no window."""
import os
import random
import sys

os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch comes in

import fastcore.test
import pytest

pytest_plugins = ["browsing"]  # fixtures: open_page, open_notebook

for name in fastcore.test.__all__:  # `test_eq` and its kin are helpers; pytest would call them where they are imported
    if name.startswith("test"): getattr(fastcore.test, name).__test__ = False


@pytest.fixture(autouse=True)
def _seeded():
    """Start each test from the same seed, and leave no figure open; what was never imported stays unimported."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"): numpy.random.seed(0)
    if torch := sys.modules.get("torch"): torch.manual_seed(0)
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"): pyplot.close("all")
