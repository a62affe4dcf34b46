"""Router metrics against sums written out by hand, under gradient checkpointing and on two processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from branchmix.models.balance_branchmix import BranchMixBalance
from branchmix.models.routing_branchmix import BranchMixFFNRouter, BranchMixRouter
from branchmix.train.counters import PATIENCE, RouterMonitor, RouterReading
from families import BY_NAME
from mixtures import random_mixture, tokens

DOMAINS = ["code", "law", "math"]
NAMES = ["seed", "one", "two"]


def by_hand(model: Any, ids: torch.Tensor, domain: list[int], mask: torch.Tensor | None = None) -> dict[str, Any]:
    """load, entropy and load by domain of each router, token by token."""
    model.eval()
    with torch.no_grad():
        out = model(ids, output_router_logits=True)
    found = {}
    for kind, layers in (("ffn", out.router_logits), ("attention", out.attention_router_logits)):
        top_k = {module.top_k for module in model.modules() if is_router(module, kind)}.pop()
        for layer, logits in enumerate(layers):
            rows: dict[int, list[torch.Tensor]] = {}
            entropies = []
            for row, gates in enumerate(logits.softmax(-1)):
                sequence, position = divmod(row, ids.shape[1])
                if mask is not None and not mask[sequence, position]:
                    continue
                entropies.append(float(-(gates * gates.log()).sum()))
                load = gates
                if top_k < len(gates):
                    load = torch.zeros_like(gates)
                    load[gates.argsort(descending=True)[:top_k]] = 1 / top_k
                rows.setdefault(domain[sequence], []).append(load)
            everything = torch.stack([load for loads in rows.values() for load in loads])
            found[kind, layer] = {
                "load": everything.mean(0),
                "entropy": sum(entropies) / len(entropies),
                "by_domain": {DOMAINS[number]: torch.stack(loads).mean(0) for number, loads in rows.items()},
            }
    return found


def is_router(module: Any, kind: str) -> bool:
    return isinstance(module, BranchMixRouter) and isinstance(module, BranchMixFFNRouter) == (kind == "ffn")


def check(reading: RouterReading, expected: dict[str, Any]) -> None:
    assert {(router.kind, router.layer) for router in reading.routers} == expected.keys()
    for router in reading.routers:
        wanted = expected[router.kind, router.layer]
        torch.testing.assert_close(torch.tensor(router.load), wanted["load"], rtol=0, atol=1e-6)
        assert router.entropy == pytest.approx(wanted["entropy"], abs=1e-5)
        assert router.by_domain.keys() == wanted["by_domain"].keys()
        for name, load in router.by_domain.items():
            torch.testing.assert_close(torch.tensor(load), wanted["by_domain"][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [(2, None), (1, 2), (3, None)])
@pytest.mark.parametrize("name", ["llama", "cohere", "opt", "gpt2"])
def test_the_same_as_by_hand(name: str, top_k: tuple[int, int | None], masked: bool) -> None:
    model = random_mixture(name, num_experts_per_tok=top_k[0], attention_num_experts_per_tok=top_k[1])
    ids, domain = tokens(4, 9), [2, 0, 2, 0]
    mask = (torch.arange(36).reshape(4, 9) % 3 > 0) if masked else None
    expected = by_hand(model, ids, domain, mask)
    monitor = RouterMonitor(model, DOMAINS)
    for half in (slice(0, 2), slice(2, 4)):  # gradient accumulation
        output = model.train()(ids[half], labels=ids[half], **monitor.options)
        monitor.add(output, torch.tensor(domain[half]), None if mask is None else mask[half])
        output.loss.backward()
    check(monitor.read(), expected)
    assert monitor.read().routers == [] and monitor.read().scalars() == {}


@pytest.mark.parametrize("attention", ["kv_experts", "kv_sharing", "average"])
def test_recomputed_layers_count_once(attention: str) -> None:
    model = random_mixture("llama", attention)
    ids, domain = tokens(2, 9), [1, 2]
    monitor = RouterMonitor(model, DOMAINS)
    loads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        calls: list[int] = []
        router = next(module for module in model.modules() if isinstance(module, BranchMixRouter))
        hook = router.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for _ in range(2):
            output = model.train()(ids, labels=ids, use_cache=False, **monitor.options)
            monitor.add(output, torch.tensor(domain))
            output.loss.backward()
        hook.remove()
        assert len(calls) == (4 if checkpointing else 2), "nothing was recomputed"
        loads.append(monitor.read())
    assert loads[0] == loads[1] and loads[0].routers
    assert {router.kind for router in loads[0].routers} == {"ffn"} | (
        {"attention"} if attention != "average" else set()
    )


def test_names_and_numbers_for_loggers() -> None:
    model = random_mixture("llama", expert_names=NAMES)
    monitor = RouterMonitor(model, DOMAINS)
    monitor.add(model(tokens(), **monitor.options), torch.tensor([0, 1]))
    reading = monitor.read()
    scalars, router = reading.scalars(), reading.routers[-1]
    assert router.kind == "ffn" and router.layer == 1
    assert scalars["router/ffn/01/entropy"] == router.entropy
    assert scalars["router/ffn/01/entropy_share"] == pytest.approx(router.entropy / math.log(3))
    assert scalars["router/ffn/01/max_violation"] == pytest.approx(3 * max(router.load) - 1)
    assert scalars["router/ffn/01/dead_experts"] == 0 and router.bias_spread is None
    assert [scalars[f"router/attention/00/load/{name}"] for name in NAMES] == reading.routers[0].load
    assert len(scalars) == 2 * 2 * (4 + 3)
    record = json.loads(json.dumps(reading.as_dict()))
    assert record["experts"] == NAMES and record["ffn"][1]["by_domain"].keys() == {"code", "law"}


def test_a_dense_model_has_nothing_to_watch() -> None:
    model = BY_NAME["llama"].model(0)
    monitor = RouterMonitor(model, DOMAINS)
    monitor.add(model(tokens(), **monitor.options), torch.tensor([0, 1]))
    assert monitor.read().scalars() == {} and monitor.read().collapsed == [] and monitor.options == {}


def test_a_target_is_what_load_is_compared_with() -> None:
    """And biases are told by how far they are apart."""
    model = random_mixture("llama", expert_names=NAMES, num_experts_per_tok=1, expert_bias=True)
    monitor, shares = RouterMonitor(model, DOMAINS), [0.6, 0.3, 0.1]
    model.balance = BranchMixBalance(target=shares)
    ffn = [module for module in model.modules() if is_router(module, "ffn")]
    ffn[0].expert_bias.copy_(torch.tensor([0.25, 0.0, -9.0]))
    for _ in range(PATIENCE):
        monitor.add(model(tokens(4, 20), **monitor.options), torch.tensor([0, 1, 2, 0]))
        reading = monitor.read()
    first, second = (router for router in reading.routers if router.kind == "ffn")
    assert first.load[2] == 0 and first.dead_experts == 1 and second.dead_experts == 0
    assert first.max_violation == pytest.approx(max(f / t for f, t in zip(first.load, shares, strict=True)) - 1)
    assert (first.bias_spread, second.bias_spread) == (9.25, 0.0)
    assert reading.scalars()["router/ffn/00/bias_spread"] == 9.25
    assert [line for line in reading.collapsed if "layer 0 ffn router: expert two gets 0.0 % (fair: 10 %)" in line]


def test_a_collapse_is_told_once_until_it_recovers() -> None:
    model = random_mixture("llama", expert_names=NAMES, num_experts_per_tok=1)
    monitor = RouterMonitor(model, DOMAINS)
    routers = {kind: [m for m in model.modules() if is_router(m, kind)] for kind in ("ffn", "attention")}
    healthy = {id(router): router.weight.clone() for both in routers.values() for router in both}

    def readings(number: int) -> list[str]:
        lines = []
        for _ in range(number):
            with torch.no_grad():
                monitor.add(model(tokens(4, 20), **monitor.options), torch.tensor([0, 1, 2, 0]))
            lines += monitor.read().collapsed
        return lines

    def collapse(router: Any) -> None:
        with torch.no_grad():
            router.weight.copy_(torch.tensor([[0.0], [0.0], [1e4]]))

    for router in (both[1] for both in routers.values()):  # inputs are positive, so that one row can win every token
        router.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
    assert readings(PATIENCE + 2) == []

    collapse(routers["ffn"][1])
    assert readings(PATIENCE - 1) == []
    assert readings(1) == [
        "layer 1 ffn router: expert seed gets 0.0 % (fair: 33 %), expert one gets 0.0 % (fair: 33 %), expert two gets "
        "100.0 % (fair: 33 %) of the load, for 5 readings: raise router_aux_loss_coef or lower the learning rate"
    ]
    assert readings(PATIENCE + 2) == []
    with torch.no_grad():
        routers["ffn"][1].weight.copy_(healthy[id(routers["ffn"][1])])
    assert readings(PATIENCE + 2) == []
    collapse(routers["ffn"][1])
    collapse(routers["attention"][1])
    lines = readings(PATIENCE + 2)
    assert len(lines) == 2
    assert lines[0].startswith("layer 1 attention router: ") and lines[0].endswith(
        "5 readings: lower the learning rate"
    )


WORKER = """
import json, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from branchmix.train.counters import RouterMonitor
from branchmix.train.models import leave_group
from mixtures import random_mixture, tokens
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = random_mixture("llama")
monitor = RouterMonitor(model, ["code", "law", "math"])
readings = []
for part in (slice(0, 3) if rank == 0 else slice(3, 4), slice(0, 4)):  # different tokens, then all on both
    domain = torch.tensor([2, 0, 2, 1])[part]
    monitor.add(model(tokens(4, 9)[part], **monitor.options), domain)
    readings.append(monitor.read().as_dict())
