"""FFN experts compute in autocast's dtype, whichever of transformers' kernels runs them, and learn in fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from branchmix.models.experts_branchmix import BranchMixSparseMoeBlock
from mixtures import random_mixture, tokens

KERNELS = ("eager", "grouped_mm", "batched_mm")
# Gated, plain, and each with biases.
FAMILIES = ("llama", "nemotron", "gpt2", "llama-bias")


def experts_of(name: str) -> tuple[Any, Any]:
    """A mixture and the FFN experts of its first layer."""
    changes = {"mlp_bias": True} if name == "llama-bias" else {}
    model = random_mixture(name.removesuffix("-bias"), seed_changes=changes)
    return model, next(m for m in model.modules() if isinstance(m, BranchMixSparseMoeBlock)).experts


def routed(experts: Any, num_tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of experts: hidden states, two experts for each token (never the last one), and fp32 gates."""
    generator = torch.Generator().manual_seed(0)
    hidden_SD = torch.randn(num_tokens, experts.down_proj.shape[1], generator=generator)
    first = torch.randint(0, 2, (num_tokens, 1), generator=generator)
    return hidden_SD, torch.cat([first, 1 - first], 1), torch.rand(num_tokens, 2, generator=generator) + 0.1


class Products(TorchDispatchMode):
    """Dtypes of all matrix products, backward ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket._qualified_op_name.split("::")[1] in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"):
            self.dtypes += [argument.dtype for argument in args if isinstance(argument, torch.Tensor)][:2]
        return func(*args, **(kwargs or {}))


def run(experts: Any, *, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.dtype]]:
    """Output, gradients of weights and input, and the dtypes of all products."""
    hidden_SD, index_Sk, gates_Sk = routed(experts)
    hidden_SD, gates_Sk = hidden_SD.to(next(experts.parameters()).dtype).requires_grad_(), gates_Sk.requires_grad_()
    experts.zero_grad(set_to_none=True)
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out_SD = experts(hidden_SD, index_Sk, gates_Sk)
        out_SD.float().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return out_SD.detach(), grads | {"hidden": hidden_SD.grad, "gates": gates_Sk.grad}, products.dtypes


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Relative error of the whole tensor."""
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert error < tolerance, f"{error:.2e}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_reaches_the_experts(name: str, kernel: str) -> None:
    model, experts = experts_of(name)
    model.set_experts_implementation("eager")
    exact, exact_grads, dtypes = run(experts, autocast=False)
    assert set(dtypes) == {torch.float32}
    model.set_experts_implementation(kernel)
    out, grads, dtypes = run(experts, autocast=True)
    assert set(dtypes) == {torch.bfloat16}
    assert out.dtype == torch.bfloat16
    near(out, exact, 1e-2)
    for which, exact_grad in exact_grads.items():
        assert grads[which].dtype == torch.float32
        near(grads[which], exact_grad, 2e-2)
    unused = experts.down_proj.grad[2]  # nobody was sent there
    assert unused.abs().max() == 0


@pytest.mark.parametrize("precision", ["autocast", "bf16 weights"])
@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_agree_in_bf16(name: str, precision: str) -> None:
    """Their sums over a token's experts are fp32, so that they differ by roundings of single products only."""
    model, experts = experts_of(name)
    tolerance = 1e-2 if experts.has_bias else 2e-3  # only the loop adds a bias before it rounds
    if precision != "autocast":
        model.to(torch.bfloat16)
    results = {}
    for kernel in KERNELS:
        model.set_experts_implementation(kernel)
        results[kernel] = run(experts, autocast=precision == "autocast")[:2]
    out, grads = results["eager"]
    for kernel in KERNELS[1:]:
        near(results[kernel][0], out, tolerance)
        for which, grad in grads.items():
            near(results[kernel][1][which], grad, 1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_training_step_under_autocast_is_the_fp32_step_but_for_rounding(kernel: str) -> None:
    model = random_mixture("llama", num_experts_per_tok=3).train()  # soft: no choice that rounding could flip
    model.set_experts_implementation(kernel)
    exact = copy.deepcopy(model)
    ids = tokens(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    exact_loss = exact(ids, labels=ids).loss
    exact_loss.backward()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=5e-3)
    for (name, parameter), exact_parameter in zip(model.named_parameters(), exact.parameters(), strict=True):
        if ".experts." in name or name.endswith("gate.weight"):
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            near(parameter.grad, exact_parameter.grad, 5e-2)
