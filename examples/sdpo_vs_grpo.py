"""SDPO beside GRPO: the same model, questions, judge and number of attempts; GRPO hears the score, SDPO the words too.

    python sdpo_vs_grpo.py --demo    # no network, no GPU, under half a minute: the embedded model
    python sdpo_vs_grpo.py           # Qwen3-0.6B with an adapter on GSM8K: needs a GPU, and the hub

Prints both curves of the pass rate on held-out questions, and writes them into a page. One seed says little, and each
method has a learning rate of its own. On the demo GRPO gets there as well, after some six times as many attempts:
https://sdpo-nb.github.io/sdpo-nb/experiments/2026-11-20_demo.html
"""
import argparse

from sdpo_nb.run.cli import count, seed  # which imports nothing that is slow

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--demo", action="store_true", help="train the embedded model, offline")
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a name on the hub, or a folder (%(default)s)")
parser.add_argument("--steps", type=count, default=25, help="updates of each method (%(default)s)")
parser.add_argument("--looks", type=count, default=5, help="looks at held-out questions on the way (%(default)s)")
parser.add_argument("--seed", type=seed, default=0, help="of questions and attempts (%(default)s)")
parser.add_argument("--out", default="compared.html", help="the page (%(default)s)")
METHODS = {"SDPO": {"enabled": True}, "GRPO": {"enabled": False}}  # one switch of SDPOConfig


def main() -> None:
    options = parser.parse_args()
    from datasets import Dataset, load_dataset
    from peft import LoraConfig
    from sdpo_nb import (
        Codebook, Numbers, SDPOConfig, SDPOTrainer, TaskSet, WidgetCallback, as_reward, as_rows, load_demo, reports_of,
        write_report,
    )
    from sdpo_nb.learn.presets import demo
    from sdpo_nb.view.terminal import sparkline

    rates = {"SDPO": 6e-4, "GRPO": 3e-4} if options.demo else {"SDPO": 1e-4, "GRPO": 1e-4}
    if options.demo: environment = Codebook("omega")
    else:
        rows = load_dataset("openai/gsm8k", "main", split="train")
        environment = TaskSet.from_rows(rows, Numbers(names_answer=True), prompt="question", held_out=128)
    runs = {}
    for name, switch in METHODS.items():
        size = dict(
            output_dir=f"run_{name}", max_steps=options.steps, learning_rate=rates[name], seed=options.seed,
            eval_on_start=True, eval_strategy="steps", eval_steps=max(1, options.steps // options.looks),
            num_generations_eval=1, per_device_eval_batch_size=32, disable_tqdm=True, **switch,
        )
        if options.demo:
            (model, tokenizer), adapter = load_demo(), None
            config = demo(dataloader_pin_memory=False, **size)
        else:
            model, tokenizer = options.model, None
            adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            config = SDPOConfig(
                per_device_train_batch_size=8, gradient_accumulation_steps=8, num_generations=8, logging_steps=1,
                max_completion_length=512, chat_template_kwargs={"enable_thinking": False}, save_strategy="no", **size,
            )
        trainer = SDPOTrainer(
            model, as_reward(environment), config, Dataset.from_list(as_rows(environment.tasks(2000))),
            Dataset.from_list(as_rows(environment.tasks(128, "held_out"))), processing_class=tokenizer,
            peft_config=adapter, callbacks=[WidgetCallback(title=name)],
        )
        trainer.train()
        runs[name] = reports_of(trainer.state.log_history, per_step=64)
    print("\nheld-out pass rate, by attempts made")
    for name, reports in runs.items():
        looks = {one.attempts: one.held_out for one in reports if one.held_out is not None}
        steps = "  ".join(f"{attempts}: {share:.0%}" for attempts, share in looks.items())
        print(f"  {name}  {sparkline([*looks.values()])}  {steps}")
    write_report(options.out, runs, title="SDPO beside GRPO", settings=vars(options))
    print(f"both curves: {options.out}")


if __name__ == "__main__": main()
