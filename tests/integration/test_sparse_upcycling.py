"""Sparse upcycling: experts that are copies of the seed, and what may be done so that they differ from the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import branchmix
from branchmix.checkpoint.families import families, squares_activation
from checkpoints import Tensors, config, ffn_expert, weights
from families import BY_NAME
from mixtures import load, recipe, tokens

Siblings = Callable[..., dict[str, Path]]


def copies(name: str, siblings: Siblings, out: Path, **options: Any) -> Tensors:
    given = {"seed": str(siblings(name)["seed"]), "seed_copies": 3, **options}
    branchmix.upcycle(given, out)
    return weights(out)


def test_sparse_upcycling_copies_the_seed(siblings: Siblings, tmp_path: Path) -> None:
    seed = weights(siblings("llama")["seed"])
    found = copies("llama", siblings, tmp_path / "a", attention="average")
    for number in range(4):
        for matrix, value in ffn_expert(found, number).items():
            assert torch.equal(value, seed[f"model.layers.0.mlp.{matrix}"])
    assert torch.equal(found["model.model.embed_tokens.weight"], seed["model.embed_tokens.weight"])
    only = copies("llama", siblings, tmp_path / "b", attention="average", include_seed=False)
    assert config(tmp_path / "b")["expert_names"] == ["seed-copy-1", "seed-copy-2", "seed-copy-3"]
    assert torch.equal(only["model.model.embed_tokens.weight"], seed["model.embed_tokens.weight"])


@pytest.mark.parametrize(("name", "root"), [("llama", 3), ("phi3", 3), ("nemotron", 3), ("gpt2", 2)])
def test_weight_scaling_is_the_root_of_n_over_k(name: str, root: int, siblings: Siblings, tmp_path: Path) -> None:
    """NVIDIA's cube root for gated FFNs; Nemotron's plain one squares in its activation, which counts as a third."""
    options: dict[str, Any] = {"attention": "average", "routing": {"ffn": {"top_k": 2}}}
    plain = copies(name, siblings, tmp_path / "plain", **options)
    scaled = copies(name, siblings, tmp_path / "scaled", sparse_upcycling={"weight_scaling": True}, **options)
    for matrix, value in ffn_expert(scaled, 2).items():
        power = root if matrix == "down_proj.bias" else 1
        wanted = ffn_expert(plain, 2)[matrix] * 2.0 ** (power / root)
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)
    assert scaled.keys() == plain.keys()
    given = copies(name, siblings, tmp_path / "given", sparse_upcycling={"weight_scaling": 2.0}, **options)
    torch.testing.assert_close(ffn_expert(given, 1)["down_proj.weight"], ffn_expert(plain, 1)["down_proj.weight"] * 2)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("opt", {}),
        ("nemotron", {}),
        ("nemotron", {"hidden_act": "left out"}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"hidden_act": "relu2"}),
    ],
)
def test_weight_scaling_with_raw_uniform_gates_is_the_seed(name: str, changes: dict[str, str], tmp_path: Path) -> None:
    """Activations without a curve scale exactly: raw top-k gates of 1/N then give the seed's own logits."""
    left_out = "left out" in changes.values()
    seed = BY_NAME[name].save(tmp_path / "seed", 0, **({} if left_out else changes))
    if left_out:
        content = config(seed)
        del content["hidden_act"]
        (seed / "config.json").write_text(json.dumps(content))
    options = {"attention": "seed", "sparse_upcycling": {"weight_scaling": True}, "routing": {"ffn": {"top_k": 2}}}
    branchmix.upcycle({"seed": str(seed), "seed_copies": 4, **options}, tmp_path / "out")
    mixture, dense = load(tmp_path / "out"), load(seed)
    with torch.no_grad():
        for parameter_name, parameter in mixture.named_parameters():
            if parameter_name.endswith(".gate.weight"):
                parameter.zero_()
        wanted = dense(tokens()).logits
        torch.testing.assert_close(mixture(tokens()).logits, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_families_that_square_by_default() -> None:
    for name in families().keys() & CONFIG_MAPPING.keys():
        default = getattr(CONFIG_MAPPING[name](), "hidden_act", None)
        assert squares_activation({"model_type": name}) == (default == "relu2"), name


@pytest.mark.parametrize("name", ("llama", "phi3", "gpt2"))
def test_redrawn_units_are_one_experts_own(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """Drop-Upcycling: gate, up and down of an expert lose the same inner units, another expert others."""
    models = siblings(name)
    options: dict[str, Any] = {"seed_copies": 2, "attention": "average"}
    branchmix.upcycle(recipe(models, **options), tmp_path / "plain")
    options["sparse_upcycling"] = {"redraw_fraction": 0.5}
    branchmix.upcycle(recipe(models, **options), tmp_path / "redrawn")
    plain, redrawn = weights(tmp_path / "plain"), weights(tmp_path / "redrawn")
    units = []
    for number in (0, 3, 4):  # the seed and its copies
        changed = []
        for matrix, old in ffn_expert(plain, number).items():
            new, down = ffn_expert(redrawn, number)[matrix], matrix.startswith("down_proj")
            if matrix.endswith(".bias"):
                assert torch.equal(new, old)
                continue
            differs = (new != old).transpose(0, 1) if down else new != old
            rows = differs.any(1)
            assert rows.sum() == 24 and differs[rows].all(), matrix  # half of 48, and nothing of the others
            axis = 1 if down else 0
            ours, theirs = (value.index_select(axis, rows.nonzero()[:, 0]) for value in (new, old))
            assert abs(float(ours.mean() - theirs.mean())) < 4 * float(theirs.std()) / ours.numel() ** 0.5
            assert float(ours.std() / theirs.std()) == pytest.approx(1, abs=0.15)
            changed.append(rows)
        assert len(changed) == (2 if name == "gpt2" else 3)
        assert all(torch.equal(rows, changed[0]) for rows in changed)
        units.append(changed[0])
    assert len({tuple(rows.tolist()) for rows in units}) == 3
    for number in (1, 2):  # code and math have been trained: they stay
        for matrix, old in ffn_expert(plain, number).items():
            assert torch.equal(ffn_expert(redrawn, number)[matrix], old)
