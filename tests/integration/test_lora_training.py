"""LoRA from a run: put on, trained, saved, and taken as an expert of a mixture."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study import STEP, write_study
from transformers import AutoModelForCausalLM

import branchmix
import corpora
from branchmix.checkpoint.hub import resolve
from branchmix.errors import CheckpointError, RecipeError
from branchmix.likelihood import adapters
from branchmix.likelihood.models import TextModel
from branchmix.models.routers import one_hot_gates
from branchmix.study.build import build
from branchmix.study.scheduler import study
from branchmix.study.settings import StudyFile
from branchmix.train import trained_parts
from branchmix.train.config import Lora
from families import BY_NAME, NAMES
from mixtures import load, random_mixture, tokens

peft = pytest.importorskip("peft")

Siblings = Callable[..., dict[str, Path]]


def trained(model: Any, steps: int = 2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)
    ids, losses = tokens(), []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_put_on_every_family(name: str) -> None:
    """All matrices of attention and FFN are adapted, and nothing is computed otherwise at the start."""
    model = BY_NAME[name].model(0)
    ids = tokens()
    before = model(ids).logits
    no_layers = ("embed", "norm", "lm_head", "wte", "wpe")
    matrices = {
        path.removesuffix(".weight")
        for path, parameter in model.named_parameters()
        if parameter.dim() == 2 and not any(word in path for word in no_layers)
    }
    tuned = trained_parts.add_lora(model, Lora(rank=2))
    assert torch.equal(tuned.eval()(input_ids=ids).logits, before)
    found = {path for path, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert {path.removeprefix("base_model.model.").partition(".lora_")[0] for path in found} == matrices
    assert len(found) == 2 * len(matrices) and all(".lora_" in path for path in found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "cohere"])
def test_the_result_is_an_expert(name: str, siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings(name)["seed"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        dense = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
        tuned = trained_parts.add_lora(dense, Lora(rank=4, alpha=8))
    settings = tuned.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (4, 8, 0.0)
    losses = trained(tuned, 3)
    assert losses[2] < losses[0]
    tuned.save_pretrained(tmp_path / "expert")
    assert not (tmp_path / "expert" / "config.json").exists()
    recipe = {"seed": str(seed), "attention": "kv_experts"}
    branchmix.upcycle({**recipe, "experts": [{"name": "x", "model": str(tmp_path / "expert")}]}, tmp_path / "ours")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    branchmix.upcycle({**recipe, "experts": [{"name": "x", "model": str(tmp_path / "merged")}]}, tmp_path / "theirs")
    ours, theirs = load(tmp_path / "ours").state_dict(), load(tmp_path / "theirs").state_dict()
    start = load(seed).state_dict()
    assert ours.keys() == theirs.keys() and start
    for path, tensor in theirs.items():
        torch.testing.assert_close(ours[path], tensor, rtol=0, atol=1e-6)
    experts = next(tensor for path, tensor in ours.items() if path.endswith("experts.down_proj"))
    assert (experts[1] - experts[0]).abs().max() > 1e-3  # the first expert is the seed


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_a_model_to_evaluate(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """With the tokenizer of the model it was trained on, and all of its own beside that model's hash."""
    seed = Path(shutil.copytree(siblings(name, vocab_size=300)["seed"], tmp_path / "seed"))
    corpora.tokenizer().save_pretrained(seed)
    hashes, ids = [TextModel(resolve(str(seed)), "float32", False).facts["weights"]], tokens()
    for number in range(2):
        tuned = trained_parts.add_lora(load(seed), Lora(rank=2))
        trained(tuned, 1 + number)
        tuned.save_pretrained(tmp_path / f"lora-{number}")
        ours = TextModel(resolve(str(tmp_path / f"lora-{number}")), "float32", False)
        logits = ours.load()(ids).logits
        torch.testing.assert_close(logits, tuned.eval()(input_ids=ids).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(logits, tuned.merge_and_unload()(ids).logits, rtol=0, atol=1e-5)
        assert (logits - load(seed)(ids).logits).abs().max() > 1e-3
        hashes.append(ours.facts["weights"])
    assert len({*hashes}) == 3


def test_an_adapter_of_a_mixture_with_forced_gates(tmp_path: Path) -> None:
    random_mixture("llama", num_experts_per_tok=3).save_pretrained(tmp_path / "mixture")
    corpora.tokenizer().save_pretrained(tmp_path / "mixture")
    targets = ["q_proj", "v_proj", "self_attn.o_proj"]
    options = peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    tuned, ids = peft.get_peft_model(load(tmp_path / "mixture"), options), tokens()
    tuned.save_pretrained(tmp_path / "lora")
    adapted = TextModel(resolve(str(tmp_path / "lora")), "float32", False)
    with one_hot_gates(tuned, 1):
        expected = tuned(ids).logits
    torch.testing.assert_close(adapted.forced(1).load()(ids).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="adapters on it"):
        tuned.base_model.model.keep_experts([1])


def test_an_adapter_with_a_tokenizer_of_its_own(siblings: Siblings, tmp_path: Path) -> None:
    seed = Path(shutil.copytree(siblings("llama", vocab_size=300)["seed"], tmp_path / "seed"))
    trained_parts.add_lora(load(seed), Lora()).save_pretrained(tmp_path / "lora")
    corpora.tokenizer().save_pretrained(tmp_path / "lora")
    assert TextModel(resolve(str(tmp_path / "lora")), "auto", False).tokenizer("hello").input_ids
    for file in (tmp_path / "lora").glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"lora: has no tokenizer files: copy the seed's"):
        TextModel(resolve(str(tmp_path / "lora")), "auto", False)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("base_model_name_or_path", None, "base_model_name_or_path is missing: write the model there"),
        ("base_model_name_or_path", "./gone", r"base_model_name_or_path: ./gone: no such folder .*: check the path$"),
        ("base_model_name_or_path", "{lora}", "base_model_name_or_path: .*lora: is a LoRA adapter folder"),
        ("base_model_name_or_path", "{wide}", "lora: does not fit its base model .*seed: .*size mismatch"),
        ("peft_type", "IA3", "has peft_type IA3, only LORA is supported"),
    ],
)
def test_adapters_without_their_model_are_refused(
    key: str, value: str | None, words: str, siblings: Siblings, tmp_path: Path
) -> None:
    seed, wide = (siblings("llama", **changes)["seed"] for changes in ({}, {"intermediate_size": 96}))
    lora = tmp_path / "lora"
    trained_parts.add_lora(load(seed), Lora()).save_pretrained(lora)
    corpora.tokenizer().save_pretrained(lora)
    file = lora / "adapter_config.json"
    value = value and value.format(lora=lora, wide=wide)
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=words):
        TextModel(resolve(str(lora)), "float32", False).load()


