"""BTS: closed stitches are the seed and whole experts, open ones are the paper's equations, in every family."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, DynamicCache, StaticCache

import branchmix
from branchmix.accounting import active_parameters, flops_per_token, inspect, kv_cache_bytes_per_token, parameters
from branchmix.accounting.shape import shape_of
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.data.sequences import packed_inputs, packing_method
from branchmix.errors import BranchMixError, RecipeError, VerificationError
from branchmix.likelihood.models import TextModel
from branchmix.models.kept_branchmix import keep_experts
from branchmix.models.stitched_branchmix import BranchMixStitch, BranchMixStitchedBlock, last_states
from branchmix.recipe import Recipe
from branchmix.scaling.within import Axes
from branchmix.study.models import facts_of, new_model, step_cost
from branchmix.study.settings import METHODS, StudyFile
from branchmix.train import train, trained_parts
from branchmix.train.checks import _bytes_needed
from branchmix.train.config import RunConfig
from branchmix.train.schedule import shares_trained, token_flops
from branchmix.upcycling.model_card import lossless_line
from branchmix.upcycling.verify import verify_plan
from families import NAMES
from mixtures import close, load, random_mixture, tokens
from training import command, rows, settings, training, write_run, write_text

Siblings = Callable[..., dict[str, Path]]
KINDS = ("llama-bias", "qwen3", "gemma3", "olmo", "cohere", "gpt-neox", "gpt2", "opt", "falcon", "apertus")
"""Sequential and parallel blocks, fused and biased projections, norms of every kind, windows, learned positions."""
SOME = ("llama-bias", "gemma3", "cohere", "gpt2", "opt", "falcon")
ALTERNATING = ["hub", "experts", "hub", "experts"]


def given(models: dict[str, Path], stitches: int = 4, **options: Any) -> dict[str, Any]:
    experts = [{"name": name, "model": str(path)} for name, path in models.items() if name != "seed"]
    return {"seed": str(models["seed"]), "experts": experts, "stitches": stitches, **options}


def stitched(name: str, **options: Any) -> Any:
    """Three random models whose stitches are open."""
    options = {"stitches": ["experts", "hub"], "num_experts_per_tok": 3, **options}
    return random_mixture(name, "whole", ffn="whole", trunk="whole", **options)


def stitches_of(model: Any) -> list[BranchMixStitch]:
    return [module for module in model.modules() if isinstance(module, BranchMixStitch)]


# ---- closed ----


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_closed_stitches_are_the_seed_and_whole_experts(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models, ids = siblings(name), tokens()
    report = branchmix.upcycle(given(models), tmp_path / "mixture", verify=True)
    assert report.plan.lossless and report.verification is not None and report.verification.whole_experts
    assert [check.max_difference for check in report.verification.experts] == [0.0] * 3
    mixture, dense = load(tmp_path / "mixture"), [load(folder) for folder in models.values()]
    with torch.no_grad():
        assert torch.equal(mixture(ids).logits, dense[0](ids).logits)
        for state, model in zip(last_states(mixture, ids), dense, strict=True):
            close(state, model.base_model(ids).last_hidden_state)
    if name not in ("seed-oss", "helium"):  # families without a formula
        stored = sum(parameter.numel() for parameter in mixture.parameters())
        assert parameters(report.plan.config).total == stored == inspect(tmp_path / "mixture").stored


def test_verification_notices_a_wrong_stream(siblings: Siblings, tmp_path: Path) -> None:
    report = branchmix.upcycle(given(siblings("llama")), tmp_path / "mixture")
    for stream, what in ((0, "seed"), (2, "math")):
        wrong = load(tmp_path / "mixture")
        with torch.no_grad():
            wrong.model.model.layers[1].streams[stream].mlp.down_proj.weight.add_(0.1)
        wrong.save_pretrained(tmp_path / what)
        plan = report.plan
        with pytest.raises(VerificationError, match="differs from its source bytes"):
            verify_plan(plan, tmp_path / what)
        other = [tensor for tensor in plan.tensors if ".down_proj." not in tensor.name]
        with pytest.raises(VerificationError, match=f"in the stream of expert '{what}'"):
            verify_plan(type(plan)(tuple(other), plan.config, sources=plan.sources, lossless=True), tmp_path / what)


# ---- open ----


def test_a_stitch_is_the_papers() -> None:
    """Eq. 3 and 4 with projections of 1; projections of 0 and equal states change nothing, whatever the gates are."""
    torch.manual_seed(0)
    hub, *experts = states = [torch.randn(2, 5, 8) for _ in range(3)]
    for into_hub in (True, False):
        stitch = BranchMixStitch(8, 3, into_hub=into_hub)
        torch.nn.init.normal_(stitch.gate.weight)
        assert all(after is before or not into_hub for after, before in zip(stitch(states)[1:], experts, strict=True))
        same = stitch([hub, hub, hub])
        assert all(torch.equal(state, hub) for state in same)
        for projection in stitch.projections:
            torch.nn.init.eye_(projection.weight)
        gates = stitch.gate(hub).view(2, 5, -1, 8)
        if into_hub:
            g = gates.softmax(2)
            expected = [hub * g[:, :, 0] + sum(g[:, :, i + 1] * h for i, h in enumerate(experts)), *experts]
        else:
            g = gates.sigmoid()
            expected = [hub, *((1 - g[:, :, i]) * h + g[:, :, i] * hub for i, h in enumerate(experts))]
        for after, wanted in zip(stitch(states), expected, strict=True):
            close(after, wanted, 1e-6)
        for projection in stitch.projections:
            torch.nn.init.zeros_(projection.weight)
        assert all(torch.equal(after, before) for after, before in zip(stitch(states), states, strict=True))


@pytest.mark.parametrize("number", [1, 2])
def test_an_open_stitch_gives_an_experts_state(number: int, siblings: Siblings, tmp_path: Path) -> None:
    """With P = 1 and the last gate on an expert, the output is the hub's norm and head on this expert's last layer."""
    models, ids = siblings("qwen3"), tokens()
    branchmix.upcycle(given(models), tmp_path / "mixture")
    mixture, seed, expert = load(tmp_path / "mixture"), load(models["seed"]), load([*models.values()][number])
    last = stitches_of(mixture)[-1]
    torch.nn.init.eye_(last.projections[number - 1].weight)

    def force(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits.unflatten(-1, (3, -1))[..., number, :] = 1e4
        return logits

    last.gate.register_forward_hook(force)
    expert.model.norm, expert.lm_head = seed.model.norm, seed.lm_head
    close(mixture(ids).logits, expert(ids).logits)


@pytest.mark.parametrize("stitches", [ALTERNATING, [None, "experts", None, "hub"]])
def test_a_model_is_its_blocks_in_lockstep(stitches: list[str | None]) -> None:
    """Against a loop over the layers of three models and their stitches."""
    model = stitched("llama", stitches=stitches, seed_changes={"num_hidden_layers": 4})
    ids, base = tokens(), model.model.model
    states = [table(ids) for table in base.embed_tokens]
    positions = base.rotary_emb(states[0], torch.arange(ids.shape[1])[None])
    read = []
    for layer, into in zip(base.layers, stitches, strict=True):
        read.append(states[0])
        states = [
            block(h, position_embeddings=positions, attention_mask=None)
            for block, h in zip(layer.streams, states, strict=True)
        ]
        if into is None:
            assert layer.stitch is None
            continue
        hub, *experts = states
        gates = layer.stitch.gate(hub).unflatten(-1, (-1, hub.shape[-1]))
        gates = gates.softmax(-2)[..., 1:, :] if into == "hub" else gates.sigmoid()
        moves = [
            gates[..., i, :] * ((h - hub if into == "hub" else hub - h) @ layer.stitch.projections[i].weight.T)
            for i, h in enumerate(experts)
        ]
        if into == "hub":
            states[0] = hub + sum(moves)
        else:
            states[1:] = [h + move for h, move in zip(experts, moves, strict=True)]
    read.append(base.norm[0](states[0]))
    ours = model(ids, output_hidden_states=True)
    close(ours.logits, model.model.lm_head(read[-1]))
    for our, state in zip(ours.hidden_states, read, strict=True):
        close(our, state)


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in SOME), ("opt", {"word_embed_proj_dim": 24})])
def test_hidden_states_are_what_the_hubs_layers_read(name: str, changes: dict[str, Any]) -> None:
    """With open stitches, whether the family returns the states itself (Falcon) or transformers records its blocks."""
    options = {"stitches": ["hub", "experts", "hub"], "seed_changes": {"num_hidden_layers": 3, **changes}}
    model, ids, read = stitched(name, **options), tokens(), list[torch.Tensor]()
    for block in [module for module in model.modules() if isinstance(module, BranchMixStitchedBlock)]:
        block.streams[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    ours = model(ids, output_hidden_states=True)
    *states, last = ours.hidden_states
    assert len(states) == len(read) == 3
    assert all(torch.equal(our, state) for our, state in zip(states, read, strict=True))
    head = model.get_output_embeddings()
    assert torch.equal(last, last_states(model, ids)[0]) and last.shape[-1] == head.in_features
    assert model(ids).hidden_states is None


@pytest.mark.parametrize("name", SOME)
def test_caches_padding_and_generation(name: str) -> None:
    model, ids = stitched(name), tokens(2, 12)
    whole = model(ids, use_cache=False).logits
    for cache in (None, DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=12)):
        first = model(ids[:, :7], past_key_values=cache, use_cache=True)
        rest = [model(ids[:, at : at + 1], past_key_values=first.past_key_values).logits for at in range(7, 12)]
        close(torch.cat([first.logits, *rest], dim=1), whole)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, **options)
    slowly = ids
    for _ in range(5):
        logits = model(slowly, use_cache=False).logits[:, -1]
        logits[:, 2] = -math.inf  # the end of the text
        slowly = torch.cat([slowly, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, slowly)
    assert torch.equal(
        model.generate(ids, num_beams=2, **options), model.generate(ids, num_beams=2, use_cache=False, **options)
    )
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, 15)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], generated)


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model, documents = stitched(name), [tokens(1, 5), tokens(1, 7, seed=1)]
    batch = {
        "input_ids": torch.cat(documents, dim=1),
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
    }
    packed = model(**packed_inputs(batch, packing_method(model))).logits
    close(packed, torch.cat([model(document).logits for document in documents], dim=1))


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_states_and_attentions_are_the_hubs(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models, ids = siblings(name), tokens()
    branchmix.upcycle(given(models), tmp_path / "mixture")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = (
        load(folder, attn_implementation="eager")(ids, **wanted) for folder in (tmp_path / "mixture", models["seed"])
    )
    for key in ("hidden_states", "attentions"):
        for our, their in zip(getattr(ours, key), getattr(theirs, key), strict=True):
            assert torch.equal(our, their)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        load(tmp_path / "mixture")(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("name", ["llama", "llama-bias"])  # untied and tied embeddings
def test_new_tokens_and_folders(name: str, tmp_path: Path) -> None:
    model, ids = stitched(name), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(101)
    assert model(torch.full((1, 2), 100)).logits.shape == (1, 2, 101) and model.config.vocab_size == 101
    close(model(ids).logits[..., :97], before)
    model.save_pretrained(tmp_path)
    again, base = load(tmp_path), AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again.model.lm_head(base(ids).last_hidden_state), model(ids).logits)


# ---- training ----


def test_gradients_reach_every_stitch() -> None:
    """The last ones at once, the others and the gates as soon as those are open; nothing else has a gradient."""
    model = stitched("cohere", stitches=ALTERNATING[::-1], seed_changes={"num_hidden_layers": 4})
    for stitch in stitches_of(model):
        for parameter in stitch.parameters():
            torch.nn.init.zeros_(parameter)
    trained_parts.only_stitches(model, [])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".stitch." in name for name in trained) and len(trained) == 4 * 3
    ids, found, losses = tokens(), [], []
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        found.append({name for name, p in trained.items() if p.grad.abs().max() > 0})
        optimizer.step()
    into_hub = [f"model.model.layers.{layer}.stitch.projections.{i}.weight" for layer in (1, 3) for i in (0, 1)]
    assert found[0] == {*into_hub} and found[2] == {*trained}
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    plain = []
    for enable in (lambda: None, lambda: model.activation_checkpointing_enable({"use_reentrant": False})):
        enable()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        plain.append([p.grad.clone() for p in trained.values()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*plain, strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a seed, its fine-tune, and their mixture."""
    folder = write_text(tmp_path_factory.mktemp("bts"))
    train(write_run(folder / "a", settings(folder, out=str(folder / "seed"), budget={"steps": 40})))
    train(
        write_run(folder / "b", settings(folder, model=str(folder / "seed"), out=str(folder / "law"), mix={"law": 1.0}))
    )
    branchmix.upcycle(given({"seed": folder / "seed", "law": folder / "law"}), folder / "mixture")
    return folder


