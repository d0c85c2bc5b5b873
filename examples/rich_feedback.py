"""SDPO on programs: tests run in the sandbox, and the model is told which input it failed on and what was expected.

    python rich_feedback.py --demo    # no network, no GPU, about twenty seconds: the embedded model, see below
    python rich_feedback.py           # Qwen3-1.7B with an adapter on MBPP: needs Linux, a GPU and the hub

Prints the share of held-out tasks solved before and after. The embedded model cannot write Python: in the demo its
answers are tables in which a program in the sandbox looks words up, and what that prints is compared. On MBPP each
test is a process of its own. Only the demo was run where this was written.
"""
import argparse
import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_nb.run.cli import count  # which imports nothing that is slow

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--demo", action="store_true", help="train the embedded model, offline")
parser.add_argument("--model", default="Qwen/Qwen3-1.7B", help="a name on the hub, or a folder (%(default)s)")
parser.add_argument("--steps", type=count, default=30, help="updates (%(default)s)")
parser.add_argument("--out", default="run", help="folder of the run (%(default)s)")
LOOK_UP = """
import json, sys
for answer, words in json.load(sys.stdin):
    table = dict(pair.split("=") for pair in answer.split() if pair.count("=") == 1)
    print(*[table.get(word, "nothing") for word in words])
"""


def as_row(row: Mapping[str, Any]) -> dict[str, str] | None:
    "A problem of MBPP with its asserts as tests, the first of them public; None where an assert is of another form."
    tests = []
    try:
        for line in row["test_list"]:
            test = ast.parse(line).body[0].test  # of `assert name(arguments) == value`
            given, right = [ast.literal_eval(one) for one in test.left.args], ast.literal_eval(test.comparators[0])
            tests.append({"function": test.left.func.id, "input": given, "output": right, "public": not tests})
        words = f"{row['prompt']} For example: {row['test_list'][0]}\nAnswer with one ```python block."
        return {"prompt": words, "tests": json.dumps(tests)}
    except (AttributeError, TypeError, ValueError): return None


class LookUp:
    "The demo's judge: answers are looked up in by a program in the sandbox, and told what it should have printed."

    def many(self, tasks: Sequence[Any], answers: Sequence[str]) -> list[Any]:
        from sdpo_nb import Feedback, run_code

        rights = [dict(pair.split("=") for pair in task.info["answer"].split()) for task in tasks]
        ran = run_code(LOOK_UP, json.dumps([*zip(answers, map(list, rights))]))  # one process for all, for speed
        said = []
        for right, line in zip(rights, ran.stdout.splitlines()):
            wrong = [f"{word}={code}" for (word, code), printed in zip(right.items(), line.split()) if printed != code]
            words = f"{len(wrong)} of {len(right)} wrong. Use {' '.join(wrong)}." if wrong else ""
            said.append(Feedback(float(not wrong), words))
        return said

    def __call__(self, task: Any, answer: str) -> Any: return self.many([task], [answer])[0]


def main() -> None:
    options = parser.parse_args()
    from datasets import Dataset, load_dataset
    from peft import LoraConfig
    from sdpo_nb import (
        Codebook, CodeTests, SDPOConfig, SDPOTrainer, TaskSet, WidgetCallback, as_reward, as_rows, load_demo,
        reports_of,
    )
    from sdpo_nb.learn.presets import demo

    looks = dict(  # at held-out tasks: before the first step and after the last, one attempt at each
        output_dir=options.out, max_steps=options.steps, eval_on_start=True, eval_strategy="steps",
        eval_steps=options.steps, num_generations_eval=1, per_device_eval_batch_size=32, disable_tqdm=True,
    )
    if options.demo:
        (model, tokenizer), adapter, book = load_demo(), None, Codebook("omega")
        environment = TaskSet(book.tasks(2000), LookUp(), book.tasks(64, "held_out"))
        config = demo(dataloader_pin_memory=False, **looks)
    else:
        model, tokenizer, adapter = options.model, None, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        rows = load_dataset("google-research-datasets/mbpp", "sanitized", split="train+validation+test")
        environment = TaskSet.from_rows(filter(None, map(as_row, rows)), CodeTests(), held_out=64)
        config = SDPOConfig(  # 8 problems a step, 4 attempts at each
            per_device_train_batch_size=8, gradient_accumulation_steps=4, num_generations=4, max_completion_length=768,
            learning_rate=1e-4, chat_template_kwargs={"enable_thinking": False}, logging_steps=1, **looks,
        )
    trainer = SDPOTrainer(
        model, as_reward(environment), config, Dataset.from_list(as_rows(environment.tasks(2000))),
        Dataset.from_list(as_rows(environment.tasks(64, "held_out"))), processing_class=tokenizer,
        peft_config=adapter, callbacks=[WidgetCallback()],
    )
    trainer.train()
    if not options.demo: trainer.save_model()
    held_out = [one.held_out for one in reports_of(trainer.state.log_history) if one.held_out is not None]
    print(f"held-out tasks solved: {held_out[0]:.1%} before, {held_out[-1]:.1%} after {options.steps} steps")


if __name__ == "__main__": main()
