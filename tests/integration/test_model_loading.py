"""Fresh parameters, loading, dtypes and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

import branchmix
from branchmix.models import mixture_config
from branchmix.models.modeling_branchmix import BranchMixForCausalLM, BranchMixModel
from branchmix.models.routers import one_hot_gates
from branchmix.models.routing_branchmix import BranchMixRouter
from families import BY_NAME, NAMES
from mixtures import BOTH, close, load, random_mixture, recipe, tokens

Siblings = Callable[..., dict[str, Path]]


def fresh_config(name: str, attention: str) -> Any:
    """Wide enough that a standard deviation tells one initialisation from another."""
    width = "n_embd" if BY_NAME[name].model_type in ("gpt2", "gptj", "codegen", "gpt_bigcode") else "hidden_size"
    width = "d_model" if BY_NAME[name].model_type == "xglm" else width
    seed_config = BY_NAME[name].config(**{width: 64})
    return mixture_config(seed_config, num_experts=3, attention=attention, initializer_range=0.05)


def check_fresh(model: Any, names: set[str] | None = None) -> None:
    """Matrices as the family draws them, routers N(0, 0.05^2), gains 1 (or an offset of 0), biases 0.

    torch's own default for linear layers would have a deviation of 0.07 here, and unset memory anything.
    """
    routers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BranchMixRouter)}
    seed_config = model.config.seed_config
    family_std = getattr(seed_config, "init_std", None) or seed_config.initializer_range
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        assert parameter.isfinite().all(), name
        values = parameter.unique()
        if len(values) == 1:
            assert values.item() in (0.0, 1.0) or "act_fn" in name, name
            assert "bias" in name or "norm" in name or "ln_" in name or "act_fn" in name, name
        else:
            std = 0.05 if name in routers else family_std
            assert 0.75 * std < parameter.std() < 1.25 * std, (name, float(parameter.std()))


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_from_its_config_has_every_parameter_drawn(name: str, attention: str) -> None:
    torch.manual_seed(0)
    check_fresh(AutoModelForCausalLM.from_config(fresh_config(name, attention)))


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_checkpoint_lacks_is_drawn_and_the_rest_left_alone(name: str, attention: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BranchMixForCausalLM(fresh_config(name, attention))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    block = f"model.{model.config.layout['layers']}.1."
    save_file(
        {n: t for n, t in saved.items() if not n.startswith(block)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    missing = set(info["missing_keys"])
    assert missing == {n for n in model.state_dict() if n.startswith(block)}
    check_fresh(again, missing)
    parameters = dict(again.named_parameters())
    for n, parameter in model.named_parameters():
        assert n in missing or torch.equal(parameters[n], parameter), n


def test_missing_routers_are_drawn(tmp_path: Path) -> None:
    model = random_mixture("llama", initializer_range=0.05, seed_changes={"hidden_size": 128})
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in saved.items() if "gate.weight" not in n}
    assert len(saved) - len(kept) == 4
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 4
    check_fresh(again, set(info["missing_keys"]))


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_base_model_loads_from_a_causal_lm_checkpoint(name: str, attention: str, tmp_path: Path) -> None:
    model = random_mixture(name, attention)
    model.save_pretrained(tmp_path)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is BranchMixModel
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("head" in key or "embed_out" in key for key in info["unexpected_keys"]), info["unexpected_keys"]
    with torch.no_grad():
        hidden = model(tokens(), output_hidden_states=True).hidden_states[-1]
        out = base(tokens(), output_router_logits=True)
    close(out.last_hidden_state, hidden)
    assert len(out.router_logits) == len(out.attention_router_logits) == 2
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(tokens()).last_hidden_state, out.last_hidden_state)


@pytest.mark.parametrize("name", [name for name in NAMES if BY_NAME[name].config().tie_word_embeddings])
def test_tied_embeddings_stay_tied(name: str, tmp_path: Path) -> None:
    random_mixture(name).save_pretrained(tmp_path)
    for model in (random_mixture(name), load(tmp_path)):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    names = load_file(tmp_path / "model.safetensors")
    assert not any("lm_head" in n or "embed_out" in n for n in names)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("cohere", "logit_scale"), ("granite", "logits_scaling"), ("gemma2", "final_logit_softcapping")],
)
def test_what_a_family_does_to_its_logits_is_in_the_config(name: str, factor: str) -> None:
    """TRL computes logits from hidden states, with what it finds there."""
    config = random_mixture(name).config
    assert getattr(config, factor) == getattr(config.seed_config, factor)


@pytest.mark.parametrize("name", NAMES)
def test_resized_embeddings_work_save_and_load(name: str, tmp_path: Path) -> None:
    model = random_mixture(name)
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(103)
        after = model(ids, labels=ids)
    assert after.logits.shape[-1] == 103 and model.config.vocab_size == 103
    close(after.logits[..., :97], before, 1e-6)
    close(after.loss, F.cross_entropy(after.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids).logits, after.logits)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere", "gpt-neox", "gpt2", "opt", "olmo2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fp32_rounded(
    dtype: torch.dtype, name: str, attention: str, siblings: Siblings, tmp_path: Path
) -> None:
    """With routing fixed, since a rounded router may choose another expert: then outputs differ by roundings only.

    Two layers keep the error below 16 half-steps of the greatest logit: 6 % in bfloat16, 0.8 % in float16.
    """
    branchmix.upcycle(recipe(siblings(name), attention=attention), tmp_path / "mixture")
    half, full = load(tmp_path / "mixture", dtype=dtype), load(tmp_path / "mixture")
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    for expert in range(3):
        with torch.no_grad(), one_hot_gates(full, expert), one_hot_gates(half, expert):
            exact, rounded = full(tokens()).logits, half(tokens()).logits
        assert rounded.dtype == dtype
        close(rounded.float(), exact, 16 * torch.finfo(dtype).eps / 2)