def test_a_run_trains_the_stitches_only(run: Path) -> None:
    options = {"model": str(run / "mixture"), "out": str(run / "trained"), "mix": {"law": 1.0}}
    train(write_run(run / "c", settings(run, **options)))
    before, after = (load(run / name).state_dict() for name in ("mixture", "trained"))
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (".stitch." not in name), name
    counts = inspect(run / "mixture").total
    assert training(run / "trained")["model"]["trained"] == counts.stitches
    config = RunConfig.load(run / "c" / "run.yaml")
    needed = _bytes_needed({}, ResolvedModel("mixture", run / "mixture"), config)
    assert needed == 4 * ((config.checkpoints.keep + 1) * (counts.total + 2 * counts.stitches) + counts.total)
    losses = [row["held_out/law"] for row in rows(run / "trained") if "held_out/law" in row]
    of_seed, of_expert = (training(run / name)["held_out"]["end"]["law"]["loss"] for name in ("seed", "law"))
    assert losses[0] == pytest.approx(of_seed, abs=1e-5) and losses[-1] < of_seed - (of_seed - of_expert) / 10


@pytest.mark.parametrize("change", [{"freeze": ["trunk"]}, {"adapters": True}, {"lora": {"rank": 2}}, {"balance": {}}])
def test_runs_that_choose_parts_are_refused(change: dict[str, Any], run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"^{next(iter(change))}: .*remove"):
        train(write_run(tmp_path, settings(run, model=str(run / "mixture"), out=str(tmp_path / "out"), **change)))


