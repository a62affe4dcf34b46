"""Two processes on the CPU (gloo) compute what one does: tensor parallel, expert parallel, and FSDP2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from branchmix.models.routing_branchmix import BranchMixRouter
from mixtures import random_mixture, tokens

LOW_RANK = ("q", "o", "gate", "up", "down")
MIXTURES = [  # family, attention: every kind of attention code, FFN, block and query norm
    ("llama", "kv_experts"),
    ("llama", "kv_sharing"),
    ("llama", "average"),
    ("llama-bias", "kv_experts"),
    ("qwen3", "kv_experts"),
    ("olmo2", "kv_sharing"),
    ("gemma3", "kv_sharing"),
    ("cohere", "kv_experts"),
    ("nemotron", "kv_sharing"),
    ("phi3", "kv_sharing"),
    ("gpt-neox", "kv_experts"),
    ("gpt2", "kv_sharing"),
    ("opt", "kv_experts"),
    ("qwen3", "top-1 kv_experts"),  # only the chosen experts' heads, where the projections are whole
    ("llama", "top-1 kv_sharing"),
    ("llama", "gated kv_experts"),  # with document gates
    ("cohere", "gated average"),
    ("llama-bias", "low-rank kv_sharing"),  # experts as changes of the seed, of which some have none
]
GATE = {"domains": ["prose", "code"], "decay": 0.9}

WORKER = """
import os, sys, traceback
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import branchmix
from branchmix.models import attention_branchmix
from branchmix.models.attention_branchmix import BranchMixAttention, Chosen

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
rank = int(os.environ["RANK"])


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(ours, theirs, what):
    scale = max(1.0, float(theirs.abs().max()))
    message = lambda text: f"{folder.name}, {what}: {text}"
    torch.testing.assert_close(full(ours), theirs, rtol=0, atol=1e-5 * scale, msg=message)


layers = []
attention_branchmix.Chosen = lambda *args: layers.append(1) or Chosen(*args)


def check(folder, **sizes):
    BranchMixAttention.sparse = "top-1" in folder.name or None
    expected = load_file(folder / "expected.safetensors")
    ids = expected["ids"]
    config = DistributedConfig(**sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config).eval()
    sharded = {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    assert sharded, "nothing was sharded"
    for name, parameter in model.named_parameters() if "low-rank" not in folder.name else ():
        if ".o_proj" in name or ".heads.q_proj.weight" in name:
            assert name in sharded, name
        if ".experts." in name and "ep_size" in sizes:
            assert parameter.to_local().shape[0] == 2 and parameter.shape[0] == 4, name
        elif ".experts." in name and not any("_bias" in other for other, _ in model.named_parameters()):
            assert parameter.to_local().numel() * 2 == parameter.numel(), name
    layers.clear()
    with torch.no_grad():
        close(model(ids).logits, expected["logits"], "logits")
    assert len(layers) == (2 if "top-1" in folder.name and "fsdp_size" in sizes else 0), "chosen experts' heads"
    if "fsdp_size" not in sizes:
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert torch.equal(generated, expected["generated"]), f"{folder.name}: generated"
    if sizes == {"tp_size": 2}:
        copy = Path(sys.argv[3]) / folder.name
        model.save_pretrained(copy)
        dist.barrier()
        with torch.no_grad():
            again = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
            close(again(ids).logits, expected["logits"], "saved and loaded by one process")
    loss = model.train()(ids, labels=ids, use_cache=False).loss
    close(loss.detach(), expected["loss"], "loss")
    loss.backward()
    grads = dict(model.named_parameters())
    for name, grad in expected.items():
        if name.startswith("grad."):
            close(grads[name.removeprefix("grad.")].grad, grad, name)
    return model


failed = False
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for sizes in eval(sys.argv[2]):
        if "low-rank" in folder.name and "ep_size" in sizes:
            continue  # changes of the seed are not spread
        try:
            check(folder, **sizes)
        except Exception:
            failed = True
            if rank == 0:
                print(folder.name, sizes)
                traceback.print_exc()
dist.barrier()
dist.destroy_process_group()
sys.exit(failed)
"""


def two_processes(folder: Path, sizes: list[dict[str, int]], script: Path) -> None:
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(folder), repr(sizes), str(script.parent / "copies")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtures of four experts, each with what one process computes: logits, a continuation, loss, some gradients."""
    root = tmp_path_factory.mktemp("mixtures")
    ids = tokens(length=9)
    for name, attention in MIXTURES:
        folder = root / f"{name}-{attention.replace(' ', '-')}"
        options = {"document_gate": GATE} if "gated" in attention else {}
        options |= {"attention_num_experts_per_tok": 1} if "top-1" in attention else {}
        options |= {"expert_ranks": [{matrix: [0, 1, 2, 3] for matrix in LOW_RANK}]} if "low-rank" in attention else {}
        model = random_mixture(name, attention.split()[-1], num_experts=4, **options)
        model.save_pretrained(folder)
        with torch.no_grad():
            expected = {"ids": ids, "logits": model(ids).logits}
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        expected["generated"] = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        out = model.train()(ids, labels=ids, use_cache=False)
        expected["loss"] = out.loss.detach()
        out.loss.backward()
        routers = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, BranchMixRouter)}
        for path, parameter in model.named_parameters():
            if (
                path in routers
                or "document_gate" in path
                or "experts.down_proj" in path
                or path.endswith(("o_proj.weight", "k_proj.weight"))
            ):
                expected[f"grad.{path}"] = parameter.grad
        save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    return root


def test_tensor_parallel_equals_one_process(mixtures: Path, tmp_path: Path) -> None:
    two_processes(mixtures, [{"tp_size": 2}], tmp_path / "worker.py")


def test_expert_parallel_equals_one_process(mixtures: Path, tmp_path: Path) -> None:
    two_processes(mixtures, [{"tp_size": 2, "ep_size": 2}], tmp_path / "worker.py")


def test_fsdp_equals_one_process(mixtures: Path, tmp_path: Path) -> None:
    two_processes(mixtures, [{"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}], tmp_path / "worker.py")
