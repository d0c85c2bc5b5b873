"""What the tests lean on."""
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def notebook_cell(notebook: str, cell: str) -> Iterator[None]:
    """Make whatever fails inside name the notebook and the cell it came from; also a decorator."""
    try: yield
    except Exception as error:
        error.add_note(f"in {notebook}, cell {cell}")
        raise


def hear_ctrl_c() -> None:
    """For a child process: a shell's background jobs ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


CODEBOOK = dict(  # a step of eight attempts on the demo's questions, two of them
    max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1, num_generations=4, seed=0,
    max_completion_length=20, learning_rate=1e-3, lr_scheduler_type="constant", bf16=False, use_cpu=True,
    gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
)


def grpo_runs_on_a_cpu() -> bool:
    """TRL 1.15 computes GRPO's own loss, and so a hybrid's, with Triton; 1.16 with torch where there is none."""
    from importlib.metadata import version
    from packaging.version import Version

    return Version(version("trl")) >= Version("1.16")


def codebook_rows(count: int) -> Any:
    """Questions about the demo's book omega, as a dataset for TRL."""
    from datasets import Dataset
    from sdpo_nb.core.demo import Codebook
    from sdpo_nb.learn.hosting import as_rows

    return Dataset.from_list(as_rows(Codebook().tasks(count)))


def codebook_judge(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **columns: Any
) -> list[Any]:
    """A reward function: what the demo's checker says of each attempt, in words too."""
    from sdpo_nb.core.demo import Codebook
    from sdpo_nb.learn.hosting import as_reward

    return as_reward(Codebook())(prompts, completions, answer=answer)


def codebook_trainer(
    folder: Path, reward: Any = codebook_judge, model: Any = None, host: Any = None, given: Any = (), **settings: Any
) -> Any:
    """A trainer of the demo on its questions: its class, what it is given besides, and its settings may differ."""
    from sdpo_nb.core.demo import load_demo
    from sdpo_nb.learn.config import SDPOConfig
    from sdpo_nb.learn.trainer import SDPOTrainer

    demo, tokenizer = load_demo()
    given = dict(train_dataset=codebook_rows(64), processing_class=tokenizer) | dict(given)
    args = SDPOConfig(output_dir=str(folder), **CODEBOOK | settings)
    return (host or SDPOTrainer)(demo if model is None else model, reward, args, **given)


def looking(look: Callable[..., None], host: Any = None) -> Any:
    """A trainer's class that shows every slice to `look(trainer, model, inputs, loss_of)` before it learns from it."""
    from sdpo_nb.learn.trainer import SDPOTrainer

    host = host or SDPOTrainer

    class Looking(host):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss_of = lambda given: super(Looking, self).compute_loss(model, given, *args, **kwargs)
            look(self, model, inputs, loss_of)
            return loss_of(inputs)

    return Looking


def share_right(*args: Any, **columns: Any) -> list[Any]:
    """A reward function whose score is the share of the right letters, so that some succeed at once."""
    from dataclasses import replace

    return [replace(said, score=said.metrics["right"]) for said in codebook_judge(*args, **columns)]


def everything(trainer: Any) -> dict[str, Any]:
    """All that changes while an SDPOTrainer trains, and all that it logs, clocks aside."""
    import torch

    clocks = ("time", "per_second", "memory_gib")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "model": trainer.model.state_dict(), "teacher": trainer.teacher.state_dict(), "gap": trainer.teacher.gap(),
        "optimizer": trainer.optimizer.state_dict(), "schedule": trainer.lr_scheduler.state_dict(),
        "memory": None if trainer.memory is None else trainer.memory.state_dict(),
        "logged": [{key: x for key, x in line.items() if not any(clock in key for clock in clocks)} for line in lines],
        "luck": torch.get_rng_state(), "step": trainer._step, "steps": trainer.state.global_step,
    }


def check_same(found: Any, expected: Any, where: str = "") -> None:
    """Refuse the smallest difference, and say where it is."""
    from torch import Tensor

    if isinstance(expected, Tensor): assert found.equal(expected), where
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key in expected: check_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected)): check_same(*pair, f"{where}/{i}")
    else: assert found == expected, where
