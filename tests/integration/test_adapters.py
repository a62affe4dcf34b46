"""BAM Adapters against a mixture that has a linear layer after each expert, written out in a loop."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from branchmix.errors import RecipeError
from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from branchmix.models.routing_branchmix import BranchMixRouter
from branchmix.train import saved_state, trained_parts
from branchmix.train.run_folder import TRAINING
from families import BY_NAME
from mixtures import BOTH, close, random_mixture, tokens

FAMILIES = ("llama", "llama-bias", "cohere", "nemotron", "gpt2", "opt", "phi", "olmo2", "falcon-new", "starcoder2")


def drawn(model: Any) -> dict[str, torch.Tensor]:
    """Gives every adapter a value, and returns A_e [E, D, D] of each attention and FFN by module name."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (BranchMixAttention, BranchMixSparseMoeBlock)):
            delta = delta_of(module)
            with torch.no_grad():
                delta.copy_(torch.randn(delta.shape, generator=generator) * 0.2)
            found[path] = (torch.eye(delta.shape[-1]) + delta.detach()).requires_grad_()
    return found


def delta_of(module: Any) -> torch.nn.Parameter:
    deltas = [parameter for name, parameter in module.named_parameters() if name.endswith("adapter.delta")]
    assert len(deltas) == 1
    return deltas[0]


@contextmanager
def explicit_adapters(model: Any, linears: dict[str, torch.Tensor]) -> Iterator[None]:
    """Each expert computed by itself, then multiplied by its A_e, then gated: on a mixture without adapters."""
    hooks = []

    def attention(linear_EDD: torch.Tensor) -> Any:
        def forward(module: Any, args: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
            _, gate_BTE = module.expert_gate(module.seen_hidden)
            order = module.order
            group = order.num_heads // order.num_kv_heads
            heads = module.seen_heads.unflatten(-1, (order.wide_heads, order.head_dim))
            columns = module.o_proj.weight.unflatten(1, (order.wide_heads, order.head_dim))
            out = 0
            for expert in range(order.num_experts):
                mine = [
                    (head // group * order.num_experts + expert) * group + head % group
                    if order.kv_sharing
                    else expert * order.num_heads + head
                    for head in range(order.num_heads)
                ]
                y = torch.einsum("bthc,dhc->btd", heads[:, :, mine], columns[:, mine])
                if module.o_bias is not None:
                    y = y + module.o_bias[expert]
                out = out + gate_BTE[..., expert, None] * (y @ linear_EDD[expert].T)
            return out, output[1]

        return forward

    def ffn(linear_EDD: torch.Tensor) -> Any:
        def forward(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            hidden = args[0].reshape(-1, args[0].shape[-1])
            _, gates, index = module.gate(hidden)
            experts, out = module.experts, torch.zeros_like(hidden)
            for expert in range(experts.num_experts):
                first = experts.gate_up_proj if experts.has_gate else experts.up_proj
                name = "gate_up_proj_bias" if experts.has_gate else "up_proj_bias"
                inner = F.linear(hidden, first[expert], getattr(experts, name)[expert] if experts.has_bias else None)
                if experts.has_gate:
                    gate, up = inner.chunk(2, -1)
                    inner = experts.act_fn(gate) * up
                else:
                    inner = experts.act_fn(inner)
                bias = experts.down_proj_bias[expert] if experts.has_bias else None
                y = F.linear(inner, experts.down_proj[expert], bias) @ linear_EDD[expert].T
                out = out + (gates * (index == expert)).sum(-1, keepdim=True) * y
            return (out * module.scaling).view(args[0].shape)

        return forward

    for path, linear in linears.items():
        module = model.get_submodule(path)
        if isinstance(module, BranchMixAttention):
            hooks += [
                module.register_forward_pre_hook(
                    lambda m, args, kwargs: setattr(m, "seen_hidden", args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                ),
                module.heads.register_forward_hook(
                    lambda _, args, out, m=module: object.__setattr__(m, "seen_heads", out[0])
                ),
                module.register_forward_hook(attention(linear)),
            ]
        else:
            hooks.append(module.register_forward_hook(ffn(linear)))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_linear_after_each_expert(name: str, attention: str) -> None:
    plain = random_mixture(name, attention, routed_scaling_factor=1.5)
    model = copy.deepcopy(plain)
    trained_parts.add_adapters(model)
    linears = drawn(model)
    ids = tokens()
    out = model(ids, labels=ids)
    out.loss.backward()
    with explicit_adapters(plain, linears):
        expected = plain(ids, labels=ids)
        expected.loss.backward()
    assert (out.logits - random_mixture(name, attention, routed_scaling_factor=1.5)(ids).logits).abs().max() > 0.1
    close(out.logits, expected.logits)
    for path, linear in linears.items():
        grad = delta_of(model.get_submodule(path)).grad
        assert grad is not None and linear.grad is not None and linear.grad.abs().max() > 0
        close(grad, linear.grad)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_identity_at_the_start_and_trained_alone(name: str, experts: str) -> None:
    model = random_mixture(name)
    model.set_experts_implementation(experts)
    ids = tokens()
    before = model(ids).logits
    weights = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    routers = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, BranchMixRouter)}
    trained_parts.add_adapters(model)
    assert torch.equal(model(ids).logits, before)
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert {path for path in trained if not path.endswith("adapter.delta")} == routers
    assert len(trained) == 2 * len(routers)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    losses = []
    for _ in range(3):
        loss = model.train()(ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    for path, parameter in model.named_parameters():
        if path not in trained:
            assert torch.equal(parameter, weights[path.replace("parametrizations.", "").replace(".original", "")]), path


@pytest.mark.parametrize("attention", (*BOTH, "average"))
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_folded_it_is_an_ordinary_mixture(name: str, attention: str, tmp_path: Path) -> None:
    model = random_mixture(name, attention)
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
    trained_parts.add_adapters(model)
    drawn(model)
    ids = tokens()
    with torch.no_grad():
        adapted = model(ids).logits
        trained_parts.fold_adapters(model)
        assert torch.equal(model(ids).logits, adapted)
    assert {path: parameter.shape for path, parameter in model.named_parameters()} == shapes
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_is_a_mixture_and_goes_on_exactly(name: str, tmp_path: Path) -> None:
    """Biases share the adapter of their matrix, which is then stored once."""
    start, ids = random_mixture(name), tokens()
    model = copy.deepcopy(start)
    trained_parts.add_adapters(model)
    drawn(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BranchMixRouter):
                module.weight.mul_(1.1)
        adapted = model(ids).logits
    (tmp_path / TRAINING).mkdir()
    saved_state.write(model, None, saved_state.gather(model), tmp_path, resumable=True)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, adapted)
    resumed = copy.deepcopy(start)
    trained_parts.add_adapters(resumed)
    saved_state.read(resumed, tmp_path)
    state = model.state_dict()
    assert resumed.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[path]) for path, tensor in resumed.state_dict().items())


