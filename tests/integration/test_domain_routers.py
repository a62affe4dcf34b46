"""Nexus' router: rows as a projection of experts' domains, against the formula written out, in mixtures from text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import branchmix
import dialects
from branchmix.accounting import inspect
from branchmix.accounting.shape import domain_router_of
from branchmix.checkpoint.hub import resolve
from branchmix.cli import app
from branchmix.data.config import EvalData
from branchmix.errors import CheckpointError, CompatibilityError, RecipeError
from branchmix.models.routing_branchmix import BranchMixRouter
from branchmix.recipe import Recipe
from branchmix.train.trained_parts import freeze
from branchmix.upcycling.domains import mean_states, text_of_experts
from branchmix.upcycling.gates.text import DomainText, read
from checkpoints import config, same_bytes, weights
from families import BY_NAME, NAMES
from mixtures import BOTH, close, load, offloaded, random_mixture, recipe, tokens
from training import settings, write_run

Siblings = Callable[..., dict[str, Path]]
DOMAIN_ROUTER = {"width": 24, "inner": 6}
KINDS = {
    "llama": "kv_experts",
    "cohere-qk-norm": "kv_sharing",
    "gpt2": "average",
    "phi3": "kv_experts",
    "opt": "average",
    "gemma2": "kv_sharing",
}
"""Sequential and parallel blocks, fused projections, biases, learned positions, sandwich norms and windows."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file whose domains are called as the siblings; the seed's has another name."""
    folder = tmp_path_factory.mktemp("text")
    dialects.write(folder, documents=24)
    lines = ["data:", *(f"  {name}: {{files: {domain}.jsonl}}" for name, domain in DOMAINS.items())]
    (folder / "data.yaml").write_text("\n".join(lines))
    for name, domain in DOMAINS.items():
        (folder / f"{name}.yaml").write_text(f"data:\n  {name}: {{files: {domain}.jsonl}}")
    return folder / "data.yaml"


DOMAINS = {"general": "north", "code": "south", "math": "west"}


def readers(siblings: Siblings, name: str) -> dict[str, Path]:
    """Siblings whose seed has a tokenizer."""
    models = siblings(name, vocab_size=320)
    dialects.tokenizer().save_pretrained(models["seed"])
    return models


def with_domains(models: dict[str, Path], text: Path, **options: Any) -> dict[str, Any]:
    return recipe(models, routing={"ffn": {"top_k": 2}, "domains": {"data": str(text)}}, **options)


def means(seed: Path, text: Path) -> dict[str, torch.Tensor]:
    """The mean of the seed's final hidden state by domain, in one pass a document."""
    data, model = EvalData.load(text), load(seed)
    length = 64 if model.config.model_type in ("gpt2", "opt") else 128
    found = {}
    for name, documents in read(data, dialects.tokenizer()).items():
        states = []
        for document in (documents.measured + documents.counted)[:64]:
            ids = torch.tensor([document[:length].tolist()])
            with torch.no_grad():
                states.append(model(ids, output_hidden_states=True).hidden_states[-1][0])
        found[name] = torch.cat(states).double().mean(0)
    return found


def unit(difference: torch.Tensor) -> torch.Tensor:
    return (difference / difference.square().mean().sqrt()).float()


def rows(stored: dict[str, torch.Tensor], router: str, domains: torch.Tensor) -> torch.Tensor:
    """``W_2 SwiGLU(W_1 c)`` of the paper, W_1 as one matrix [2I, C], an expert at a time."""
    prefix = f"{router}.router_rows."
    w1 = torch.cat([stored[f"{prefix}{name}_proj.weight"] for name in ("gate", "up")])
    found = []
    for c in domains:
        gate, up = (w1 @ c).chunk(2)
        found.append(stored[f"{prefix}down_proj.weight"] @ (gate * torch.sigmoid(gate) * up))
    return torch.stack(found)


