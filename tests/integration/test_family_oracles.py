"""Each claim about the mixture against its oracle, over every family and both kinds of attention experts (fp32)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import branchmix
from branchmix.checkpoint.families import families
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.errors import VerificationError
from branchmix.upcycling.verify import _dense, verify_plan
from families import BY_NAME, NAMES
from mixtures import BOTH, close, load, recipe, tokens
from naive import build_naive

FOLDABLE = [name for name in NAMES if BY_NAME[name].gains_only and BY_NAME[name].model_type in families()]
Siblings = Callable[..., dict[str, Path]]


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_identical_experts_are_the_seed(name: str, attention: str, siblings: Siblings, tmp_path: Path) -> None:
    seed_folder = siblings(name)["seed"]
    out = tmp_path / "mixture"
    options = {"seed": str(seed_folder), "seed_copies": 2, "attention": attention, "routing": {"ffn": {"soft": True}}}
    branchmix.upcycle({**options, "router_init": {"std": 0.5}}, out)
    mixture, seed = load(out), load(seed_folder)
    ids = tokens()
    with torch.no_grad():
        close(mixture(ids).logits, seed(ids).logits)
        generated = [
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
            )
            for model in (mixture, seed)
        ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_wide_equals_the_naive_sum_and_so_do_gradients(
    name: str, attention: str, siblings: Siblings, tmp_path: Path
) -> None:
    models = siblings(name)
    out = tmp_path / "mixture"
    score = "sigmoid" if attention == "kv_sharing" else "softmax"
    routing = {"ffn": {"top_k": 2, "normalize": True, "score": score}}
    given = recipe(models, attention=attention, routing=routing, routed_scaling_factor=1.3)
    report = branchmix.upcycle(given, out)
    mixture = load(out)
    index = CheckpointIndex.open(out)
    dense = [_dense(report.plan, index, expert, number) for number, expert in enumerate(report.plan.sources)]
    naive = build_naive(mixture, dense)
    ids = tokens()
    ours = mixture(ids, labels=ids, use_cache=False)
    theirs = naive(ids, labels=ids, use_cache=False)
    close(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    _compare_gradients(mixture, naive)


def _compare_gradients(mixture: Any, naive: Any) -> None:
    close(mixture.get_input_embeddings().weight.grad, naive.get_input_embeddings().weight.grad)
    layout, conv1d = mixture.config.layout, mixture.config.seed_config.model_type == "gpt2"
    for wide, loop in zip(
        mixture.model.get_submodule(layout["layers"]), naive.get_submodule(layout["layers"]), strict=True
    ):
        attention, naive_attention = getattr(wide, layout["attention"]), getattr(loop, layout["attention"])
        close(attention.expert_gate.weight.grad, naive_attention.router.grad)
        ffn, naive_ffn = getattr(wide, layout["ffn"]), getattr(loop, layout["ffn"])
        close(ffn.gate.weight.grad, naive_ffn.router.grad)
        down = layout["down"].split(".")[-1]
        for number, expert in enumerate(naive_ffn.experts):
            grad = getattr(expert, down).weight.grad
            close(ffn.experts.down_proj.grad[number], grad.T if conv1d else grad)
        # o_proj's columns of the first expert: (expert, head) for Expert KV, (kv head, expert, group) for Shared KV.
        output = getattr(naive_attention.experts[0], layout["output"]).weight.grad
        output = output.T if conv1d else output
        columns = attention.o_proj.weight.grad.unflatten(1, attention.order.pieces)
        close(columns[:, :, 0].flatten(1), output)


@pytest.mark.of_every_family(attention="kv_experts")
@pytest.mark.parametrize("attention", (*BOTH, "average", "seed"))
@pytest.mark.parametrize("name", NAMES)
def test_gates_on_one_expert_give_that_dense_model(
    name: str, attention: str, siblings: Siblings, tmp_path: Path
) -> None:
    report = branchmix.upcycle(recipe(siblings(name), attention=attention), tmp_path / "mixture", verify=True)
    assert report.verification is not None and len(report.verification.experts) == 3
    for check in report.verification.experts:
        assert check.skipped is None
        assert check.max_difference <= 1e-5 * max(1.0, check.max_logit), check.name


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_norms_keep_each_model_its_own(name: str, attention: str, siblings: Siblings, tmp_path: Path) -> None:
    given = recipe(siblings(name), attention=attention, merge={"method": "average", "fold_norms": True})
    report = branchmix.upcycle(given, tmp_path / "mixture", verify=True)
    assert report.verification is not None
    for check in report.verification.experts:
        assert check.max_difference <= 2e-5 * max(1.0, check.max_logit), check.name


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_reloaded_is_the_same(name: str, attention: str, siblings: Siblings, tmp_path: Path) -> None:
    branchmix.upcycle(recipe(siblings(name), attention=attention), tmp_path / "mixture")
    first = load(tmp_path / "mixture")
    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again")
    written = {n: r.shape for n, r in CheckpointIndex.open(tmp_path / "mixture").tensors.items()}
    assert {n: r.shape for n, r in CheckpointIndex.open(tmp_path / "again").tensors.items()} == written
    with torch.no_grad():
        assert torch.equal(first(tokens()).logits, second(tokens()).logits)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_cached_equals_uncached(name: str, attention: str, siblings: Siblings, tmp_path: Path) -> None:
    branchmix.upcycle(recipe(siblings(name), attention=attention), tmp_path / "mixture")
    mixture = load(tmp_path / "mixture")
    ids = tokens(length=12)
    with torch.no_grad():
        full = mixture(ids, use_cache=False).logits
        out = mixture(ids[:, :5], use_cache=True)
        steps = [out.logits]
        for position in range(5, 12):
            out = mixture(ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    close(torch.cat(steps, dim=1), full)


@pytest.mark.parametrize("name", NAMES)
def test_eager_equals_the_fast_implementations(name: str, siblings: Siblings, tmp_path: Path) -> None:
    given = recipe(siblings(name), routing={"ffn": {"top_k": 2}}, attention="kv_sharing")
    branchmix.upcycle(given, tmp_path / "mixture")
    ids = tokens()
    with torch.no_grad():
        eager = load(tmp_path / "mixture", attn_implementation="eager", experts_implementation="eager")(ids).logits
        for experts in ("grouped_mm", "batched_mm"):
            close(load(tmp_path / "mixture", experts_implementation=experts)(ids).logits, eager)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt-neox"])
def test_verification_holds_in_16_bits(
    name: str, attention: str, dtype: str, siblings: Siblings, tmp_path: Path
) -> None:
    """The output is narrower than its sources here: copies are casts, and the dense side must be cast alike."""
    given = recipe(siblings(name), attention=attention, dtype=dtype)
    report = branchmix.upcycle(given, tmp_path / "mixture", verify=True)
    assert report.verification is not None
    for check in report.verification.experts:
        assert check.max_difference <= 1e-5 * max(1.0, check.max_logit), check.name
    if name != "gpt-neox":
        branchmix.upcycle({**given, "merge": {"fold_norms": True}}, tmp_path / "folded", verify=True)


def test_verification_can_fail(siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture whose experts stand in another order than its plan says is found out, and leaves nothing behind."""
    from branchmix.upcycling import plan as planning

    right = planning.attention_tensors

    def swapped(experts: Any, *args: Any, **kwargs: Any) -> Any:
        return right([*experts[1:], experts[0]], *args, **kwargs)

    monkeypatch.setattr(planning, "attention_tensors", swapped)
    with pytest.raises(VerificationError, match="with the gates on expert 'seed'"):
        branchmix.upcycle(recipe(siblings("llama")), tmp_path / "mixture", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verification_finds_a_flipped_bit(siblings: Siblings, tmp_path: Path) -> None:
    report = branchmix.upcycle(recipe(siblings("llama")), tmp_path / "mixture")
    ref = CheckpointIndex.open(tmp_path / "mixture").tensors["model.model.layers.1.mlp.experts.2.up_proj.weight"]
    with ref.file.open("r+b") as file:
        file.seek(ref.offset + 5)
        byte = file.read(1)
        file.seek(ref.offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(VerificationError, match=r"experts\.2\.up_proj\.weight: differs from its source bytes"):
        verify_plan(report.plan, tmp_path / "mixture")