# ---- accounting ----


def test_the_papers_numbers() -> None:
    """264M parameters of stitches, 11B in all: section 3.1, with the gate that hub into experts does not use."""
    seed = {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 20,
        "num_attention_heads": 24,
        "num_key_value_heads": 1,
        "vocab_size": 32000,
    }
    names = [{"name": name, "model": name} for name in ("code", "math", "multilingual")]
    recipe = Recipe(seed="seed", experts=names, stitches=4)
    layers = recipe.stitched_layers(20)
    assert layers is not None and {n + 1: into for n, into in enumerate(layers) if into} == {
        5: "experts",
        10: "hub",
        15: "experts",
        20: "hub",
    }
    config = {"model_type": "branchmix", "seed_config": seed, "num_experts": 4, **recipe.parts, "stitches": layers}
    config["num_experts_per_tok"] = recipe.num_experts_per_tok
    counts = parameters(config)
    assert counts.stitches + 2 * 3072**2 == 264_241_152
    assert active_parameters(config) == counts
    assert counts.total == 4 * parameters(seed).total - 3 * parameters(seed).lm_head + counts.stitches
    assert kv_cache_bytes_per_token(config) == 4 * kv_cache_bytes_per_token(seed)
    assert recipe.stitched_layers(3) == ["hub", "experts", "hub"] and recipe.stitched_layers(1) == ["hub"]
    assert recipe.stitched_layers(9) == [None, None, "experts", None, "hub", None, "experts", None, "hub"]


