"""The README's code runs as it stands: in its notebook, and here what the notebook leaves out because it asks a hub."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def tiny_qwen3(tmp_path) -> Path:
    """A folder as a hub has it: random weights of Qwen3's architecture, and the demo's tokenizer with Qwen3's template."""
    import trl
    from sdpo_nb import load_demo
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer, folder = load_demo()[1], tmp_path / "Qwen3"
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )
    for part in (Qwen3ForCausalLM(config), tokenizer): part.save_pretrained(folder)
    return folder


def block_with(name: str) -> str:
    """The first block of Python in which a name occurs."""
    return next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if name in block)


def run(code: str, model: Path, folder: Path) -> str:
    """What a program prints in a folder, given a model that is here in place of the hub's."""
    assert code.count('"Qwen/Qwen3-0.6B"') == 1
    code = code.replace('"Qwen/Qwen3-0.6B"', repr(str(model)))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_runs_as_it_stands_on_a_model_that_is_here(tmp_path, tiny_qwen3):
    imports = block_with("load_demo()").partition("\n\n")[0]
    block = block_with("load_model")
    assert block.count("steps=50") == 1
    said = run("\n".join([imports, block_with("class Multiply"), block.replace("steps=50", "steps=2")]), tiny_qwen3, tmp_path)
    assert "\nstep 2" in said
    assert (tmp_path / "run_1e-4").is_dir()


def test_the_trainer_runs_as_it_stands_on_a_model_that_is_here(tmp_path, tiny_qwen3):
    block = block_with("SDPOTrainer")
    rows = [{"prompt": [{"role": "user", "content": ask}], "answer": answer} for ask, answer in (("1+1", "2"), ("2+2", "4"))]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    said = run(block + "\nprint(trainer.state.global_step)\n", tiny_qwen3, tmp_path)
    assert int(said.splitlines()[-1]) > 0
