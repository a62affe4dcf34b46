"""What ``docs/families.md`` says of every causal type of transformers, and of models that are not quite causal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import branchmix
from branchmix.accounting import inspect
from branchmix.checkpoint.families import families
from branchmix.errors import CheckpointError, CompatibilityError
from families import BY_NAME
from mixtures import close, load, recipe, tokens

DOCS = Path(__file__).parent.parent.parent / "docs"
sys.path.insert(0, str(DOCS))
import causal_types  # noqa: E402

Siblings = Callable[..., dict[str, Path]]
FOUND = causal_types.read()


@pytest.fixture
def same_transformers() -> None:
    if transformers.__version__ != FOUND["transformers"]:
        pytest.skip(f"the list is of transformers {FOUND['transformers']}: python docs/generate.py families")


def test_the_list_has_every_type(same_transformers: None) -> None:
    variants = {name for name in FOUND["types"] if "," in name}
    assert FOUND["types"].keys() - variants == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {name.split(",")[0] for name in variants} == set(causal_types.DENSE_VARIANTS)


def test_every_family_of_the_table_works() -> None:
    working = {name.split(",")[0] for name, result in FOUND["types"].items() if result == "works"}
    assert working >= set(families())


def test_reasons_are_those_that_the_code_gives(same_transformers: None) -> None:
    """Of all types that their default config rules out; the slow test below has the others."""
    given = {name: causal_types.refusal(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    ruled_out = {name: reason for name, reason in given.items() if reason is not None}
    assert len(ruled_out) > 100
    assert {name: FOUND["types"][name] for name in ruled_out} == ruled_out
    assert all("\n" not in reason for reason in ruled_out.values())


@pytest.mark.slow
def test_trying_again_gives_the_same(same_transformers: None) -> None:
    assert causal_types.survey() == FOUND


def test_cross_attention_is_refused_and_counted_from_weights(tmp_path: Path) -> None:
    for seed, name in enumerate(("seed", "code")):
        BY_NAME["gpt2"].save(tmp_path / name, seed, add_cross_attention=True)
    models = {name: tmp_path / name for name in ("seed", "code")}
    with pytest.raises(CompatibilityError, match="seed: gpt2 has cross-attention"):
        branchmix.upcycle(recipe(models), tmp_path / "mixture")
    model = BY_NAME["gpt2"].model(0, add_cross_attention=True)
    assert inspect(tmp_path / "seed").total.total == sum(p.numel() for p in model.parameters())
    with pytest.raises(CheckpointError, match="gpt2 has cross-attention"):
        inspect(model.config.to_dict())


def test_bidirectional_attention_is_as_in_the_seed(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("gemma3", use_bidirectional_attention=True)
    report = branchmix.upcycle(recipe(models), tmp_path / "mixture", verify=True)
    assert any("not causal (use_bidirectional_attention: true)" in note for note in report.plan.notes)
    ids = tokens(length=12)
    for model in (load(models["seed"]), load(tmp_path / "mixture")):
        with torch.no_grad():
            full = model(ids, use_cache=False).logits
            first = model(ids[:, :6], use_cache=True)
            rest = model(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
        assert (torch.cat([first.logits, rest.logits], 1) - full).abs().max() > 1e-3


def test_an_activations_tensors_are_shared_by_all_experts(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("apertus")
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    mixture, dense = load(tmp_path / "mixture"), [load(path) for path in models.values()]
    for layer, block in enumerate(mixture.model.model.layers):
        slopes = [model.model.layers[layer].mlp.act_fn.alpha_p for model in dense]
        close(block.mlp.act_fn.alpha_p, torch.stack(slopes).mean(0))
        assert block.mlp.experts.act_fn is block.mlp.act_fn
    bigger = branchmix.add_expert(tmp_path / "mixture", "again", models["code"], tmp_path / "bigger")
    assert bigger.written is not None
    assert torch.equal(
        load(tmp_path / "bigger").model.model.layers[0].mlp.act_fn.alpha_p,
        mixture.model.model.layers[0].mlp.act_fn.alpha_p,
    )


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("apertus", {}), ("glm4_moe", {"n_routed_experts": 4, "moe_intermediate_size": 16}), ("helium", {})],
)
def test_buffers_are_not_counted(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Of a family of the table, of a mixture of experts, and of a family without a formula."""
    model = causal_types.build(model_type, 0, changes)
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.total.total == found.stored == sum(p.numel() for p in model.parameters())


def test_layers_that_predict_further_tokens_are_named(siblings: Siblings, tmp_path: Path) -> None:
    models = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in siblings("llama").items()}
    for path in models.values():
        found = load_file(path / "model.safetensors")
        extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in found.items() if "layers.1." in n}
        save_file({**found, **extra}, path / "model.safetensors", {"format": "pt"})
        config = (path / "config.json").read_text()
        (path / "config.json").write_text(config.replace("{", '{"num_nextn_predict_layers": 1,', 1))
    with pytest.raises(CompatibilityError, match=r"seed: the last 1 of its 3 layers predict further tokens") as error:
        branchmix.upcycle(recipe(models), tmp_path / "mixture")
    assert "config and weights do not belong together" not in str(error.value)


@pytest.mark.parametrize("name", ["vision_tower.blocks.0.attn.weight", "mtp.fc.weight", "v_head.summary.weight"])
def test_parts_that_the_config_does_not_describe_are_refused(name: str, siblings: Siblings, tmp_path: Path) -> None:
    models = {expert: Path(shutil.copytree(path, tmp_path / expert)) for expert, path in siblings("llama").items()}
    for path in models.values():
        found = load_file(path / "model.safetensors")
        save_file({**found, name: torch.ones(2, 3)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompatibilityError, match=f"seed: 1 tensor that llama does not have, first {name}"):
        branchmix.upcycle(recipe(models), tmp_path / "mixture")
    for path in models.values():  # as the message says
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(path)
    branchmix.upcycle(recipe(models), tmp_path / "mixture")


def test_the_text_part_of_a_multimodal_model_can_be_saved_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the example of the docs, as it is printed there."""
    example = (DOCS / "text_part.py").read_text()
    assert example.strip() in (DOCS / "families.md").read_text()
    lines = [line for line in example.splitlines() if "AutoTokenizer.from" not in line]
    text = BY_NAME["gemma3"].config()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    config: Any = CONFIG_MAPPING["gemma3"](text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    folder = tmp_path / "seed"
    folder.mkdir()
    whole.save_pretrained(folder / "multimodal")
    with pytest.raises(CompatibilityError, match="seed: gemma3 is a multimodal model, whose text part is gemma3_text"):
        branchmix.upcycle({"seed": str(folder / "multimodal"), "seed_copies": 2}, tmp_path / "mixture")
    monkeypatch.chdir(folder)
    exec("\n".join(lines), {})
    alone = AutoModelForCausalLM.from_pretrained(folder / "text-only").eval()
    with torch.no_grad():
        close(alone(tokens()).logits, whole(input_ids=tokens()).logits)
    branchmix.upcycle({"seed": str(folder / "text-only"), "seed_copies": 2}, tmp_path / "mixture", verify=True)
