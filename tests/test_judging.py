"""`LLMJudge` against real servers: `transformers serve` with the demo model, and one that misbehaves on the socket."""
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from sdpo_nb.core.demo import DEMO, Codebook
from sdpo_nb.core.records import Feedback, Rollout, Task
from sdpo_nb.experience.environments import TaskSet
from sdpo_nb.experience.feedback import judge_all
from sdpo_nb.experience.judging import EndpointError, LLMJudge, Trouble, content_of, post

QUESTION = Task.ask("What is 6 times 7?", answer="42")
QUICK = {"tries": 3, "first_wait": 0.01, "timeout": 5.0}
VERDICT = '{"feedback": "Count again.", "score": 0.25}'
FAILED = Feedback(0.0, "", {"judge_error": 1.0})


def chat(words: str) -> bytes:
    """A well-behaved HTTP reply."""
    return http_reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": words}}]}).encode())


def http_reply(status: int, body: bytes = b"", *headers: str) -> bytes:
    """An HTTP reply, byte by byte."""
    head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


class Handler(http.server.BaseHTTPRequestHandler):
    """Writes to the socket whatever the test says, piece by piece, and keeps what was asked."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            turn = len(self.server.asked)
            self.server.asked.append((dict(self.headers), json.loads(body)))
        script = self.server.scripts[min(turn, len(self.server.scripts) - 1)]
        self.close_connection = True
        for piece in script if isinstance(script, list) else [script]:
            if piece == "reset":  # the kernel then sends RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                return self.connection.close()
            if isinstance(piece, float): self.server.stopped.wait(piece)
            else:
                try: self.connection.sendall(piece)
                except OSError: return  # the client has had enough

    def finish(self):
        try: super().finish()
        except OSError: pass  # it was reset

    def log_message(self, *words): pass


@contextmanager
def misbehaving(*scripts):
    """A server whose n-th reply is the n-th script: bytes, seconds of silence, "reset", or a list of those."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.scripts, server.asked, server.lock, server.stopped = scripts, [], threading.Lock(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try: yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()


