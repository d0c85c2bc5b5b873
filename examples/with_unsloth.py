"""SDPO with Unsloth on a free Colab GPU: a base of 4 bits, an adapter, and the 16-bit floats that a T4 has.

    pip install "sdpo-nb[unsloth,quant]"    # in an environment of its own: Unsloth wants an older TRL
    python with_unsloth.py                  # Qwen3-1.7B on GSM8K: needs a GPU, and the hub for model and data
    python with_unsloth.py --demo           # the embedded model, offline; without Unsloth where that is not there

Prints the pass rate on held-out questions before and after. A run that was stopped goes on from its folder: on Colab
put that on Drive. Beside Unsloth this project was tested on CPUs alone; what a T4 takes was not measured.
"""
import argparse
import importlib.util

from sdpo_nb.run.cli import count  # which imports nothing that is slow

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--demo", action="store_true", help="train the embedded model, offline")
parser.add_argument("--model", default="unsloth/Qwen3-1.7B", help="an instruct model of the hub (%(default)s)")
parser.add_argument("--steps", type=count, default=30, help="updates (%(default)s)")
parser.add_argument("--out", default="run", help="folder of the run (%(default)s)")


def main() -> None:
    options = parser.parse_args()
    if has_unsloth := importlib.util.find_spec("unsloth") is not None:
        from unsloth import FastLanguageModel  # before all that follows: it patches TRL
    elif options.demo: print("Unsloth is not installed: this run goes without it, and shows nothing of its speed.")
    else: parser.error('Unsloth is not installed; run: pip install "sdpo-nb[unsloth,quant]"')
    from datasets import Dataset, load_dataset
    from sdpo_nb import (
        Codebook, Numbers, SDPOTrainer, TaskSet, WidgetCallback, add_adapter, as_reward, as_rows, colab_t4, load_demo,
        load_model, reports_of,
    )
    from sdpo_nb.core.demo import DEMO
    from sdpo_nb.learn.hosting import last_whole_checkpoint
    from sdpo_nb.learn.presets import demo

    looks = dict(  # at held-out questions: before the first step and after the last, one attempt at each
        output_dir=options.out, max_steps=options.steps, eval_on_start=True, eval_strategy="steps",
        eval_steps=options.steps, num_generations_eval=1, disable_tqdm=True,
    )
    if options.demo:
        environment = Codebook("omega")
        config = demo(learning_rate=4e-3, per_device_eval_batch_size=64, dataloader_pin_memory=False, **looks)
        source, how = DEMO, dict(dtype="float32", load_in_4bit=False)
    else:
        rows = load_dataset("openai/gsm8k", "main", split="train")
        environment = TaskSet.from_rows(rows, Numbers(names_answer=True), prompt="question", held_out=64)
        config = colab_t4(per_device_eval_batch_size=8, save_steps=10, save_total_limit=1, **looks)
        source, how = options.model, dict(load_in_4bit=True, max_seq_length=3072)
    if has_unsloth:
        base, tokenizer = load_model(source, unsloth=True, **how)
        model = FastLanguageModel.get_peft_model(base, r=16, lora_alpha=32, use_gradient_checkpointing="unsloth")
    else:
        base, tokenizer = load_demo()
        model, _ = add_adapter(base, rank=16)
    trainer = SDPOTrainer(
        model, as_reward(environment), config, Dataset.from_list(as_rows(environment.tasks(2000))),
        Dataset.from_list(as_rows(environment.tasks(64, "held_out"))), processing_class=tokenizer,
        callbacks=[WidgetCallback()],
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(options.out))
    if not options.demo: trainer.save_model()
    held_out = [one.held_out for one in reports_of(trainer.state.log_history) if one.held_out is not None]
    with_or_without = "with" if has_unsloth else "without"
    print(f"held-out pass rate, {with_or_without} Unsloth: {held_out[0]:.1%} before, {held_out[-1]:.1%} after")


if __name__ == "__main__": main()