def test_flops_of_projected_embeddings_are_those_of_every_model() -> None:
    model = stitched("opt", seed_changes={"word_embed_proj_dim": 24})
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens(1, 24), use_cache=False)
    flops = flops_per_token(model.config.to_dict(), 24)
    assert counter.get_total_flops() == 24 * (flops.total + flops.model("context"))


@pytest.mark.parametrize("name", ["qwen3", "gpt-neox"])
def test_flops_are_those_of_torchs_counter(name: str) -> None:
    """Forward to the digit, and training, for a sequence whose tokens see all keys."""
    length, layers = 24, [None, "experts", None, "hub"]
    model = stitched(name, stitches=layers, seed_changes={"num_hidden_layers": 4})
    model.set_attn_implementation("eager")
    mask, ids = torch.ones(1, 1, length, length, dtype=torch.bool), tokens(1, length)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(ids, attention_mask=mask, use_cache=True)
    flops = flops_per_token(model.config.to_dict(), length)
    assert counter.get_total_flops() == length * (flops.total + flops.model("context"))
    keys = [layer.keys.numel() + layer.values.numel() for layer in out.past_key_values.layers]
    assert sum(keys) * 4 == length * kv_cache_bytes_per_token(model.config.to_dict(), "float32")

    trained_parts.only_stitches(model, [])
    with FlopCounterMode(display=False) as counter:
        model.train()(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    training = token_flops(model.config.to_dict(), length, *shares_trained(model))
    ahead = flops.layers[0].context + flops.layers[1].context
    context = flops.model("context") + 2 * (flops.model("context") - ahead)  # counted twice: all keys, not half of them
    counted = counter.get_total_flops() / length
    assert training is not None
    unneeded = flops.layers[1].stitch  # the gradient of what the first stitch reads
    assert counted == pytest.approx(training.training + context - unneeded, rel=1e-3)


# ---- what has no stitches is refused ----


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"attention": "average"}, "attention: with stitches"),
        ({"include_seed": False}, "include_seed: with stitches"),
        ({"seed_copies": 1}, "seed_copies: with stitches"),
        ({"routing": {"ffn": {"top_k": 2}}}, "routing: with stitches"),
        ({"gates": {"data": "data.yaml"}}, "gates: with stitches"),
        ({"expert_rank": 4}, "expert_rank: with stitches"),
        ({"stitches": 0}, "stitches: "),
    ],
)
def test_recipes(options: dict[str, Any], problem: str) -> None:
    models = {name: Path(name) for name in ("seed", "code")}
    with pytest.raises(RecipeError, match=problem):
        Recipe.of({**given(models), **options})