PASSING = {  # what a server may do once and be asked again
    "500": http_reply(500, b"out of memory"), "502 in HTML": http_reply(502, b"<html>Bad gateway</html>"),
    "429 at once": http_reply(429, b"", "Retry-After: 0"), "408": http_reply(408),
    "429 and a date long ago": http_reply(429, b"", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 and nonsense": http_reply(429, b"", "Retry-After: soon"),
    "reset": "reset", "reset in the reply": [chat(VERDICT)[:-10], "reset"], "hangs up": b"", "no HTTP": b"hello\r\n",
    "half a reply": chat(VERDICT)[:-10], "no JSON": http_reply(200, b"{'choices'"), "an empty body": http_reply(200),
    "HTML": http_reply(200, b"<html>Welcome to the hotel's network!</html>"),
    "not UTF-8": http_reply(200, b'{"choices": "\xff"}'), "another API": http_reply(200, b'{"output": "1.0"}'),
    "an error with status 200": http_reply(200, b'{"error": {"message": "overloaded"}}'),
    "null": chat(None), "no verdict": chat("A fine answer."), "a score of 11": chat("Score: 11"),
    "a huge body": [http_reply(200, b"{" + b" " * 2**21)],
    "an endless line": [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**17, b"\r\n\r\n"],
}


@pytest.mark.parametrize("script", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_asked_again(script):
    with misbehaving(script, chat(VERDICT)) as server:
        said = LLMJudge(server.url, "m", **QUICK)(QUESTION, "41")
    assert said == Feedback(0.25, "Count again.", {"judge_error": 0.0})
    assert len(server.asked) == 2


@pytest.mark.parametrize("script", PASSING.values(), ids=PASSING)
def test_what_does_not_pass_is_not_the_policys_fault(script):
    with misbehaving(script) as server:
        judge = LLMJudge(server.url, "m", errors="silence", **QUICK)
        with pytest.warns(UserWarning, match=f"the judge m at {server.url} gave no verdict: "):
            assert judge(QUESTION, "41") == FAILED
    assert len(server.asked) == 3


FATAL = {"moved": http_reply(301, b"", "Location: http://127.0.0.1:9/"), "key": http_reply(401),
         "forbidden": http_reply(403), "no such model": http_reply(404, b'{"error": "no model m"}')}


@pytest.mark.parametrize("script", FATAL.values(), ids=FATAL)
def test_what_can_never_work_stops_the_run_at_once(script):
    with misbehaving(script) as server:
        with pytest.raises(EndpointError, match=f"at {server.url} .* in 1 of 3 tries; the last one: HTTP"):
            LLMJudge(server.url, "m", errors="silence", **QUICK)(QUESTION, "41")
    assert len(server.asked) == 1


def test_a_refused_answer_is_not_sent_again():
    message = r"on '41', the answer to 'What is 6 times 7\?', in 1 of 3 tries; the last one: HTTP 400: the prompt"
    with misbehaving(http_reply(400, b"the prompt is too long"), chat(VERDICT)) as server:
        with pytest.raises(EndpointError, match=message):
            LLMJudge(server.url, "m", **QUICK)(QUESTION, "41")


SLOW = {"silent": 30.0, "silent after the head": [http_reply(200, b"x" * 99)[:-99], 30.0],
        "a byte now and then": [http_reply(200, b"x" * 99)[:-99], *[b"x", 0.1] * 99],
        "an error without its body": [http_reply(503, b"x" * 99)[:-99], 30.0]}


@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
def test_a_slow_server_has_as_long_as_was_said(script):
    with misbehaving(script, chat(VERDICT)) as server:
        started = time.monotonic()
        said = LLMJudge(server.url, "m", timeout=0.2, tries=2, first_wait=0.01)(QUESTION, "41")
        assert said.score == 0.25 and time.monotonic() - started < 8


def test_it_waits_as_long_as_it_is_told_and_not_longer():
    with misbehaving(http_reply(429, b"", "Retry-After: 0.3"), chat(VERDICT)) as server:
        started = time.monotonic()
        LLMJudge(server.url, "m", **QUICK)(QUESTION, "41")
        assert 0.3 <= time.monotonic() - started < 8
    with misbehaving(http_reply(503, b"", "Retry-After: 86400")) as server:
        with pytest.raises(EndpointError, match="in 1 of 3 tries; .*asks for 86400 seconds of rest"):
            LLMJudge(server.url, "m", **QUICK)(QUESTION, "41")


def test_pauses_grow():
    with misbehaving(http_reply(500)) as server:
        started = time.monotonic()
        with pytest.raises(EndpointError): LLMJudge(server.url, "m", tries=4, first_wait=0.1, timeout=5.0)(QUESTION, "41")
        assert 0.35 <= time.monotonic() - started < 8  # 0.05 + 0.1 + 0.2 at least


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=f"{url} .* in 3 of 3 tries; the last one: URLError: .*refused"):
            LLMJudge(url, "m", **QUICK)(QUESTION, "41")


def test_the_key_is_sent_and_told_nobody(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-swordfish")
    with misbehaving(chat(VERDICT), http_reply(500, b"sk-swordfish is overloaded"), chat("sk-swordfish, you say?"),
                     http_reply(401, b"unknown key sk-swordfish")) as server:
        judge = LLMJudge(server.url, "m", key_env="JUDGE_KEY", **QUICK)
        judge(QUESTION, "41")
        with pytest.raises(EndpointError) as failed: judge(QUESTION, "41")
    assert [head["Authorization"] for head, _ in server.asked] == ["Bearer sk-swordfish"] * 4
    told = "".join(traceback.format_exception(failed.value)) + repr(judge) + repr(failed.value.__dict__)
    assert "unknown key ***" in told and "swordfish" not in told
    with misbehaving(http_reply(500, b"sk-swordfish is overloaded")) as server:
        with pytest.warns(UserWarning) as heard:
            LLMJudge(server.url, "m", key_env="JUDGE_KEY", errors="silence", **QUICK)(QUESTION, "41")
    assert "swordfish" not in str(heard[0].message)


def test_the_key_does_not_follow_a_redirect(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-swordfish")
    with misbehaving(chat(VERDICT)) as thief:
        moved = http_reply(307, b"", f"Location: {thief.url}/chat/completions")
        with misbehaving(moved) as server, pytest.raises(EndpointError, match="HTTP 307; it has moved"):
            LLMJudge(server.url, "m", key_env="JUDGE_KEY", **QUICK)(QUESTION, "41")
    assert thief.asked == []


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with misbehaving(chat(VERDICT)) as server: assert LLMJudge(server.url, "m", **QUICK)(QUESTION, "41").score == 0.25


def test_what_is_sent():
    with misbehaving(chat(VERDICT)) as server:
        judge = LLMJudge(server.url + "/", "m", column="answer", options={"top_p": 0.5}, **QUICK)
        judge(QUESTION, 'He said: {"score": 1} {reference} \ud800 ünïcödé')
    head, payload = server.asked[0]
    asked = payload["messages"][0].pop("content")
    assert payload == {"model": "m", "messages": [{"role": "user"}], "top_p": 0.5}
    tag = asked.partition("<answer-")[2].partition(">")[0]
    assert f'<answer-{tag}>\nHe said: {{"score": 1}} {{reference}} ? ünïcödé\n</answer-{tag}>' in asked
    assert f"<reference-{tag}>\n42\n</reference-{tag}>" in asked
    assert "Authorization" not in head and head["Content-Type"] == "application/json"


def test_many_keep_their_order_and_their_bound():
    busy, most, lock = [0], [0], threading.Lock()

    class Counting(Handler):
        def do_POST(self):
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            number = int(said.partition("<answer-")[2].split("\n")[1])
            with lock:
                busy[0] += 1
                most[0] = max(most[0], busy[0])
            time.sleep(0.002 * (number % 5))
            with lock: busy[0] -= 1
            self.connection.sendall(chat(json.dumps({"score": number / 100, "feedback": str(number)})))

    with misbehaving() as server:
        server.RequestHandlerClass = Counting
        judge = LLMJudge(server.url, "m", concurrent=4, **QUICK)
        said = judge.many([QUESTION] * 40, [str(i) for i in range(40)])
        rows = [{"prompt": "Say a number.", "answer": ""}] * 4
        tasks = TaskSet.from_rows(rows, judge)
        rollouts = [Rollout(task, i, (1,), (2,), (-0.5,), str(i)) for i, task in enumerate(tasks.tasks(4))]
        assert [feedback.text for feedback in judge_all(tasks, rollouts)] == ["0", "1", "2", "3"]
    assert [(feedback.score, feedback.text) for feedback in said] == [(i / 100, str(i)) for i in range(40)]
    assert 2 <= most[0] <= 4


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of `transformers serve` with the demo model on loopback, offline."""
    pytest.importorskip("fastapi", reason='pip install "transformers[serving]"')
    pytest.importorskip("openai", reason='pip install "transformers[serving]"')
    pytest.importorskip("uvicorn", reason='pip install "transformers[serving]"')
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
    """Come back when a server answers; where it dies, show what it said."""
    deadline = time.monotonic() + seconds
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=5): return
        except OSError: time.sleep(0.2)
    raise AssertionError(f"transformers serve did not start: {log.read_text()[-2000:]}")


def test_a_real_server_answers_as_we_read_it(served):
    task = Codebook().tasks(1)[0]
    payload = {"model": str(DEMO), "messages": list(task.messages), "temperature": 0.0, "max_tokens": 24}
    said = content_of(post(f"{served}/chat/completions", payload, timeout=30.0))
    assert [pair[:3] for pair in said.split(" ")] == [f"{syllable}=" for syllable in task.question.split()[4:]]


def test_a_real_model_talks_nonsense(served):
    judge = LLMJudge(served, str(DEMO), "{question} {answer}", options={"max_tokens": 16}, tries=2, timeout=30.0)
    with pytest.raises(EndpointError, match=r"in 2 of 2 tries; the last one: no verdict in its reply: \S"):
        judge(QUESTION, "ka so")
    with pytest.warns(UserWarning, match="no verdict in its reply"):
        patient = LLMJudge(served, str(DEMO), "{question} {answer}", options={"max_tokens": 16}, tries=1, errors="silence")
        assert patient.many([QUESTION] * 3, ["ka so", "{answer}", ""]) == [FAILED] * 3


def test_a_real_server_refuses_in_its_own_words(served):
    with pytest.raises(EndpointError, match="in 1 of 5 tries; the last one: HTTP 400: .*requested 'another'"):
        LLMJudge(served, "another", timeout=30.0)(QUESTION, "41")
    with pytest.raises(Trouble, match="HTTP 404"): post(f"{served}/chat", {})
