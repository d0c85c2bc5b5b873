"""Teachers where a notebook cannot follow: in several processes, and on a base of four bits."""
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sdpo_nb.core.adapters import add_adapter
from sdpo_nb.core.demo import DEMO
from sdpo_nb.learn.teachers import EMA, Restart, Teacher, TrustRegion
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

IDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
TEACHERS: dict[str, Callable[[], Teacher]] = {"EMA": lambda: EMA(0.05), "Restart": lambda: Restart(2)}
RUNS = [(trained, kind) for trained in ("all weights", "adapter") for kind in TEACHERS]


def student(trained: str) -> torch.nn.Module:
    "All weights, two of them tied, or an adapter that has been trained before."
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    if trained == "adapter":
        model, _ = add_adapter(model, rank=2)
        for weight in model.parameters():
            if weight.requires_grad: torch.nn.init.normal_(weight, std=0.1)
    return model.double()  # Adam divides by what it has seen: single precision would leave more than 1e-6


def three_steps(model: torch.nn.Module, rows: Tensor, teacher: Teacher) -> tuple[dict[str, Tensor], float]:
    "Three optimizer steps, each followed by the teacher; its weights then and what it reads, and how far it is behind."
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        teacher.update("rollout")
    return weights_and_words(teacher), teacher.gap()


def weights_and_words(teacher: Teacher) -> dict[str, Tensor]:
    "All that a teacher remembers, and what it expects of a text."
    with teacher.second.reading() as reader: words = reader(IDS[:1]).logits
    return teacher.state_dict()["weights"] | {"words": words}


def half_of_it(rank: int, folder: str, how: str) -> None:
    "One of two processes, with half of the rows."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    shard, all_found = partial(fully_shard, mesh=init_device_mesh("cpu", (2,))), {}
    for trained, kind in RUNS:
        model = student(trained)
        if how == "ddp": model = torch.nn.parallel.DistributedDataParallel(model)
        teacher = TEACHERS[kind]().attach(model)
        if how == "fsdp2": shard(model), teacher.prepare(shard)
        found = all_found[trained, kind] = three_steps(model, IDS[2 * rank : 2 * rank + 2], teacher)
        teacher.save(path := f"{folder}/teacher.safetensors")
        teacher.second.move(1.0)
        teacher.load(path)  # what one process wrote, all can take up
        again = weights_and_words(teacher)
        assert all(torch.equal(again[key], weight) for key, weight in found[0].items())
    if rank == 0: torch.save(all_found, f"{folder}/found.pt")
    dist.destroy_process_group()


def third_stage(rank: int, folder: str, port: int) -> None:
    "The same under DeepSpeed, which leaves each process with a slice of every weight."
    here = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in here.items()}, DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    sizes = dict(train_micro_batch_size_per_gpu=2, train_batch_size=4, zero_force_ds_cpu_optimizer=False)
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = sizes | {"gradient_clipping": 0.0, "zero_optimization": stage}
    deepspeed.init_distributed("gloo")
    switch, all_found = HfDeepSpeedConfig(config), {}  # what a Trainer does; transformers asks it while it lives
    for trained, kind in RUNS:
        model = student(trained).float()
        teacher = TEACHERS[kind]().attach(model)
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        teacher.prepare(lambda copied: deepspeed.initialize(model=copied, config=config)[0].module)
        rows = IDS[2 * rank : 2 * rank + 2]
        for _ in range(3):
            engine.backward(engine(rows, labels=rows).loss)
            engine.step()
            teacher.update("rollout")
        teacher.save(path := f"{folder}/teacher.safetensors")
        all_found[trained, kind] = weights_and_words(teacher), teacher.gap()
        teacher.second.move(1.0)
        teacher.load(path)
        again = weights_and_words(teacher)
        assert all(torch.equal(again[key], weight) for key, weight in all_found[trained, kind][0].items())
    if rank == 0: torch.save(all_found, f"{folder}/found.pt")
    sliced = AutoModelForCausalLM.from_pretrained(DEMO)  # each process holds a slice of it from the start
    copied = EMA().attach(sliced).state_dict()["weights"]
    whole_ones = load_file(DEMO / "model.safetensors")
    assert switch.is_zero3() and sliced.lm_head.weight.numel() == 0
    assert all(torch.equal(copied[name], whole_ones[name].float()) for name in whole_ones if name in copied)
    assert copied.keys() & whole_ones.keys()
    dist.destroy_process_group()


def test_slices_of_zero_3_keep_the_teacher_of_one(tmp_path: Path):
    pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "sdpo-nb[deepspeed]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(third_stage, (str(tmp_path), port), nprocs=2)
    for (trained, kind), (found, gap) in torch.load(tmp_path / "found.pt").items():
        alone = student(trained).float()
        teacher = TEACHERS[kind]().attach(alone)
        start = teacher.state_dict()["weights"]
        expected, behind = three_steps(alone, IDS, teacher)
        assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-4  # a teacher that stays fails
        for name in expected: torch.testing.assert_close(found[name], expected[name], atol=1e-4 if name == "words" else 2e-6, rtol=0)
        assert gap == pytest.approx(behind, abs=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_keep_the_teacher_of_one(how: str, tmp_path: Path):
    torch.multiprocessing.spawn(half_of_it, (str(tmp_path), how), nprocs=2)
    for (trained, kind), (found, gap) in torch.load(tmp_path / "found.pt").items():
        alone = student(trained)
        teacher = TEACHERS[kind]().attach(alone)
        start = teacher.state_dict()["weights"]
        expected, behind = three_steps(alone, IDS, teacher)
        assert list(found) == list(expected)
        assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-4  # a teacher that stays fails
        for name in expected: torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)
        assert gap == pytest.approx(behind, abs=1e-6)


def test_a_base_of_four_bits_carries_student_and_teacher():
    small = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=small, dtype=torch.float32)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    model, _ = add_adapter(model, rank=2)
    before = model(IDS).logits.detach()
    teacher = EMA(0.5).attach(model)
    region = TrustRegion(0.5).attach(model)
    three_steps(model, IDS, teacher)
    with teacher.second.reading() as reader: behind = reader(IDS).logits
    now = model(IDS).logits.detach()
    assert 0 < (behind - before).norm() < (now - before).norm() and region.second is not None
