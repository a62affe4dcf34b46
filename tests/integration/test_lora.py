"""A PEFT LoRA adapter folder as an expert: the mixture is that of the merged model, and nothing else is left behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import branchmix
from branchmix.errors import BranchMixError, CheckpointError
from mixtures import close as near
from mixtures import tokens

peft = pytest.importorskip("peft")

Siblings = Callable[..., dict[str, Path]]


def adapter(seed: Path, folder: Path, number: int = 0, targets: str = "q_proj v_proj o_proj up_proj down_proj") -> Path:
    """A LoRA adapter whose update is no zero."""
    torch.manual_seed(number)
    model = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets.split(), task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(folder)
    return folder


def merged_by_hand(seed: Path, lora: Path, folder: Path) -> Path:
    """W + (alpha / r) B A, in a few lines of torch."""
    tensors, update = load_file(seed / "model.safetensors"), load_file(lora / "adapter_model.safetensors")
    for name, down in update.items():
        if name.endswith(".lora_A.weight"):
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            change = update[name.replace("lora_A", "lora_B")].double() @ down.double() * (8 / 4)
            tensors[target] = (tensors[target].double() + change).float()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((seed / "config.json").read_text())
    return folder


def given(seed: Path, *models: Path, **options: Any) -> dict[str, Any]:
    experts = [{"name": f"expert-{number}", "model": str(model)} for number, model in enumerate(models)]
    return {"seed": str(seed), "experts": experts, **options}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def close(ours: Path, theirs: Path, tolerance: float = 1e-6) -> None:
    mine, other = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize("attention", ("kv_experts", "kv_sharing"))
def test_the_same_as_merged_by_hand(attention: str, siblings: Siblings, tmp_path: Path) -> None:
    seed = siblings("llama")["seed"]
    lora = adapter(seed, tmp_path / "lora")
    merged = merged_by_hand(seed, lora, tmp_path / "merged")
    (tmp_path / "out").mkdir()
    for name, expert in (("ours", lora), ("theirs", merged)):
        branchmix.upcycle(given(seed, expert, attention=attention), tmp_path / "out" / name)
    close(tmp_path / "out" / "ours", tmp_path / "out" / "theirs")
    assert names(tmp_path / "out") == ["ours", "theirs"]
    record = json.loads((tmp_path / "out" / "ours" / "branchmix.json").read_text())
    assert [source["lora_adapter"] for source in record["sources"]] == [False, True]
    assert record["sources"][1]["model"] == str(lora)


def test_adapters_of_one_name_are_not_mixed_up(siblings: Siblings, tmp_path: Path) -> None:
    """Trainers call every last checkpoint the same."""
    seed = siblings("llama")["seed"]
    loras = [adapter(seed, tmp_path / run / "checkpoint-9", number) for number, run in enumerate("ab")]
    merged = [merged_by_hand(seed, lora, tmp_path / f"merged-{number}") for number, lora in enumerate(loras)]
    branchmix.upcycle(given(seed, *loras), tmp_path / "ours")
    branchmix.upcycle(given(seed, *merged), tmp_path / "theirs")
    close(tmp_path / "ours", tmp_path / "theirs")


def test_merged_in_full_precision_then_stored_as_the_seed(siblings: Siblings, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(siblings("llama")["seed"], dtype=torch.bfloat16).save_pretrained(
        tmp_path / "bf16"
    )
    lora = adapter(tmp_path / "bf16", tmp_path / "lora")
    branchmix.upcycle(given(tmp_path / "bf16", lora), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    base = load_file(tmp_path / "bf16" / "model.safetensors")
    (tmp_path / "fp32").mkdir()
    save_file({n: v.float() for n, v in base.items()}, tmp_path / "fp32" / "model.safetensors", {"format": "pt"})
    (tmp_path / "fp32" / "config.json").write_text((tmp_path / "bf16" / "config.json").read_text())
    exact = load_file(merged_by_hand(tmp_path / "fp32", lora, tmp_path / "merged") / "model.safetensors")
    wanted = exact["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(found["model.model.layers.1.mlp.experts.1.up_proj.weight"], wanted)


def test_failures_are_one_line_and_leave_nothing(siblings: Siblings, tmp_path: Path) -> None:
    seed, other = siblings("llama")["seed"], siblings("llama", hidden_size=64)["seed"]
    (tmp_path / "out").mkdir()
    stranger = adapter(other, tmp_path / "stranger")
    pickled = adapter(seed, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    broken = adapter(seed, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    prefix = adapter(seed, tmp_path / "prefix")
    settings = json.loads((prefix / "adapter_config.json").read_text())
    (prefix / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "PREFIX_TUNING"}))
    for lora, words in (
        (stranger, "give the seed it was trained on"),
        (pickled, "pickles are never loaded"),
        (broken, "not a safetensors file"),
        (prefix, "peft_type PREFIX_TUNING, only LORA"),
    ):
        with pytest.raises(BranchMixError, match=words) as caught:
            branchmix.upcycle(given(seed, lora), tmp_path / "out" / "mixture")
        assert len(str(caught.value).splitlines()) == 1 and "expert-0" in str(caught.value)
        assert not names(tmp_path / "out"), words


def test_nothing_is_left_when_the_merge_fails_later(siblings: Siblings, tmp_path: Path) -> None:
    """The adapter is fine; another expert holds a NaN, which shows while writing."""
    models = siblings("llama")
    lora = adapter(models["seed"], tmp_path / "lora")
    damaged = load_file(models["code"] / "model.safetensors")
    damaged["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    (tmp_path / "damaged").mkdir()
    save_file(damaged, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    (tmp_path / "damaged" / "config.json").write_text((models["code"] / "config.json").read_text())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="NaN"):
        branchmix.upcycle(given(models["seed"], lora, tmp_path / "damaged"), tmp_path / "out" / "mixture")
    assert not names(tmp_path / "out")


def test_interrupted_while_merging(siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = siblings("llama")["seed"]
    lora = adapter(seed, tmp_path / "lora")
    (tmp_path / "out").mkdir()
    save = AutoModelForCausalLM.from_pretrained(seed).__class__.save_pretrained

    def saved_and_interrupted(self: Any, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", saved_and_interrupted)
    with pytest.raises(KeyboardInterrupt):
        branchmix.upcycle(given(seed, lora), tmp_path / "out" / "mixture")
    assert not names(tmp_path / "out")


def test_a_dry_run_loads_no_model_and_needs_no_peft(
    siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = siblings("llama")["seed"]
    lora = adapter(seed, tmp_path / "lora")
    (tmp_path / "out").mkdir()
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    planned = branchmix.upcycle(given(seed, lora), tmp_path / "out" / "mixture", dry_run=True)
    assert [source.name for source in planned.plan.sources] == ["seed", "expert-0"]
    assert not names(tmp_path / "out")
    with pytest.raises(BranchMixError, match=r"needs peft: pip install 'branchmix\[lora\]'"):
        branchmix.upcycle(given(seed, lora), tmp_path / "out" / "mixture")
    assert not names(tmp_path / "out")


OF_EMBEDDINGS = {
    "LoRA on the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both": {"target_modules": ["lm_head", "embed_tokens"]},
    "LoRA on both, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "whole output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both whole, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    "some tokens of the output layer": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}},
    "other tokens of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]},
    },
    "the same tokens of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]},
    },
}
TRAINS_BOTH_ALIKE = {"LoRA on both, tied", "both whole, tied", "some tokens", "the same tokens of each"}


def of_embeddings(seed: Path, folder: Path, options: dict[str, Any]) -> Path:
    """An adapter whose trained parameters are all random, saved as peft saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    tuned.save_pretrained(folder)
    return folder


