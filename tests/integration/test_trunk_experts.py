"""``trunk: experts``: forced gates are the whole dense experts, in every family, cache and folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_document_gates import generate, logits_of
from test_remote_code import LOAD_ALL, WITHOUT_BRANCHMIX

import branchmix
import dialects
from branchmix.accounting import inspect
from branchmix.accounting.formulas import active_parameters, parameters
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.data.sequences import packed_inputs, packing_method
from branchmix.errors import CompatibilityError, RecipeError
from branchmix.likelihood.forward import log_probs, logits_at
from branchmix.models.kept_branchmix import keep_experts
from branchmix.models.routers import one_hot_gates
from branchmix.models.trunk_branchmix import BranchMixTrunkExperts
from branchmix.recipe import Recipe
from branchmix.train import trained_parts
from branchmix.upcycling.compatibility import check_fit
from branchmix.upcycling.execute import write_output
from branchmix.upcycling.gates import calibrate
from branchmix.upcycling.plan import Plan, plan_upcycling
from branchmix.upcycling.verify import verify_plan
from families import BY_NAME, NAMES
from mixtures import GATE, close, gated, load, recipe, tokens

Siblings = Callable[..., dict[str, Path]]
KINDS = ("llama", "gemma3", "olmo2", "cohere-qk-norm", "phi", "gpt-neox", "gpt2", "opt", "stablelm", "apertus")
"""Every kind of trunk: tied and untied, biased heads, norms behind, learned positions, and so on."""
SOME = ("llama", "llama-bias", "gemma3", "gpt2", "opt")


def of_trunks(name: str, attention: str = "kv_experts", **options: Any) -> Any:
    return gated(name, attention, trunk="experts", **options)


def merge(models: dict[str, Path], out: Path, **options: Any) -> Plan:
    """A mixture whose trunk has experts, before its gates are fitted."""
    given = Recipe.of(recipe(models, trunk="experts", gates={"data": "not-read.yaml"}, **options))
    plan = plan_upcycling(given, check_fit(given, [CheckpointIndex.open(folder) for folder in models.values()]))
    out.mkdir()
    write_output(plan, out, models["seed"], lambda: {"recipe": {}, "sources": []}, 1 << 30)
    return plan


def with_silent_gates(folder: Path) -> Path:
    """A folder of the same mixture with document gates that know nothing yet."""
    model = load(folder)
    model.config.document_gate = GATE
    again = type(model)(model.config)
    again.load_state_dict(model.state_dict(), strict=False)
    again.save_pretrained(folder.with_name(f"{folder.name}-gated"))
    return folder.with_name(f"{folder.name}-gated")


# ---- lossless ----


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_forced_gates_are_the_whole_experts(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """To 1e-5, by ``--verify``. Apertus shares the numbers of its activation."""
    plan = merge({kind: folder for kind, folder in siblings(name).items() if kind != "math"}, tmp_path / "mixture")
    verification = verify_plan(plan, tmp_path / "mixture")
    assert plan.lossless is verification.whole_experts is (name != "apertus")
    assert all(
        check.skipped is None and check.max_difference < 1e-5 * max(1, check.max_logit)
        for check in verification.experts
    )
    if name not in ("seed-oss", "helium"):  # families without a formula
        assert parameters(plan.config).total == sum(
            math.prod(tensor.expression.shape) for tensor in plan.tensors if not tensor.name.endswith(("beta", "eps"))
        )


@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere"])
def test_folded_norms_have_no_experts(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models, ids = siblings(name), tokens()
    plan = merge(models, tmp_path / "mixture", merge={"fold_norms": True})
    assert plan.lossless
    mixture = load(tmp_path / "mixture")
    for number, folder in enumerate(models.values()):
        whole = logits_of(load(folder), ids)
        close(logits_of(keep_experts(mixture, [number]), ids), whole)
        with one_hot_gates(mixture, number):
            close(logits_of(mixture, ids), whole)
    assert parameters(plan.config).total == sum(parameter.numel() for parameter in mixture.parameters())
    for norm in plan.config["folded_norms"]:
        assert not isinstance(mixture.model.model.layers[0].get_submodule(norm), BranchMixTrunkExperts)


@pytest.mark.parametrize("options", [{"attention": "average"}, {"attention": "kv_sharing"}, {"ffn": "average"}])
def test_what_is_averaged_still_loses(options: dict[str, str], siblings: Siblings, tmp_path: Path) -> None:
    """And is compared with the dense expert's own trunk around what is averaged."""
    plan = merge(siblings("qwen3"), tmp_path / "mixture", **options)
    verification = verify_plan(plan, tmp_path / "mixture")
    assert not plan.lossless and not verification.whole_experts and len(verification.experts) == 3


