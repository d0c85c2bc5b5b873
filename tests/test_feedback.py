"""What a lesson cannot say of judging: several processes, Ctrl-C, a fork, a real notebook, and TRL's own trainer."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cells import hear_ctrl_c
from jupyter_client.manager import start_new_kernel
from sdpo_nb.core.demo import load_demo
from sdpo_nb.core.records import Task
from sdpo_nb.experience.feedback import JudgeError
from sdpo_nb.experience.prompting import teacher_views
from sdpo_nb.experience.rewards import Rewards, across_processes

QUIET = os.environ | {"OMP_NUM_THREADS": "1"}
ATTEMPTS = [[("What is 6 times 7?", "42"), ("What is 7 times 7?", "48"), ("What is 6 times 7?", "40")],
            [("What is 6 times 7?", "41"), ("What is 7 times 7?", "47")]]  # of each process


def hints(completions: list, answer: list, **columns) -> list[dict]:
    said = [int(turns[0]["content"]) - right for turns, right in zip(completions, answer)]
    return [{"score": float(off == 0), "feedback": f"Off by {abs(off)}." if off else ""} for off in said]


def one_process(rank: int, folder: str) -> None:
    "Judge the own attempts, gather everybody's, and show each of the own ones what there is to show."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    questions, answers = zip(*ATTEMPTS[rank])
    tasks = [Task.ask(question, answer=int(question.split()[2]) * 7) for question in questions]
    said = Rewards(hints).many(tasks, answers)
    everyone, own = across_processes([*zip(questions, answers, said)])
    questions, answers, said = zip(*everyone)
    views = teacher_views(questions, answers, [f.score for f in said], [f.text for f in said], groups=questions)
    torch.save([(answers[own], [f.text for f in said[own]], [view.demonstration for view in views[own]])],
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_an_attempt_is_shown_the_success_of_another_process(tmp_path: Path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    [first], [second] = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == (("42", "48", "40"), ["", "Off by 1.", "Off by 2."], [None, None, "42"])
    assert second == (("41", "47"), ["Off by 1.", "Off by 2."], ["42", None])


def test_ctrl_c_does_not_wait_for_a_server():
    code = (
        "import asyncio, time\n"
        "from sdpo_nb.experience.rewards import Rewards\n"
        "async def asks_a_server(completions, **columns):\n"
        "    print('asked', flush=True)\n"
        "    try: await asyncio.sleep(300)\n"
        "    finally: print('gave up', flush=True)\n"
        "try: Rewards(asks_a_server, errors='feedback').ask(['?'], ['42'])\n"
        "finally: time.sleep(1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_ctrl_c,
    ) as asking:
        assert asking.stdout.readline() == "asked\n"
        time.sleep(0.5)  # it was asked in another thread, and who asked has yet to begin waiting
        start = time.monotonic()
        asking.send_signal(signal.SIGINT)
        try: printed, errors = asking.communicate(timeout=60)
        finally: asking.kill()
    assert printed == "gave up\n" and errors.rstrip().endswith("KeyboardInterrupt"), errors
    assert time.monotonic() - start < 30


def test_a_forked_child_has_a_loop_of_its_own():
    code = (
        "import asyncio, multiprocessing\n"
        "from sdpo_nb.experience.rewards import Rewards\n"
        "async def exact(completions, **columns): return [float(one == '42') for one in completions]\n"
        "def score(answer): return Rewards(exact).ask(['?'], [answer])[0].score\n"
        "here = score('42')\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "    print(here, pool.apply_async(score, ('42',)).get(timeout=60))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=QUIET, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1.0", "1.0"], done.stderr


def test_a_notebook_cell_may_ask_async_judges():
    cell = (
        "import asyncio\n"
        "from sdpo_nb.experience.rewards import Rewards\n"
        "async def exact(completions, **columns):\n"
        "    await asyncio.sleep(0.01)\n"
        "    return [float(one == '42') for one in completions]\n"
        "assert asyncio.get_running_loop().is_running()\n"
        "print([said.score for said in Rewards(exact).ask(['?'] * 2, ['42', '41'])])\n"
    )
    manager, client = start_new_kernel(kernel_name="python3", env=QUIET)
    printed = []
    try:
        reply = client.execute_interactive(
            "async def run():\n" + "".join(f"    {line}\n" for line in cell.splitlines()) + "await run()", timeout=100,
            output_hook=lambda message: printed.append(message["content"].get("text", message["content"])),
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert (reply["content"]["status"], printed[-2:-1]) == ("ok", ["[1.0, 0.0]\n"]), printed


class Riddle:
    "A TRL environment without tools, which tells its reward when it is over."

    def reset(self, secret: int = 0, **columns) -> None:
        self.secret = secret

    async def get_reward(self) -> dict:
        return {"score": 1 / self.secret, "feedback": f"The secret was {self.secret}."}


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory':UserWarning")
def test_the_functions_that_trl_makes_of_an_environment_are_heard(tmp_path: Path):
    import trl
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load_demo()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    def brief(completions, **columns): return [None if len(one) > 9 else 1.0 for one in completions]
    config = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=2, report_to=[], use_cpu=True,
        reward_weights=[0.5],
    )
    trainer = GRPOTrainer(
        model, [brief], config, Dataset.from_list([{"prompt": "so"}]), processing_class=tokenizer,
        environment_factory=Riddle,
    )
    rewards = Rewards(trainer.reward_funcs, trainer.reward_weights.tolist(), trainer.reward_func_names)
    riddles = [Riddle(), Riddle()]
    for riddle, secret in zip(riddles, (1, 4)): riddle.reset(secret)
    said = rewards.ask(["?", "?"], ["Is it one?", "four"], environments=riddles, trainer_state=trainer.state)
    assert [(one.score, one.text) for one in said] == [
        (1.0, "Riddle: The secret was 1."), (0.75, "Riddle: The secret was 4."),
    ]
    riddles[0].reset(0)
    with pytest.raises(JudgeError, match="Riddle, asked about 2 attempts at once: ZeroDivisionError"):
        rewards.ask(["?", "?"], ["Is it one?", "four"], environments=riddles)
