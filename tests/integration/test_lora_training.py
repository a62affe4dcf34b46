"""LoRA from a run: put on, trained, saved, and taken as an expert of a mixture."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import branchmix
from branchmix.errors import RecipeError
from branchmix.train import trained_parts
from branchmix.train.config import Lora
from families import BY_NAME, NAMES
from mixtures import load, random_mixture, tokens

pytest.importorskip("peft")

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
