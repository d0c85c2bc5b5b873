"""What the chapters on environments cannot say: any text at all, and a maths process that somebody else ends."""
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdpo_nb.core.records import Feedback, Task
from sdpo_nb.experience.environments import Demonstrations, ExactMatch, HumanFeedback, Remark, TaskSet
from sdpo_nb.experience.formats import JSONAnswer, Pattern, Tagged
from sdpo_nb.experience.toolcalls import ToolCalls
from sdpo_nb.experience.choices import MultipleChoice
from sdpo_nb.experience.maths import MODULE, BoundedProcess, Numbers

TASK = Task.ask(
    "What is 6 times 7?", answer="42", options=["41", "42"], demonstration="42",
    calls=[{"name": "product", "arguments": {"a": 6, "b": [7]}}],
)
COMPARE = f"{MODULE}:compare_maths"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
JUDGES = [
    ExactMatch(lenient=True, quotes_answer=True, names_answer=True), MultipleChoice(names_answer=True),
    Demonstrations(), HumanFeedback([Remark(TASK.question, "No.", False, "41")]), Numbers(names_answer=True),
    Tagged(("think", "answer")), Tagged(then=Numbers()), Pattern("4.", "Write 42."),
    JSONAnswer(SCHEMA), JSONAnswer(required=["a"]), ToolCalls(), ToolCalls(in_order=False, names_answer=True),
]
PIECES = st.sampled_from([
    "42", "41", "A", "(B)", "answer: ", "\\boxed{", "}", "{", "[", "]", '"', "\\", "/", "%", "-", ".", ",", " ", "\n",
    "0", "e9", "####", "\\frac{1}{2}", "<answer>", "</answer>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "```json\n", '{"name": "product", "arguments": ', '{"a": 6, "b": [7]}', '"name"', ":", "null", "NaN",
    "\ud800", "\u0664", " or ", "not ", "- ", "x", "!", "\\text{",
])
ANSWERS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: type(judge).__name__)
@settings(deadline=None, max_examples=150)
@given(answer=ANSWERS)
def test_any_text_is_judged(judge, answer):
    said = judge(TASK, answer)
    assert isinstance(said, Feedback) and 0 <= said.score <= 1
    said.text.encode()  # can be stored
    assert len(said.text) < 700 and judge(TASK, answer) == said


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
)
CALLS = st.lists(st.fixed_dictionaries({
    "name": st.sampled_from(["f", "g"]), "arguments": st.dictionaries(st.text(max_size=3), VALUES, max_size=3),
}), max_size=4)


@settings(deadline=None)
@given(calls=CALLS, others=CALLS)
def test_the_expected_calls_are_right_in_either_notation(calls, others):
    task = Task.ask("Do it.", calls=calls)
    tags = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
    outer = json.dumps([{"function": {**call, "arguments": json.dumps(call["arguments"])}} for call in calls])
    assert ToolCalls()(task, tags).score == ToolCalls()(task, outer).score == 1
    again = ToolCalls()(task, json.dumps(others))
    assert bool(again.text) == (again.score == 0) and (again.metrics["calls_right"] == 1) >= again.score


@settings(deadline=None)
@given(
    questions=st.lists(st.sampled_from(["a", "a ", " a", "b", "c", "c\n", "d", "e"]), min_size=2),
    held_out=st.integers(0, 3) | st.floats(0, 0.9), seed=st.integers(0, 5),
)
def test_no_question_stands_in_both_splits(questions, held_out, seed):
    different = {question.strip() for question in questions}
    rows = [{"prompt": question, "answer": "42"} for question in questions]
    try: tasks = TaskSet.from_rows(rows, ExactMatch(), held_out=held_out, seed=seed)
    except ValueError as error:
        assert "would be held out" in str(error) and len(different) <= max(1, held_out)
        return
    train, kept = ({task.question.strip() for task in split} for split in (tasks.train, tasks.held_out))
    assert not train & kept and train | kept == different and len(tasks.train) + len(tasks.held_out) == len(questions)


def test_a_maths_process_that_was_ended_is_started_again():
    maths = BoundedProcess(COMPARE, 5.0, "math_verify")
    assert maths.ask("42", "$42$")[0] == "right"
    os.kill(maths.process.pid, signal.SIGKILL)
    maths.process.wait()
    assert maths.ask("42", "$41$")[0] == "wrong"
    with ThreadPoolExecutor(5) as pool: said = list(pool.map(lambda i: maths.ask("42", f"${i}$")[0], range(40, 45)))
    assert said == ["wrong", "wrong", "right", "wrong", "wrong"]


def test_who_was_interrupted_does_not_read_the_answer_to_an_older_question(monkeypatch):
    maths = BoundedProcess(COMPARE, 5.0, "math_verify")
    assert maths.ask("1", "$1$")[0] == "right"
    with monkeypatch.context() as broken:
        def interrupted(): raise KeyboardInterrupt
        broken.setattr(maths.process.stdout, "readline", interrupted)
        with pytest.raises(KeyboardInterrupt): maths.ask("2", "$2$")
    assert maths.ask("3", "$4$") == ["wrong", "4"]