def untied(seed: Path, folder: Path) -> Path:
    """The seed with two matrices, made as the error message says."""
    model = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32, tie_word_embeddings=False)
    model.get_output_embeddings().weight.data = model.get_input_embeddings().weight.data.clone()
    model.save_pretrained(folder)
    return folder


def peft_logits(seed: Path, lora: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(seed, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, lora).eval()(tokens()).logits


def soup_logits(seed: Path, lora: Path, out: Path) -> torch.Tensor:
    """Logits of a soup of the adapter and itself, which is the merged adapter."""
    branchmix.upcycle(given(seed, lora, lora, attention="average", ffn="average", include_seed=False), out)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(tokens()).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", OF_EMBEDDINGS)
def test_adapters_of_the_embeddings_of_a_tied_seed(kind: str, family: str, siblings: Siblings, tmp_path: Path) -> None:
    """peft's logits, or a refusal that says what to do; after that, peft's logits."""
    seed = siblings(family, tie_word_embeddings=True)["seed"]
    text = json.dumps(OF_EMBEDDINGS[kind])
    if family == "gpt2":
        text = text.replace("embed_tokens", "wte").replace("q_proj", "c_attn")
    lora = of_embeddings(seed, tmp_path / "lora", json.loads(text))
    if kind in TRAINS_BOTH_ALIKE and not (family == "gpt2" and "tied" in kind):  # peft ties llama's names only
        near(soup_logits(seed, lora, tmp_path / "soup"), peft_logits(seed, lora))
        assert json.loads((tmp_path / "soup" / "config.json").read_text())["tie_word_embeddings"] is not False
        return
    for dry_run in (True, False):
        with pytest.raises(BranchMixError, match=r"expert-0.* apart, but .* one matrix: untie") as caught:
            branchmix.upcycle(given(seed, lora), tmp_path / "soup", dry_run=dry_run)
        assert len(str(caught.value).splitlines()) == 1
    own = untied(seed, tmp_path / "untied")
    near(soup_logits(own, lora, tmp_path / "soup"), peft_logits(seed, lora))