def test_copies_have_adapters_of_their_own() -> None:
    model = random_mixture("gpt2")
    trained_parts.add_adapters(model)
    drawn(model)
    twin, ids = copy.deepcopy(model), tokens()
    before = model(ids).logits
    assert torch.equal(twin(ids).logits, before)
    for module in twin.modules():
        if isinstance(module, (BranchMixAttention, BranchMixSparseMoeBlock)):
            torch.nn.init.zeros_(delta_of(module))
    close(twin(ids).logits, random_mixture("gpt2")(ids).logits, 1e-6)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing_and_autocast_change_nothing(name: str, experts: str, bf16: bool) -> None:
    model = random_mixture(name, seed_changes={"num_hidden_layers": 2} if name == "llama" else None)
    model.set_experts_implementation(experts)
    trained_parts.add_adapters(model)
    drawn(model)
    ids, grads = tokens(), []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        exact = model.train()(ids, labels=ids, use_cache=False).loss
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model.train()(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.testing.assert_close(loss, exact, rtol=2e-2 if bf16 else 1e-6, atol=0)
        grads.append({path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for path, grad in grads[0].items():
        assert grad.abs().max() > 0, path
        torch.testing.assert_close(grads[1][path], grad, rtol=0, atol=1e-6)


def test_dense_models_are_refused() -> None:
    for model in (BY_NAME["llama"].model(0), random_mixture("llama", "average", ffn="average")):
        with pytest.raises(RecipeError, match=r"^adapters: the .* has no experts: .*lora$"):
            trained_parts.add_adapters(model)


WORKER = """
import os
import sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/integration"]
from branchmix.errors import RecipeError
from branchmix.train import saved_state, trained_parts
from branchmix.train.run_folder import TRAINING
from branchmix.train.models import leave_group
from mixtures import random_mixture, tokens
from test_adapters import drawn
torch.set_num_threads(1)
dist.init_process_group("gloo")
whole, ids = random_mixture("gpt2", "kv_sharing"), tokens(2, 9)
trained_parts.add_adapters(whole)
drawn(whole)
sharded = random_mixture("gpt2", "kv_sharing")
trained_parts.add_adapters(sharded)
drawn(sharded)
mesh = init_device_mesh("cpu", (2,))
for block in sharded.model.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
for model in (whole, sharded):
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
grads = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.requires_grad}
for name, parameter in sharded.named_parameters():
    if name in grads:
        torch.testing.assert_close(parameter.grad.full_tensor(), grads.pop(name), rtol=0, atol=1e-6)
assert not grads
weights, folder = saved_state.gather(sharded), Path(sys.argv[2])
if dist.get_rank() == 0:
    saved_state.write(sharded, None, weights, folder, resumable=True)
    fresh = random_mixture("gpt2", "kv_sharing")
    trained_parts.add_adapters(fresh)
    saved_state.read(fresh, folder)  # sharded before, by one process now
    state = whole.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())
late = random_mixture("gpt2")
fully_shard(late, mesh=mesh)
try:
    trained_parts.add_adapters(late)
except RecipeError as error:
    assert "spread over processes: remove expert_parallel" in str(error)
else:
    raise AssertionError("put on sharded experts")
leave_group()
sys.stdout.flush()
os._exit(0)  # models of the group are still alive here, and gloo would mind them now and then
"""


def test_sharded_over_two_processes(tmp_path: Path) -> None:
    """FSDP2 keeps the one adapter that a matrix and its bias share."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    (tmp_path / "checkpoint" / TRAINING).mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(Path(__file__).parents[1]), str(tmp_path / "checkpoint")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[:4000]