if rank == 1:  # one of them has seen nothing
    monitor.add(model(tokens(1, 9), **monitor.options), torch.tensor([0]))
readings.append(monitor.read().as_dict())
print(f"{rank} {json.dumps(readings)}\\n", end="")
leave_group()
sys.stdout.flush()
os._exit(0)  # models of the group are still alive here, and gloo would mind them now and then
"""


def test_two_processes_read_what_one_reads(tmp_path: Any) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command.append(str(Path(__file__).parents[1]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    found = {line[0]: json.loads(line[2:]) for line in done.stdout.splitlines()}
    assert found["0"] == found["1"]
    model = random_mixture("llama")
    monitor = RouterMonitor(model, DOMAINS)
    for number, ids, domain in (
        (0, tokens(4, 9), [2, 0, 2, 1]),
        (1, tokens(4, 9), [2, 0, 2, 1]),
        (2, tokens(1, 9), [0]),
    ):
        monitor.add(model(ids, **monitor.options), torch.tensor(domain))
        for kind, routers in monitor.read().as_dict().items():
            for ours, theirs in zip(found["0"][number][kind], routers, strict=True):
                if kind == "experts":
                    assert ours == theirs
                    continue
                assert ours["load"] == pytest.approx(theirs["load"], abs=1e-6)
                assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=1e-6)
                assert ours["by_domain"].keys() == theirs["by_domain"].keys()
                for name, load in ours["by_domain"].items():
                    assert load == pytest.approx(theirs["by_domain"][name], abs=1e-6)
