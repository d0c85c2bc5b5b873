"""What a lesson cannot say of the fused loss: compiled code, a machine without a compiler, several processes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sdpo_nb.loss import Head, Objective, fused_distillation_loss
from sdpo_nb.loss.passes import compiled, has_compiler
from torch import Tensor
from torch._dynamo.utils import counters

OBJECTIVES = [
    Objective(0.5, "full"), Objective(1, "full", advantage_clip=0.5), Objective(0.5, temperature=1.3),
    Objective(0, "teacher_topk", k=9), Objective(1, "sampled"),
]


def attempts(rows: int = 4, width: int = 10, words: int = 5000) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return dict(
        states=torch.randn(rows, width, 8, generator=draw), told=torch.randn(rows, width, 8, generator=draw),
        weight=torch.randn(words, 8, generator=draw), ids=torch.randint(0, words, (rows, width), generator=draw),
        mask=(torch.rand(rows, width, generator=draw) > 0.3).long(),
    )


def loss_and_gradient(objective: Objective, is_compiled: bool, softcap: float | None = 20.0) -> tuple[Tensor, Tensor]:
    given = attempts()
    hidden, head = given["states"].requires_grad_(), Head(given["weight"], softcap=softcap)
    loss = fused_distillation_loss(
        hidden, head, given["told"], head, given["ids"], given["mask"], objective, is_compiled=is_compiled
    ).loss
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.skipif(not has_compiler("cpu"), reason="compiled passes need a C++ compiler (g++ or clang++)")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: f"{objective.support}, {objective.alpha}")
def test_compiled_passes_say_what_eager_ones_do(objective: Objective):
    compiled.cache_clear()
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True): found = loss_and_gradient(objective, True)
    assert counters["stats"]["unique_graphs"] >= before + 3  # sums, terms, gradient: nothing stayed eager
    for eager, other in zip(loss_and_gradient(objective, False), found):
        torch.testing.assert_close(eager, other, atol=1e-6, rtol=1e-5)


def test_a_broken_compiler_is_no_reason_to_stop(tmp_path: Path):
    code = (
        "from test_fused import *\n"
        "pairs = zip(loss_and_gradient(OBJECTIVES[0], False), loss_and_gradient(OBJECTIVES[0], True))\n"
        "assert all(torch.equal(eager, other) for eager, other in pairs)\n"
    )
    env = os.environ | {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_no_compiler_is_noticed_before_it_is_called():
    code = "from sdpo_nb.loss.passes import has_compiler; print(has_compiler('cpu'))"
    env = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "False", done.stderr


class Policy(torch.nn.Module):
    "A body, and a head that trains with it; its hidden states are what the loss asks for."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 5000, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.body(states).tanh()


def gradients(policy: Policy, model: torch.nn.Module, rows: slice, normalizer: Tensor) -> list[Tensor]:
    given = attempts()
    fused_distillation_loss(
        model(given["states"][rows]), policy.head.weight, given["told"][rows], given["weight"], given["ids"][rows],
        given["mask"][rows], Objective(0.5, "full"), normalizer=normalizer,
    ).loss.backward()
    return [weight.grad for weight in policy.parameters()]


def one_process(rank: int, folder: str) -> None:
    "Half of the rows on each of two processes; the divisor is the whole's, shared out, for DDP takes the mean."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    tokens = attempts()["mask"][rows].sum().float()
    dist.all_reduce(tokens)
    policy = Policy()
    found = gradients(policy, torch.nn.parallel.DistributedDataParallel(policy), rows, tokens / 2)
    if rank == 0: torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_two_processes_find_the_gradients_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    policy = Policy()
    expected = gradients(policy, policy, slice(None), attempts()["mask"].sum())
    for found, whole in zip(torch.load(tmp_path / "gradients.pt"), expected):
        torch.testing.assert_close(found, whole, atol=1e-7, rtol=1e-5)