def test_vocabularies_that_are_padded_differently(siblings: Siblings, tmp_path: Path) -> None:
    vocabulary = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(90)}, "merges": []}, "added_tokens": []}
    models = {"seed": BY_NAME["llama"].save(tmp_path / "seed", 0)}
    models |= {n: BY_NAME["llama"].save(tmp_path / n, 1, vocab_size=size) for n, size in (("code", 104), ("math", 91))}
    for folder in models.values():
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert merge(models, tmp_path / "mixture").lossless is False
    mixture, ids = load(tmp_path / "mixture"), tokens() % 90
    for number, folder in enumerate(models.values()):
        with one_hot_gates(mixture, number):
            close(logits_of(mixture, ids)[..., :90], logits_of(load(folder), ids)[..., :90])


# ---- the mixture ----


def test_embeddings_are_mixed_and_the_head_is_chosen() -> None:
    """Against the definition, for a model whose blocks do nothing."""
    model, ids = of_trunks("llama"), tokens()
    with torch.no_grad():
        for layer in model.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
        log_BTE = model.document_gate(ids)[0].trunk
        hidden, norm, head = model.model.model.embed_tokens, model.model.model.norm, model.model.lm_head
        shares = log_BTE.exp()[..., None]
        mixed = sum(shares[:, :, e] * hidden[e](ids) for e in range(3))
        normed = sum(shares[:, :, e] * norm[e](mixed) for e in range(3))
        chosen = torch.stack([head[e](normed) for e in range(3)], dim=2)
        index = log_BTE.argmax(-1)
        assert len(index.unique()) > 1
        expected = torch.stack([chosen[b, t, index[b, t]] for b in range(2) for t in range(11)]).view(2, 11, -1)
    close(logits_of(model, ids), expected)
    close(logits_of(model, ids, logits_to_keep=3), expected[:, -3:])
    close(logits_of(model, ids, logits_to_keep=torch.tensor([1, 7])), expected[:, [1, 7]])
    rows, places = torch.tensor([1, 0, 1]).numpy(), torch.tensor([2, 5, 9]).numpy()
    some, targets = logits_at(model, list(ids.numpy()), rows, places, places)
    close(some, expected[rows, places])
    assert log_probs(some, targets).shape == (3,)


@pytest.mark.parametrize("name", SOME)
def test_every_way_to_run_it_is_the_same(name: str) -> None:
    """Cached, chunked, static, beams, padded, packed."""
    model, ids = of_trunks(name), tokens(2, 11)
    whole = logits_of(model, ids)
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        close(first.logits, whole[:, :5])
        close(model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits, whole[:, 5:])
    written = generate(model, ids)
    assert torch.equal(generate(model, ids, use_cache=False), written)
    assert torch.equal(generate(model, ids, cache_implementation="static"), written)
    assert torch.equal(generate(model, ids, prefill_chunk_size=3), written)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, ids, **beams), generate(model, ids, use_cache=False, **beams))
    pad = torch.cat((torch.full((1, 4), 5), ids[:1, :7]), dim=1)
    mask = (torch.arange(11) >= 4).long()[None]
    assert torch.equal(generate(model, pad, mask), generate(model, ids[:1, :7]))
    documents = [tokens(1, length, seed=length) for length in (5, 1, 9)]
    batch = {
        "input_ids": torch.cat(documents, dim=1),
        "position_ids": torch.cat([torch.arange(document.shape[1]) for document in documents])[None],
    }
    with torch.no_grad():
        packed = model(**packed_inputs(batch, packing_method(model))).logits
    close(packed, torch.cat([logits_of(model, document) for document in documents], dim=1))


