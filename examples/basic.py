"""SDPO on grade-school maths: a judge says what is wrong with a number, and the model learns from what was said.

    python basic.py --demo    # no network, no GPU, about twenty seconds: the embedded model learns a code instead
    python basic.py           # Qwen3-0.6B with an adapter on GSM8K: needs a GPU, and the hub for model and data

Prints the pass rate on held-out questions before and after. Your own task is rows with a prompt and an answer; see
TaskSet.from_rows. Only the demo was run where this was written; what the second line costs was not measured.
"""
import argparse

from sdpo_nb.run.cli import count  # which imports nothing that is slow

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--demo", action="store_true", help="train the embedded model, offline")
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a name on the hub, or a folder (%(default)s)")
parser.add_argument("--steps", type=count, default=30, help="updates (%(default)s)")
parser.add_argument("--out", default="run", help="folder of the run (%(default)s)")


def main() -> None:
    options = parser.parse_args()
    from datasets import Dataset, load_dataset  # what is slow to import comes after the options
    from peft import LoraConfig
    from sdpo_nb import (
        Codebook, Numbers, SDPOConfig, SDPOTrainer, TaskSet, WidgetCallback, as_reward, as_rows, load_demo, reports_of,
    )
    from sdpo_nb.learn.presets import demo

    looks = dict(  # at held-out questions: before the first step and after the last, one attempt at each
        output_dir=options.out, max_steps=options.steps, eval_on_start=True, eval_strategy="steps",
        eval_steps=options.steps, num_generations_eval=1, per_device_eval_batch_size=32, disable_tqdm=True,
    )
    if options.demo:
        (model, tokenizer), adapter = load_demo(), None
        environment, config = Codebook("omega"), demo(dataloader_pin_memory=False, **looks)
    else:
        model, tokenizer, adapter = options.model, None, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        rows = load_dataset("openai/gsm8k", "main", split="train")
        environment = TaskSet.from_rows(rows, Numbers(names_answer=True), prompt="question", held_out=128)
        config = SDPOConfig(  # 8 questions a step, 4 attempts at each
            per_device_train_batch_size=8, gradient_accumulation_steps=4, num_generations=4, max_completion_length=512,
            learning_rate=1e-4, chat_template_kwargs={"enable_thinking": False}, logging_steps=1, **looks,
        )
    trainer = SDPOTrainer(
        model, as_reward(environment), config, Dataset.from_list(as_rows(environment.tasks(2000))),
        Dataset.from_list(as_rows(environment.tasks(128, "held_out"))), processing_class=tokenizer,
        peft_config=adapter, callbacks=[WidgetCallback()],
    )
    trainer.train()
    if not options.demo: trainer.save_model()
    held_out = [one.held_out for one in reports_of(trainer.state.log_history) if one.held_out is not None]
    print(f"held-out pass rate: {held_out[0]:.1%} before, {held_out[-1]:.1%} after {options.steps} steps")


if __name__ == "__main__": main()