def routed(model: Any, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What every router sees, and its logits, by its name."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, BranchMixRouter):

            def note(module: Any, args: Any, out: Any, name: str = name) -> None:
                seen[name] = (args[0].flatten(0, -2), out[0].flatten(0, -2))

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_projection_of_the_text(name: str, siblings: Siblings, text: Path, tmp_path: Path) -> None:
    models = readers(siblings, name)
    report = branchmix.upcycle(
        with_domains(models, text, attention=KINDS[name]), tmp_path / "mixture", verify=name == "llama"
    )
    by_domain = means(models["seed"], text)
    centre = torch.stack([*by_domain.values()]).mean(0)
    domains = torch.stack([unit(by_domain[domain] - centre) for domain in ("general", "code", "math")])
    stored, model = weights(tmp_path / "mixture"), load(tmp_path / "mixture")
    close(stored["router_domains.embeddings"], domains, 1e-4)
    close(stored["router_domains.centre"], centre.float())
    found = routed(model, tokens())
    assert len(found) == 2 * (2 if KINDS[name] != "average" else 1)
    for router, (x, logits) in found.items():
        close(logits, x @ rows(stored, router, stored["router_domains.embeddings"]).T)
        assert float(logits.std()) > 0.01
    names = model.config.expert_names
    assert names == ["seed", "code", "math"] and any("from experts' domains" in line for line in card(tmp_path))
    assert report.plan.nbytes == sum(tensor.nbytes for tensor in stored.values())


def card(folder: Path) -> list[str]:
    return (folder / "mixture" / "README.md").read_text().splitlines()


@pytest.mark.of_every_family
@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_states_to_embed(name: str, tmp_path: Path) -> None:
    seed = BY_NAME[name].save(tmp_path, 0)
    ids = tokens()
    with torch.no_grad():
        states = load(seed)(ids, output_hidden_states=True).hidden_states[-1]
    documents = DomainText(counted=[ids[0].numpy()], checked=[], measured=[ids[1].numpy()])
    means = torch.from_numpy(mean_states({"code": [documents]}, resolve(str(seed))))
    assert means.shape == (1, domain_router_of(config(seed))["width"])
    close(means[0].float(), states.flatten(0, 1).mean(0))


def test_embeddings_are_as_wide_as_the_head_reads(tmp_path: Path) -> None:
    """OPT of 350M has token embeddings that are narrower than the model."""
    seed = BY_NAME["opt"].save(tmp_path, 0, word_embed_proj_dim=24)
    documents = DomainText(counted=[tokens()[0].numpy()], checked=[], measured=[])
    assert mean_states({"code": [documents]}, resolve(str(seed))).shape == (1, 24)
    assert domain_router_of(config(seed)) == {"width": 24, "inner": 8}


@pytest.mark.parametrize("name", ["llama", "cohere-qk-norm", "gpt2"])
def test_a_newcomer_gets_its_row_without_training_or_others_text(
    name: str, siblings: Siblings, text: Path, tmp_path: Path
) -> None:
    models = readers(siblings, name)
    two = {expert: path for expert, path in models.items() if expert != "math"}
    branchmix.upcycle(with_domains(two, text, attention=KINDS[name]), tmp_path / "two")
    branchmix.add_expert(tmp_path / "two", "math", models["math"], tmp_path / "three", data=text.with_name("math.yaml"))
    before, after = weights(tmp_path / "two"), weights(tmp_path / "three")
    same = [key for key in before if "router_rows" in key or key == "router_domains.centre"]
    assert len(same) >= 7 and all(torch.equal(after[key], before[key]) for key in same)
    assert torch.equal(after["router_domains.embeddings"][:2], before["router_domains.embeddings"])
    own = unit(means(models["seed"], text)["math"] - before["router_domains.centre"])
    close(after["router_domains.embeddings"][2], own, 1e-4)
    small, large = routed(load(tmp_path / "two"), tokens()), routed(load(tmp_path / "three"), tokens())
    first = [router for router in small if torch.equal(small[router][0], large[router][0])]
    assert first, "the routers of the first layer's first part see the same"
    for router in first:
        close(large[router][1][:, :2], small[router][1], 1e-6)  # a wider product may round otherwise
    for router, (x, logits) in large.items():
        close(logits[:, 2], x @ rows(after, router, after["router_domains.embeddings"][2:])[0])
    branchmix.remove_expert(tmp_path / "three", "math", tmp_path / "back")
    same_bytes(weights(tmp_path / "back"), before)
    assert config(tmp_path / "back") == config(tmp_path / "two")
    card = (tmp_path / "three" / "README.md").read_text()
    assert "its router rows are computed from its domain" in card


@pytest.mark.parametrize("attention", BOTH)
def test_kept_experts_keep_their_rows(attention: str) -> None:
    model, ids = random_mixture("cohere", attention, domain_router=DOMAIN_ROUTER), tokens()
    whole, kept = routed(model, ids), routed(model.keep_experts(["expert-0", "expert-2"]), ids)
    router = "model.model.layers.0.mlp.gate"
    assert torch.equal(kept[router][0], whole[router][0])
    close(kept[router][1], whole[router][1][:, [0, 2]], 1e-6)
    assert model.keep_experts([1])(ids).logits.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"shared_router": True}, {"attention": "average"}, {"expert_bias": True}])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma2"])