@pytest.mark.parametrize("name", ["llama", "llama-bias"])
@pytest.mark.parametrize("rows", [[1], [0, 2]])
def test_kept_experts_are_the_mixture_without_the_others(name: str, rows: list[int]) -> None:
    model, ids = of_trunks(name, num_experts_per_tok=3, norm_topk_prob=True), tokens()
    kept = keep_experts(model, rows)
    gate = model.document_gate
    for kind in ("attention", "ffn", "trunk"):
        with torch.no_grad():
            column = getattr(gate, kind)
            column[[e for e in range(3) if e not in rows]] = -1e4
    close(logits_of(kept, ids), logits_of(model, ids), 1e-4)


@pytest.mark.slow  # traces for a minute
def test_its_graph_has_no_breaks() -> None:
    model, ids = of_trunks("llama"), tokens()
    expected = logits_of(model, ids)
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gpt2"])
def test_gradients_reach_every_trunk(name: str) -> None:
    """With gradient checkpointing, and a second pass in between."""
    gradients = []
    for checkpointing in (False, True):
        model = of_trunks(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses = [model(ids, labels=ids, use_cache=False).loss for ids in (tokens(2, 11, 1), tokens(2, 7, 2))]
        sum(losses).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for parameter, grad in gradients[0].items():
        assert grad is not None, parameter
        close(gradients[1][parameter], grad, 1e-6)
    assert all(parameter.grad.abs().max() > 0 for parameter in model.get_input_embeddings().parameters())
    assert gradients[0]["document_gate.trunk"].abs().max() > 0
    trained_parts.freeze(model, ["trunk"])
    trunk = [m for m in model.modules() if isinstance(m, BranchMixTrunkExperts)]
    assert not any(parameter.requires_grad for module in trunk for parameter in module.parameters())


@pytest.mark.parametrize("name", ["llama", "llama-bias", "phi"])
def test_resized_embeddings(name: str) -> None:
    model, ids = of_trunks(name), tokens()
    before = logits_of(model, ids)
    model.resize_token_embeddings(101)
    close(logits_of(model, ids)[..., :97], before)
    assert logits_of(model, torch.full((1, 3), 100)).shape[-1] == 101
    tied = name == "llama-bias"
    heads, tables = model.get_output_embeddings(), model.get_input_embeddings()
    assert all((head.weight is table.weight) == tied for head, table in zip(heads, tables, strict=True))


# ---- folders ----


@pytest.mark.parametrize("name", SOME)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = of_trunks(name)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.trunk == "experts"
    assert torch.equal(logits_of(again, tokens()), logits_of(model, tokens()))
    counted = parameters(model.config.to_dict())
    assert counted.total == sum(parameter.numel() for parameter in again.parameters())
    one = parameters({**model.config.to_dict(), "trunk": "average"})
    assert active_parameters(model.config.to_dict()).lm_head == one.lm_head
    assert counted.embeddings == 3 * one.embeddings and counted.lm_head == 3 * one.lm_head


def test_loads_without_the_package(tmp_path: Path) -> None:
    for name in ("llama", "llama-bias"):
        model, ids, folder = of_trunks(name), tokens(), tmp_path / "models" / name
        model.save_pretrained(folder)
        with torch.no_grad():
            expected = {"logits": model(ids).logits, "hidden": model.base_model(ids).last_hidden_state}
        written = generate(model, ids, max_new_tokens=6, min_new_tokens=6)
        save_file(
            {"ids": ids, **expected, "generated": torch.cat((ids, written), dim=1)}, folder / "expected.safetensors"
        )
    (tmp_path / "copies").mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", WITHOUT_BRANCHMIX + LOAD_ALL, str(tmp_path / "models"), str(tmp_path / "copies")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experts_come_and_go_with_their_trunks(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models = siblings(name)
    merge({n: f for n, f in models.items() if n != "math"}, tmp_path / "two")
    branchmix.add_expert(with_silent_gates(tmp_path / "two"), "math", models["math"], tmp_path / "three")
    branchmix.remove_expert(tmp_path / "three", "code", tmp_path / "left")
    mixture, ids = load(tmp_path / "left"), tokens()
    for number, expert in enumerate(("seed", "math")):
        with one_hot_gates(mixture, number):
            close(logits_of(mixture, ids), logits_of(load(models[expert]), ids))
        branchmix.export_model(tmp_path / "left", tmp_path / expert, to="dense", expert=expert)
        close(logits_of(load(tmp_path / expert), ids), logits_of(load(models[expert]), ids))
    other = BY_NAME[name].save(tmp_path / "other", 3, vocab_size=99)
    with pytest.raises(CompatibilityError, match=r"has shape \[99, 32\], but the mixture's experts have \[97, 32\]"):
        branchmix.add_expert(tmp_path / "left", "other", other, tmp_path / "never")
    with pytest.raises(CompatibilityError, match="its trunk has experts, and no class has several"):
        branchmix.export_model(tmp_path / "left", tmp_path / "never", to="mixtral")


def test_nothing_chooses_without_gates(siblings: Siblings, tmp_path: Path) -> None:
    for gates in (None, {"data": "data.yaml", "token_only": True}):
        with pytest.raises(RecipeError, match=r"trunk: experts needs gates: \{data: FILE\}"):
            Recipe.of(recipe(siblings("llama"), trunk="experts", gates=gates))
    merge(siblings("llama"), tmp_path / "mixture")
    model = load(tmp_path / "mixture")
    with pytest.raises(ValueError, match="the gates that branchmix calibrate fits"):
        model(tokens())
    hidden = of_trunks("llama").base_model(tokens()).last_hidden_state
    with pytest.raises(ValueError, match="call the whole mixture"):
        of_trunks("llama").get_output_embeddings()(hidden)
    with pytest.raises(ValueError, match="trunk is 'own', not average, experts or whole"):
        gated("llama", trunk="own")


def test_from_a_recipe_to_a_mixture_that_is_its_experts(tmp_path: Path) -> None:
    models = dialects.siblings(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for folder in list(models.values())[1:]:  # a trunk of its own, with the same function up to a rotation
        model = load(folder)
        _rotate(model, torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q)
        model.save_pretrained(folder)
    data = dialects.write(tmp_path)
    given = recipe(models, gates={"data": str(data)}, merge={"fold_norms": True})
    report = branchmix.upcycle({**given, "trunk": "experts"}, tmp_path / "experts", verify=True)
    assert report.plan.lossless and report.verification is not None and report.verification.whole_experts
    assert report.gates is not None
    for domain in report.gates.domains:
        assert domain.before is None and domain.after is not None
        assert max(domain.shares, key=domain.shares.__getitem__) == domain.name
    average = branchmix.upcycle(given, tmp_path / "average")
    assert average.gates is not None
    for ours, theirs in zip(report.gates.domains, average.gates.domains, strict=True):
        assert ours.after < theirs.after
    assert "every expert keeps its own embeddings, norms and head" in (tmp_path / "experts" / "README.md").read_text()
    assert inspect(tmp_path / "experts").as_dict()["trunk"] == "experts"
    with pytest.raises(RecipeError, match="leave --token-only out"):
        calibrate(tmp_path / "experts", data, token_only=True)
    again = calibrate(tmp_path / "experts", data, tmp_path / "again")
    assert [replace(domain, before=None) for domain in again.fitted.domains] == report.gates.domains


def _rotate(model: Any, q: torch.Tensor) -> None:
    """A Llama that computes the same in another basis of its stream; norm gains are folded before."""
    base = model.model
    with torch.no_grad():
        for layer in base.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                for reader in readers:
                    reader.weight.copy_(reader.weight * norm.weight @ q)
                norm.weight.fill_(1.0)
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(q.T @ writer.weight)
        base.embed_tokens.weight.copy_(base.embed_tokens.weight @ q)
        model.lm_head.weight.copy_(model.lm_head.weight * base.norm.weight @ q)
        base.norm.weight.fill_(1.0)