def test_commands(siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    models = siblings("llama")
    mixture, recipe = tmp_path / "mixture", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(given(models, 2)))
    assert command(monkeypatch, "upcycle", recipe, mixture, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "layers.*.stitch.projections.*.weight" in printed
    assert "every model is whole in it, except for the experts' output layers" in printed
    assert command(monkeypatch, "upcycle", recipe, mixture, "--verify") == 0
    assert "last states of the others" in capsys.readouterr().out
    assert command(monkeypatch, "inspect", mixture) == 0
    printed = capsys.readouterr().out
    assert "whole models, joined by 2 stitches" in printed and "stitches" in printed and "stitch " in printed
    card = (mixture / "README.md").read_text()
    assert "# BTS: whole models side by side" in card and "it is the seed until they are trained" in card
    refused: list[tuple[Any, ...]] = [
        ("add-expert", mixture, f"more={models['code']}", tmp_path / "out"),
        ("remove-expert", mixture, "code", tmp_path / "out"),
        ("export", mixture, tmp_path / "out", "--to", "mixtral"),
        ("export", mixture, tmp_path / "out", "--to", "dense", "--expert", "code"),
    ]
    for words in refused:
        assert command(monkeypatch, *words) == 2
        assert "joined by stitches" in capsys.readouterr().err, words
    model = load(mixture)
    for call in (lambda: keep_experts(model, ["code"]), lambda: model.generate(tokens(), experts="auto")):
        with pytest.raises(ValueError, match="joined by stitches, which need all of them"):
            call()


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_left_out_is_said(tied: bool) -> None:
    shape = shape_of(stitched("llama", seed_changes={"tie_word_embeddings": tied}).config.to_dict())
    heads = "" if tied else "the experts' output layers"
    rows = "padded rows of embeddings" if tied else f"{heads} and padded rows of embeddings"
    but = f", except for {heads}" if heads else ""
    assert lossless_line(True, shape) == f"lossless: every model is whole in it{but}"
    assert lossless_line(False, shape) == f"not lossless: every model is whole in it, except for {rows}"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("eval", "MIXTURE", "--data", "DATA", "--forced"), "--forced: .* has stitches instead of gates"),
        (("routes", "MIXTURE", "--data", "DATA", "--out", "OUT"), "joined by stitches: it has no routers to show"),
        (("calibrate", "MIXTURE", "--data", "DATA", "--out", "OUT"), "joined by stitches: it has no gates to fit"),
        (("generate", "MIXTURE", "a", "--experts", "law"), "--experts: .* joined by stitches, which need all"),
        (("generate", "MIXTURE", "a", "--experts", "auto"), "--experts: .* joined by stitches, which need all"),
    ],
    ids=lambda value: "-".join(word for word in value if word.islower()) if isinstance(value, tuple) else "",
)
def test_commands_that_choose_experts_are_refused(
    words: tuple[str, ...], problem: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In one line, before weights are loaded."""
    places = {"MIXTURE": run / "mixture", "DATA": tmp_path / "data.yaml", "OUT": tmp_path / "out"}
    places["DATA"].write_text(yaml.safe_dump({"data": {"law": {"files": str(run / "law.jsonl")}}}))
    monkeypatch.setattr(TextModel, "load", lambda *args, **options: pytest.fail("weights are loaded"))
    assert command(monkeypatch, *(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(problem, error) and len(error.splitlines()) == 1
    assert not places["OUT"].exists()


@pytest.mark.parametrize("axes", [{"experts": (1, 2)}, {"top_k": (1, 2)}])
def test_axes_that_choose_experts_are_refused(axes: dict[str, tuple[int, ...]], run: Path) -> None:
    option = "--" + next(iter(axes)).replace("_", "-")
    with pytest.raises(RecipeError, match=f"^{option}: bts has stitches, which need all experts: .* {option}$"):
        Axes(**axes).refuse_unfit("bts", AutoConfig.from_pretrained(run / "mixture"))


def test_other_rotary_settings_are_refused(siblings: Siblings, tmp_path: Path) -> None:
    models = {"seed": siblings("llama")["seed"], "code": siblings("llama", rope_theta=5000.0)["code"]}
    with pytest.raises(BranchMixError, match=r"rotary settings are .*stitches join share the seed's.*without stitches"):
        branchmix.upcycle(given(models), tmp_path / "mixture")


# ---- studies ----


def test_a_study_knows_what_it_trains() -> None:
    from test_study import MODEL
    from test_study import settings as study_settings

    from branchmix.study.models import Mixtures
    from branchmix.study.settings import Method

    study = StudyFile.model_validate(study_settings(methods=["btx", "bts"], recipe={"routed_scaling_factor": "auto"}))
    seed = {**MODEL, "vocab_size": 300, "num_hidden_layers": 4}
    seed.pop("train_tokenizer")
    mixtures = Mixtures(study, seed)
    recipe = mixtures.recipe(Method(method="bts"), 3)
    assert METHODS["bts"].kind == "mixture" and recipe.stitches == 4 and recipe.expert_names == ["seed", "code"]
    config = mixtures.config(recipe)
    cost, whole = step_cost(study, config, {}), step_cost(study, {**config, "stitches": None} | PLAIN, {})
    model = new_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters(config).total
    assert cost.optimizer == 17 * parameters(config).stitches and cost.flops < whole.flops * 3
    facts, layers = facts_of(config, 64), [*model.model.model.layers]
    of_stitches = [sum(p.numel() for p in stitch.parameters()) for stitch in stitches_of(model)]
    assert facts["layer_parameters"]["stitch"] == sum(of_stitches) // len(layers)


@pytest.mark.parametrize("options", [{}, {"shared_router": True}, {"domain_router": {"width": 32, "inner": 8}}])
def test_a_layers_routers_are_counted_in_a_study(options: dict[str, Any]) -> None:
    model = random_mixture("llama", **options)
    facts = facts_of(model.config.to_dict(), 64)["layer_parameters"]
    routers = [p.numel() for name, p in model.model.model.layers[0].named_parameters() if re.search(ROUTERS, name)]
    assert facts["attention_router"] + facts["ffn_router"] == sum(routers) > 0 and "stitch" not in facts


ROUTERS = r"\.expert_gate\.|^mlp\.gate\."


PLAIN = {"attention": "kv_experts", "ffn": "experts", "trunk": "average"}
