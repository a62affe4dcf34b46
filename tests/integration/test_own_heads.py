"""A config that ties the embeddings, and weights that don't: what transformers makes of them is what is merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import branchmix
from branchmix.accounting.inspection import inspect
from branchmix.errors import CompatibilityError
from checkpoints import Tensors
from families import BY_NAME
from mixtures import close, load, recipe, tokens

EMBEDDINGS = {
    "llama-bias": "model.embed_tokens.weight",
    "gemma": "model.embed_tokens.weight",
    "phi": "model.embed_tokens.weight",
    "gptj": "transformer.wte.weight",
    "gpt2": "transformer.wte.weight",
    "falcon": "transformer.word_embeddings.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "gpt-neox": "gpt_neox.embed_in.weight",
    "helium": "model.embed_tokens.weight",
}
HEADS = {"gpt-neox": "embed_out.weight"}
WEIGHTS = "model.safetensors"
Edit = Callable[[Tensors, str, str], object]


def edited(folder: Path, name: str, edit: Edit | None, seed: int = 0) -> Path:
    """A tied model of a family, whose stored tensors are edited: ``edit(tensors, embeddings, head)``."""
    BY_NAME[name].save(folder, seed, tie_word_embeddings=True)
    tensors = load_file(folder / WEIGHTS)
    if edit is not None:
        edit(tensors, EMBEDDINGS[name], HEADS.get(name, "lm_head.weight"))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def other_head(tensors: Tensors, embeddings: str, head: str) -> None:
    noise = torch.randn(tensors[embeddings].shape, generator=torch.Generator().manual_seed(9))
    tensors[head] = tensors[embeddings] + 0.3 * noise


def same_head(tensors: Tensors, embeddings: str, head: str) -> None:
    tensors[head] = tensors[embeddings].clone()


def wider_head(tensors: Tensors, embeddings: str, head: str) -> None:
    """Stored in other dtypes, with the same values."""
    tensors[embeddings] = tensors[embeddings].bfloat16()
    tensors[head] = tensors[embeddings].float()


def only_head(tensors: Tensors, embeddings: str, head: str) -> None:
    tensors[head] = tensors.pop(embeddings)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(tokens()).logits


def soup(folder: Path, out: Path) -> Path:
    """A model averaged with itself."""
    models = {"seed": str(folder), "experts": [{"name": "x", "model": str(folder)}]}
    branchmix.upcycle({**models, "attention": "average", "ffn": "average"}, out)
    return out


@pytest.mark.parametrize("edit", [other_head, same_head, wider_head, only_head], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_soup_of_a_model_and_itself_is_the_model(name: str, edit: Edit, tmp_path: Path) -> None:
    model = edited(tmp_path / "model", name, edit)
    close(logits(soup(model, tmp_path / "soup")), logits(model))
    config = json.loads((tmp_path / "soup" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (edit is not other_head)
    stored = load_file(tmp_path / "soup" / WEIGHTS)
    assert (HEADS.get(name, "lm_head.weight") in stored) == (edit is other_head)
    tied = edited(tmp_path / "tied", name, None)
    more = stored[EMBEDDINGS[name]].numel() if edit is other_head else 0
    for folder in (model, tmp_path / "soup"):  # before and after
        counted = inspect(folder)
        assert counted.stored == counted.total.total == inspect(tied).total.total + more


@pytest.mark.parametrize("attention", ["kv_experts", "average"])
def test_mixtures_and_their_children_keep_the_output_layer(attention: str, tmp_path: Path) -> None:
    models = {name: edited(tmp_path / name, "llama-bias", other_head, i) for i, name in enumerate(("seed", "a", "b"))}
    given = recipe(models, attention=attention)
    report = branchmix.upcycle(given, tmp_path / "mixture", verify=True)
    assert report.verification is not None
    for check in report.verification.experts:
        assert check.max_difference <= 1e-5 * max(1.0, check.max_logit), check.name
    assert sum("config.json ties the output layer" in note for note in report.plan.notes) == 3
    mean = torch.stack([load_file(path / WEIGHTS)["lm_head.weight"].double() for path in models.values()]).mean(0)
    close(load(tmp_path / "mixture").get_output_embeddings().weight, mean.float())
    child = branchmix.add_expert(tmp_path / "mixture", "c", models["a"], tmp_path / "more")
    assert child.plan.config["tie_word_embeddings"] is False
    close(load(tmp_path / "more").get_output_embeddings().weight, mean.float())
    branchmix.export_model(tmp_path / "mixture", tmp_path / "dense", to="dense", expert="a")
    close(load(tmp_path / "dense").get_output_embeddings().weight, mean.float())


def test_a_mixture_whose_own_output_layer_was_trained(tmp_path: Path) -> None:
    """An adapter of the output layer merged into a tied mixture: experts that leave take nothing of it along."""
    models = {name: edited(tmp_path / name, "llama-bias", None, i) for i, name in enumerate(("seed", "a", "b"))}
    mixture = tmp_path / "mixture"
    branchmix.upcycle(recipe(models, routing={"ffn": {"soft": True}}), mixture)
    tensors = load_file(mixture / WEIGHTS)
    other_head(tensors, "model.model.embed_tokens.weight", "model.lm_head.weight")
    save_file(tensors, mixture / WEIGHTS, metadata={"format": "pt"})
    assert inspect(mixture).stored == inspect(mixture).total.total
    branchmix.remove_expert(mixture, "b", tmp_path / "less")
    config = json.loads((tmp_path / "less" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["seed_config"]["tie_word_embeddings"] is False
    close(load(tmp_path / "less").get_output_embeddings().weight, tensors["model.lm_head.weight"])


def shard(folder: Path) -> None:
    """The output layer in a file of its own."""
    tensors = load_file(folder / WEIGHTS)
    files = {name: f"model-0000{1 + (name == 'lm_head.weight')}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / WEIGHTS).unlink()


def test_shards_and_base_models_are_compared_too(tmp_path: Path) -> None:
    model = edited(tmp_path / "model", "llama-bias", other_head)
    wanted = logits(model)
    shard(model)
    close(logits(soup(model, tmp_path / "soup")), wanted)
    bare = edited(tmp_path / "bare", "llama-bias", other_head)
    tensors = {name.removeprefix("model."): value for name, value in load_file(bare / WEIGHTS).items()}
    save_file(tensors, bare / WEIGHTS, metadata={"format": "pt"})
    close(logits(soup(bare, tmp_path / "other")), wanted)


@pytest.mark.parametrize(("who", "words"), [("seed", "tied, but the seed's are untied"), ("a", "untied .*'s are tied")])
def test_one_side_tied_is_refused_with_the_reason(who: str, words: str, tmp_path: Path) -> None:
    edits = {who: other_head}
    models = {name: edited(tmp_path / name, "llama-bias", edits.get(name)) for name in ("seed", "a")}
    with pytest.raises(CompatibilityError, match=f"(?s)expert 'a': .*{words}.*untie the tied one") as caught:
        branchmix.upcycle(recipe(models), tmp_path / "out")
    assert "its config.json ties them, but the weights of the two differ" in str(caught.value)
    assert not any("lm_head" in problem for problem in caught.value.problems[1:])


def test_families_tie_by_default_as_their_classes_do() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from branchmix.checkpoint.families import families, is_tied

    inferred = {family.model_type for family in BY_NAME.values()} | {"ernie4_5", "granite_swa", "vaultgemma"}
    for model_type in sorted({*families(), *inferred}):
        made: Any = CONFIG_MAPPING[model_type]()
        assert is_tied({"model_type": model_type}) == bool(made.tie_word_embeddings), model_type