def test_the_base_models_revision_is_that_of_the_adapter(
    siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, asked = siblings("llama")["seed"], list[str]()
    trained_parts.add_lora(load(seed), Lora()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "org/base", "revision": "v2"}
    file.write_text(json.dumps(settings))
    monkeypatch.setattr(adapters, "resolve", lambda given: asked.append(given) or resolve(str(seed)))
    assert adapters.base_of(tmp_path).folder == seed
    file.write_text(json.dumps(settings | {"base_model_name_or_path": str(seed)}))
    assert adapters.base_of(tmp_path).folder == seed
    assert asked == ["org/base@v2", str(seed)], "a folder has no revisions"


def test_evaluating_needs_peft(siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_parts.add_lora(load(siblings("llama")["seed"]), Lora()).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match=r"needs peft: pip install 'branchmix\[lora\]'$"):
        TextModel(resolve(str(tmp_path)), "auto", False)


def test_a_study_of_lora_experts(tmp_path: Path) -> None:
    """Adapters are trained, scored beside their mixtures, and merged without a loss: forced gates are the adapters."""
    methods = ["btx", "soup", "ensemble", "bam-expert-kv-forced"]
    lora = {"expert_train": {"lora": {"rank": 2}}, "learning_rate": {"peak": 1e-2, "expert": 5.0}}
    tokens_of = {"seed": 4 * STEP, "expert": 40 * STEP, "mixture": STEP}
    file = write_study(tmp_path, methods=methods, inference=None, keep="weights", tokens=tokens_of, **lora)
    graph = build(StudyFile.load(file))
    only = ["r1.scores.bam-expert-kv-forced", "r1.scores.ensemble", "r1.scores.soup", "r1.scores.code"]
    found = study(file, tmp_path / "out", only=only, launcher="inline", progress=False)
    assert not found.failed

    results = {
        name: json.loads((tmp_path / f"out/results/{name}.json").read_text())
        for name in found.statuses
        if ".train." in name or ".scores." in name
    }
    training = results["r1.train.code"]["training"]
    assert training["flops"] + training["optimizer_flops"] == graph.steps["r1.train.code"].cost.total
    forced, code, soup = (results[f"r1.scores.{name}"] for name in ("bam-expert-kv-forced", "code", "soup"))
    assert forced["forced"]["code"] == "code"
    for ours, theirs in zip(forced["documents"]["code"], code["documents"]["code"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-3)
    assert soup["documents"]["code"] != code["documents"]["code"]

    seed, expert = (next(tmp_path.glob(f"out/steps/r1.train.{name}-*/model")) for name in ("seed", "code"))
    end = peft.AutoPeftModelForCausalLM.from_pretrained(expert).merge_and_unload().state_dict()
    start = load(seed).state_dict()
    for part, word in (("attention", "self_attn"), ("ffn", "mlp")):
        before, after = (torch.cat([state[n].flatten() for n in start if word in n]) for state in (start, end))
        assert training["from_seed"][part] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)


def test_chosen_layers_and_frozen_parts() -> None:
    tuned = trained_parts.add_lora(BY_NAME["llama"].model(0), Lora(targets=["q_proj", "mlp.down_proj"]))
    trained_parts.freeze(tuned, ["attention"])
    found = {path.split(".")[-4] for path, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert found == {"down_proj"}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("q_prj", r"q_prj \(did you mean 'q_proj'\?\): its layers are down_proj, gate"),
        ("lm_head", "lm_head: its layers"),
    ],
)
def test_layers_that_are_not_there(target: str, words: str) -> None:
    with pytest.raises(RecipeError, match=f"^lora.targets: the llama model has no linear layer {words}.*$"):
        trained_parts.add_lora(BY_NAME["llama"].model(0), Lora(targets=["v_proj", target]))


def test_mixtures_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^lora: the branchmix model is a mixture, .* remove lora, and use adapters"):
        trained_parts.add_lora(random_mixture("llama"), Lora())


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r"^lora: needs peft.*: pip install 'branchmix\[lora\]'$"):
        trained_parts.add_lora(BY_NAME["llama"].model(0), Lora())