def test_parameters_saving_and_gradients(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """In the order of use: counted from the config, trained, saved by transformers, loaded again."""
    options = {"attention": "kv_experts", **options}
    model, ids = random_mixture(name, **options, domain_router=DOMAIN_ROUTER), tokens()
    plain = random_mixture(name, **options)
    found = branchmix.accounting.parameters(model.config.to_dict())
    assert found.total == sum(p.numel() for p in model.parameters())
    routers = 1 if options.get("shared_router") or options["attention"] == "average" else 2
    assert found.routers == 2 * routers * (3 * 6 * 32 - 2 * 6 * (32 - 24))  # layers, W_1 as two matrices and W_2
    count = sum(p.numel() for p in plain.parameters()) - 2 * routers * 3 * 32 + found.routers
    assert found.total == count
    model.train()(ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "router_rows" in n}
    assert len(grads) == 2 * routers * 3 and all(grad.abs().max() > 0 for grad in grads.values())
    model.eval().save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.router_domains.embeddings, model.router_domains.embeddings)
    close(again(ids).logits, model(ids).logits, 1e-6)
    assert inspect(tmp_path).stored == found.total and not inspect(tmp_path).notices
    freeze(model, ["all_but_routers"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == grads.keys()


def test_a_run_trains_the_projection_and_experts_join_after_it(siblings: Siblings, text: Path, tmp_path: Path) -> None:
    """``branchmix train`` moves only the projections; the loss falls; a newcomer's rows come from what was learned."""
    models = readers(siblings, "llama")
    two = {expert: path for expert, path in models.items() if expert != "math"}
    branchmix.upcycle(with_domains(two, text, merge={"method": "seed"}), tmp_path / "mixture")
    source = {name: {"files": str(text.with_name(f"{domain}.jsonl"))} for name, domain in DOMAINS.items()}
    run = settings(tmp_path, model=str(tmp_path / "mixture"), out=str(tmp_path / "run"), data=source)
    run |= {"freeze": "all_but_routers", "budget": {"steps": 12}, "learning_rate": {"peak": 0.02}}
    assert CliRunner().invoke(app, ["train", str(write_run(tmp_path / "file", run))]).exit_code == 0
    before, after = weights(tmp_path / "mixture"), weights(tmp_path / "run")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "router_rows" in key}
    documents = [dialects.document(domain, number) for domain in dialects.DOMAINS for number in range(10)]
    batch = torch.tensor([dialects.tokenizer()(document)["input_ids"][:28] for document in documents])
    with torch.no_grad():
        first, last = (float(load(tmp_path / name)(batch, labels=batch).loss) for name in ("mixture", "run"))
    assert last < first - 0.02

    branchmix.add_expert(tmp_path / "run", "math", models["math"], tmp_path / "three", data=text)
    stored = weights(tmp_path / "three")
    branchmix.remove_expert(tmp_path / "three", "math", tmp_path / "two")
    branchmix.add_expert(tmp_path / "two", "math", models["math"], tmp_path / "again", data=text)
    same_bytes(weights(tmp_path / "again"), stored)
    assert torch.equal(stored["router_domains.embeddings"][:2], before["router_domains.embeddings"])
    for router, (x, logits) in routed(load(tmp_path / "three"), tokens()).items():
        close(logits, x @ rows(after, router, stored["router_domains.embeddings"]).T)


def test_domains_and_biases_stay_fp32_in_16_bits(siblings: Siblings, text: Path, tmp_path: Path) -> None:
    models = readers(siblings, "llama")
    two = {expert: path for expert, path in models.items() if expert != "math"}
    options = {"dtype": "bfloat16", "routing": {"ffn": {"top_k": 1}, "domains": {"data": str(text)}}}
    branchmix.upcycle(recipe(two, **options), tmp_path / "two")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.bfloat16)
    model.config.expert_bias = True
    for module in model.modules():
        if isinstance(module, BranchMixRouter):
            module.add_bias()
            if module.expert_bias is not None:
                module.expert_bias += 1 / 3
    model.save_pretrained(tmp_path / "biased")
    for file in ("branchmix.json",):
        (tmp_path / "biased" / file).write_bytes((tmp_path / "two" / file).read_bytes())
    branchmix.add_expert(tmp_path / "biased", "math", models["math"], tmp_path / "three", data=text)
    stored, before = weights(tmp_path / "three"), weights(tmp_path / "two")
    assert torch.equal(stored["router_domains.embeddings"][:2], before["router_domains.embeddings"])
    assert not torch.equal(stored["router_domains.embeddings"], stored["router_domains.embeddings"].bfloat16().float())
    bias = stored["model.model.layers.0.mlp.gate.expert_bias"]
    assert bias.dtype == torch.float32 and torch.equal(bias, torch.full((3,), 1 / 3))
    assert stored["model.model.layers.0.mlp.gate.router_rows.up_proj.weight"].dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "three", dtype=torch.bfloat16)
    assert loaded.router_domains.embeddings.dtype == torch.float32 and loaded(tokens()).logits.isfinite().all()


def test_offloaded_projections_are_read_where_they_are_computed_with(tmp_path: Path) -> None:
    model = random_mixture("llama", domain_router={"width": 32, "inner": 8})
    with torch.no_grad():
        close(offloaded(model, tmp_path)(tokens()).logits, model(tokens()).logits)


