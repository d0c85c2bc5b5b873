"""Searches through a real server: `transformers serve` with the demo model on loopback, offline."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from sdpo_nb.core.demo import DEMO, Codebook
from sdpo_nb.experience.judging import EndpointError, NoEndpoint
from sdpo_nb.experience.prompting import Prompting
from sdpo_nb.learn.testtime import SearchConfig, ServerSampler, best_of, multi_turn, refine

TELLING = Codebook("omega", "full")
DICE = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 20}  # thrown only when told in this way


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the server."""
    for package in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(package, reason='pip install "transformers[serving]"')
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", DEMO, "--device", "cpu", "--host", "127.0.0.1",
               "--port", port]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try: process.wait(10)
            except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path, seconds: float = 90.0) -> None:
    """Come back when the server answers; where it dies, show what it said."""
    deadline = time.monotonic() + seconds
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=5): return
        except OSError: time.sleep(0.2)
    raise AssertionError(f"transformers serve did not start: {log.read_text()[-2000:]}")


def server(url: str, model: str = str(DEMO), **settings) -> ServerSampler:
    """The demo model behind HTTP, throwing dice; one request at a time, for its dice are one for all threads."""
    options = {"generation_config": json.dumps(DICE)}
    return ServerSampler(url, model, **{"options": options, "concurrent": 1, "timeout": 30.0, **settings})


@pytest.fixture(scope="module")
def task():
    """A question that the demo cannot answer by itself."""
    return TELLING.tasks(1)[0]


def test_the_same_seed_makes_the_same_answers(served, task):
    sampler = server(served)
    answers = sampler.sample([task, TELLING.tasks(2)[1]], 3, seed=1)
    asked = [answer.task.question for answer in answers]
    assert asked[:3] == [task.question] * 3 and asked[3:] == [TELLING.tasks(2)[1].question] * 3
    assert sampler.sample([task, TELLING.tasks(2)[1]], 3, seed=1) == answers
    assert len({answer.text for answer in sampler.sample([task], 6, seed=2)}) > 1
    assert all("=" in answer.text and "<|" not in answer.text for answer in answers)


def test_many_requests_at_a_time_keep_their_order(served):
    tasks = TELLING.tasks(6)
    for task, answer in zip(tasks, server(served, concurrent=4).sample(tasks)):
        assert answer.task == task
        assert [pair[:2] for pair in answer.text.split(" ")][0] == task.question.split(": ")[1].split(" ")[0]


def test_the_server_throws_no_dice_when_only_the_temperature_is_given(served, task):
    plain = server(served, options={"temperature": 1.0, "max_tokens": 20})
    assert len({answer.text for answer in plain.sample([task], 4)}) == 1


def test_refining_through_the_server_solves_what_asking_again_does_not(served, task):
    seen, sampler, config = [], server(served), SearchConfig(budget=64)
    search = refine(sampler, TELLING, task, config, Prompting(), on_round=seen.append)
    assert search.is_solved and search.rounds()[1][0].read != task.messages
    assert TELLING.judge(task, search.best.text).score == 1 and seen[-1] == search
    assert not best_of(sampler, TELLING, task, SearchConfig(budget=32)).is_solved


def test_a_conversation_goes_on_through_the_server(served, task):
    search = multi_turn(server(served), TELLING, task, SearchConfig(budget=24, attempts=4))
    assert search.is_solved and len(search.history[-1].read) == 1 + 2 * (len(search.rounds()) - 1)


def test_what_is_lost_on_the_way_is_no_attempt(served, task, monkeypatch):
    with pytest.raises(EndpointError, match="gave no answer in 1 of 5 tries; the last one: HTTP 400: .*'another'"):
        server(served, model="another").sample([task])
    with pytest.raises(NoEndpoint, match="HTTP 404"): server(served + "/nowhere").sample([task])
    monkeypatch.setenv("SERVER_KEY", "sk-another")
    with pytest.raises(EndpointError) as failed: server(served, model="sk-another", key_env="SERVER_KEY").sample([task])
    assert "requested '***'" in str(failed.value) and failed.value.__cause__ is None
