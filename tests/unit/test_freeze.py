"""What is frozen stays bit for bit under AdamW with weight decay; what is not, moves: for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import Trainer, TrainingArguments

from branchmix.checkpoint.index import CheckpointIndex
from branchmix.errors import RecipeError
from branchmix.models.routing_branchmix import BranchMixRouter
from branchmix.train import config, trained_parts
from branchmix.upcycling.sources import DenseExpert
from families import BY_NAME, NAMES
from mixtures import BOTH, random_mixture, tokens


def names_of(model: Any, wanted: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if wanted(parameter)}


def trained(model: Any) -> set[str]:
    return names_of(model, lambda parameter: parameter.requires_grad)


def routers(model: Any) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BranchMixRouter)}


def test_parts_are_those_of_the_run_file() -> None:
    (allowed,) = get_args(config.RunConfig.model_fields["freeze"].annotation)
    assert set(get_args(allowed)) == set(trained_parts._PARTS)


@pytest.mark.parametrize("attention", (*BOTH, "average"))
@pytest.mark.parametrize("name", NAMES)
def test_experts_of_every_family(name: str, attention: str) -> None:
    """Told apart by what a dense model has too: blocks' other parts keep their names in a mixture."""
    model = random_mixture(name, attention)
    layout = model.config.layout
    ffns = {layout["ffn"], layout["up"].split(".")[0]}
    behind = ffns if attention == "average" else ffns | {layout["attention"]}
    expected = set()
    for path in names_of(model, lambda _: True) - routers(model):
        module = path.removeprefix(f"model.{layout['layers']}.").split(".")[1]
        if not path.startswith(f"model.{layout['layers']}.") or module not in behind:
            expected.add(path)
    trained_parts.freeze(model, ["experts"])
    assert trained(model) == expected | routers(model)
    assert name in ("olmo", "nanochat") or any(
        "norm" in path or "ln_" in path for path in trained(model)
    )  # theirs have no gains


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_attention_and_embeddings_of_every_family(name: str, dense: bool) -> None:
    model = BY_NAME[name].model(0) if dense else random_mixture(name)
    everything = trained(model)
    trained_parts.freeze(model, ["attention"])
    gone = everything - trained(model)
    assert not gone & routers(model)
    assert not {path for path in gone if "mlp" in path or "experts" in path or "embed" in path or "wte" in path}
    words = {path.removesuffix(".weight").split(".")[-1] for path in gone}
    assert words & {"o_proj", "dense", "out_proj", "c_proj"}
    assert words & {"q_proj", "qkv_proj", "query_key_value", "c_attn"}
    before = trained(model)
    trained_parts.freeze(model, ["embeddings"])
    tables = [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]
    assert before - trained(model) == names_of(model, lambda parameter: any(parameter is table for table in tables))


@pytest.mark.parametrize("name", NAMES)
def test_trunk_is_what_the_experts_of_every_family_share(name: str, tmp_path: Path) -> None:
    """What is trained with a frozen trunk is exactly what an expert brings into a mixture."""
    dense, model = BY_NAME[name].model(0), random_mixture(name)
    dense.save_pretrained(tmp_path)
    owned = DenseExpert.open(name, CheckpointIndex.open(tmp_path)).expert_tensors(attention=True, ffn=True)
    everything = trained(dense)
    trained_parts.freeze(dense, ["trunk"])
    assert trained(dense) == everything & owned
    layers = f"{model.config.layout['layers']}."
    trained_parts.freeze(model, ["trunk"])
    assert trained(model) >= routers(model) and all(layers in path for path in trained(model))


@pytest.mark.parametrize("attention", (*BOTH, "average"))
def test_all_but_routers(attention: str) -> None:
    model = random_mixture("gpt2", attention)
    trained_parts.freeze(model, ["all_but_routers"])
    assert trained(model) == routers(model)
    kinds = 1 if attention == "average" else 2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == kinds * 2 * 3 * 32


@pytest.mark.parametrize("part", ["experts", "all_but_routers"])
def test_dense_models_have_no_experts(part: str) -> None:
    with pytest.raises(
        RecipeError, match=f"freeze: {part} applies to mixtures, but the llama model has no routers"
    ) as caught:
        trained_parts.freeze(BY_NAME["llama"].model(0), [part])
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_left_to_train() -> None:
    model = BY_NAME["llama"].model(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name or "embed" in name)
    with pytest.raises(RecipeError, match="with attention and embeddings frozen, the llama model has nothing left"):
        trained_parts.freeze(model, ["attention", "embeddings"])


@pytest.mark.parametrize("parts", [["experts"], ["all_but_routers"], ["attention", "embeddings"]])
def test_weight_decay_leaves_frozen_parts_alone(parts: list[str], tmp_path: Path) -> None:
    model = random_mixture("llama")
    trained_parts.freeze(model, parts)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    settings: dict[str, Any] = {"weight_decay": 0.5, "learning_rate": 1e-2, "max_steps": 2}
    settings |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **settings)
    Trainer(model=model, args=args, train_dataset=rows).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained(model) and moved != before.keys()