def test_the_projection_starts_with_the_deviation_of_plain_rows() -> None:
    """std C^-1/2 in W_1 makes normal pre-activations; the constant is the mean of silu^2 over them."""
    from branchmix.upcycling.plan import SWIGLU

    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    assert float((F.silu(x).square() * density).sum() * (x[1] - x[0])) == pytest.approx(SWIGLU, abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    width, inner, std = 256, 64, 0.3
    c, w1 = (torch.randn(shape, generator=generator) for shape in ((400, width), (2 * inner, width)))
    gate, up = (c @ w1.T / width**0.5).chunk(2, dim=1)
    w2 = torch.randn(512, inner, generator=generator) * std / (SWIGLU * inner) ** 0.5
    assert float(((F.silu(gate) * up) @ w2.T).std()) == pytest.approx(std, rel=0.1)


def test_refusals(siblings: Siblings, text: Path, tmp_path: Path) -> None:
    models, out = readers(siblings, "llama"), tmp_path / "out"
    domains = {"ffn": {"top_k": 1}, "domains": {"data": str(text)}}
    for options, words in (
        ({"attention": "average", "ffn": "average"}, "routing.domains: a soup has no experts"),
        ({"router_init": "zeros"}, "router_init: with routing.domains, rows are computed"),
        ({"router_init": {"attention": "zeros"}}, "router_init: with routing.domains, rows are computed"),
        ({"gates": {"data": str(text)}}, "gates: are fitted with routers that have weights"),
        ({"seed_copies": 1}, "seed_copies: copies of the seed have one domain"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe.of(recipe(models, routing=domains) | options)
    lacking = {"ffn": {"top_k": 1}, "domains": {"data": str(text.with_name("math.yaml"))}}
    for dry_run in (True, False):
        with pytest.raises(RecipeError, match=r"data: no domain is called 'seed'.*\(include_seed: false\)"):
            branchmix.upcycle(recipe(models, routing=lacking), out, dry_run=dry_run)
    with pytest.raises(RecipeError, match="data: no domain is called 'seed'"):  # one that joins gets no other's text
        text_of_experts(["seed"], EvalData.load(text), resolve(str(models["seed"])))

    branchmix.upcycle(recipe(models, routing=domains, attention="average"), tmp_path / "domains")
    branchmix.upcycle(recipe(models), tmp_path / "plain")
    new = ("law", models["math"], out)
    with pytest.raises(RecipeError, match="routers compute rows from text: give --data, a file with a domain 'law'"):
        branchmix.add_expert(tmp_path / "domains", *new)
    with pytest.raises(RecipeError, match="data: no domain is called 'law'"):
        branchmix.add_expert(tmp_path / "domains", *new, data=text)
    with pytest.raises(RecipeError, match="router_std: the rows are computed"):
        branchmix.add_expert(tmp_path / "domains", *new, data=text, router_std=0.1)
    with pytest.raises(RecipeError, match="its routers have weights of their own and need no text"):
        branchmix.add_expert(tmp_path / "plain", *new, data=text)
    with pytest.raises(RecipeError, match="its routers compute their rows from domains"):
        branchmix.calibrate(tmp_path / "domains", text)
    with pytest.raises(CompatibilityError, match="its routers compute their rows from experts' domains, and those of"):
        branchmix.export_model(tmp_path / "domains", out, to="mixtral")
    branchmix.export_model(tmp_path / "domains", tmp_path / "dense", to="dense", expert="code")
    assert not any("router" in name for name in weights(tmp_path / "dense"))

    planned = branchmix.add_expert(tmp_path / "domains", "general", models["math"], out, data=text, dry_run=True)
    assert planned.written is None and not out.exists()
    added = branchmix.add_expert(tmp_path / "domains", "general", models["math"], out, data=text)
    assert added.plan.nbytes == planned.plan.nbytes

    record = json.loads((tmp_path / "domains" / "branchmix.json").read_text())
    record["sources"][0]["model"] = str(tmp_path / "gone")
    (tmp_path / "domains" / "branchmix.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="gone: no such folder"):
        branchmix.add_expert(tmp_path / "domains", "general", models["math"], tmp_path / "again", data=text)
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    settings = config(tmp_path / "plain") | {"domain_router": domain_router_of(config(models["seed"]))}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    save_file(stored, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weights lack .*router_rows.gate_proj"):
        branchmix.remove_expert(tmp_path / "plain", "code", out)
    for wrong in ({"width": 0, "inner": 8}, {"width": 8}, 3):
        (tmp_path / "plain" / "config.json").write_text(json.dumps(settings | {"domain_router": wrong}))
        with pytest.raises(CheckpointError, match=r"domain_router is .*, not a width and an inner width"):
            branchmix.inspect(tmp_path / "plain")
