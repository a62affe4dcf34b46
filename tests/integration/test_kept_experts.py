"""A mixture of some of its experts: against forced gates, masked gates, and the memory of the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from branchmix.models.documents_branchmix import _mixed
from branchmix.models.kept_branchmix import chosen_experts, expert_shares, keep_experts, of_kept_experts
from branchmix.models.routers import one_hot_gates
from branchmix.models.routing_branchmix import BranchMixRouter
from families import NAMES
from mixtures import BOTH, close, gated, load, random_mixture, tokens


@pytest.mark.parametrize("attention", (*BOTH, "average"))
@pytest.mark.parametrize("name", NAMES)
def test_one_kept_expert_is_the_mixture_with_forced_gates(name: str, attention: str) -> None:
    mixture, ids = random_mixture(name, attention), tokens()
    for number in range(mixture.config.num_experts):
        kept = keep_experts(mixture, [number])
        with torch.no_grad():
            ours = kept(ids).logits
            with one_hot_gates(mixture, number):
                close(ours, mixture(ids).logits)


@pytest.mark.parametrize("rows", [[0, 2], [1, 2], [0, 1]])
@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", NAMES)
def test_some_kept_experts_are_the_mixture_without_the_others(name: str, attention: str, rows: list[int]) -> None:
    """The whole mixture, its routers' logits of the other experts at minus infinity."""
    mixture, ids = random_mixture(name, attention), tokens()
    gone = [row for row in range(3) if row not in rows]

    def without(module: Any, args: Any, output: Any) -> Any:
        logits = output[0].clone()
        logits[..., gone] = -torch.inf
        gates, index = logits.softmax(-1).topk(min(module.top_k, len(rows)), dim=-1)
        if module.normalize:
            gates = gates / gates.sum(-1, keepdim=True)
        if len(output) == 3:
            return logits, gates, index
        return logits, torch.zeros_like(logits).scatter(-1, index, gates)

    kept = keep_experts(mixture, rows)
    with torch.no_grad():
        ours = kept(ids).logits
        for module in mixture.modules():
            if isinstance(module, BranchMixRouter):
                module.register_forward_hook(without)
        mixture.config.routed_scaling_factor = kept.config.routed_scaling_factor
        close(ours, mixture(ids).logits)


def greedy(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **settings, **options)


@pytest.mark.parametrize("attention", BOTH)
def test_each_prompt_of_a_batch_runs_on_its_own_experts(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against each prompt alone on the mixture of the experts that it keeps."""
    mixture, ids = random_mixture("llama", attention), tokens(4)
    with torch.no_grad():
        mixture.model.model.embed_tokens.weight[ids[1]] += 3.0  # another prompt altogether
    choices = chosen_experts(mixture, 1, ids)
    assert len(set(choices)) > 1
    together = greedy(mixture, ids, experts=1)
    for row, choice in enumerate(choices):
        alone = greedy(keep_experts(mixture, choice), ids[row : row + 1])
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
        assert not together[row, alone.shape[1] :].any()
    twice = greedy(mixture, ids, experts=1, num_beams=2, num_return_sequences=2)
    assert torch.equal(twice[:, : ids.shape[1]], ids.repeat_interleave(2, 0))
    mixture.experts_at_inference = 1
    assert torch.equal(greedy(mixture, ids), together)
    mixture.experts_at_inference = "auto"
    whole = greedy(mixture, ids, experts=3)
    monkeypatch.setattr("branchmix.models.kept_branchmix.SURE", 0.0)  # all stay
    assert torch.equal(greedy(mixture, ids), whole)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_shares_are_means_of_the_gates_and_padding_has_none(name: str) -> None:
    mixture, ids = random_mixture(name), tokens()
    outputs = mixture(ids, output_router_logits=True)
    layers = [*outputs.router_logits, *outputs.attention_router_logits]
    expected = torch.stack([layer.softmax(-1) for layer in layers]).mean(0).view(*ids.shape, -1).mean(1)
    close(expert_shares(mixture, ids), expected)
    mask = torch.ones_like(ids)
    padded = torch.cat((torch.zeros_like(ids[:, :3]), ids), 1)
    close(expert_shares(mixture, padded, torch.cat((torch.zeros_like(mask[:, :3]), mask), 1)), expected)


def test_document_gates_are_cut_to_the_experts_kept_and_say_which() -> None:
    """Without running the model: what they add to the logits after the prompt's last token."""
    mixture, ids = gated("llama"), tokens()
    gate = mixture.document_gate
    with torch.no_grad():
        logits = gate(ids)[0]
        shares = (logits.attention[:, -1].softmax(-1) + logits.ffn[:, -1].softmax(-1)) / 2
        padded = torch.cat((torch.zeros_like(ids[:, :3]), ids), 1)
        mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
        close(expert_shares(mixture, ids), shares)
        close(expert_shares(mixture, padded, mask), shares)
        some = keep_experts(mixture, [0, 2])
        posterior = torch.eye(4)[0].expand(2, 11, 4)
        close(_mixed(posterior, some.document_gate.ffn), gate.ffn[[0, 2], 0].log_softmax(0).expand(2, 11, 2))
        assert some.document_gate.evidence.data_ptr() == gate.evidence.data_ptr()
        one = keep_experts(mixture, [1])
        assert one.document_gate is None
        with one_hot_gates(mixture, 1):
            close(one(ids).logits, mixture(ids).logits)
    assert greedy(mixture, ids, experts="auto").shape[1] == ids.shape[1] + 6


def test_another_k_is_that_of_kept_experts_too() -> None:
    """Also of those that were kept before."""
    mixture, ids = random_mixture("llama", routed_scaling_factor=1.5), tokens()  # N / k
    before = of_kept_experts(mixture, (0, 2))
    assert of_kept_experts(mixture, (0, 2)) is before
    mixture.use_top_k(1)
    after = of_kept_experts(mixture, (0, 2))
    with torch.no_grad():
        close(after(ids).logits, keep_experts(mixture, [0, 2])(ids).logits)
        assert not torch.allclose(after(ids).logits, before(ids).logits, atol=1e-3)


def test_auto_keeps_the_experts_that_have_half_of_the_largest_share(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, ids = random_mixture("llama"), tokens(3)
    shares = torch.tensor([[0.9, 0.05, 0.05], [0.5, 0.1, 0.4], [0.34, 0.33, 0.33]])
    monkeypatch.setattr("branchmix.models.kept_branchmix.expert_shares", lambda *_: shares)
    assert chosen_experts(mixture, "auto", ids) == [(0,), (0, 2), (0, 1, 2)]
    assert chosen_experts(mixture, 2, ids) == [(0, 1), (0, 2), (0, 1)]


def test_weights_are_shared_and_follow_the_mixture() -> None:
    mixture, ids = random_mixture("llama", expert_names=["seed", "code", "law"]), tokens()
    kept = of_kept_experts(mixture, (1,))
    own = {parameter.untyped_storage().data_ptr() for parameter in mixture.parameters()}
    assert all(parameter.untyped_storage().data_ptr() in own for parameter in kept.parameters())
    assert of_kept_experts(mixture, (1,)) is kept and kept.config.expert_names == ["code"]
    apart = of_kept_experts(mixture, (0, 2))
    assert apart.config.expert_names == ["seed", "law"], "in the order of the rows"
    for name, parameter in apart.named_parameters():
        assert parameter.untyped_storage().data_ptr() in own or "self_attn" in name or "gate.weight" in name
    assert mixture.keep_experts("code").config.expert_names == ["code"]
    for expert in ("seed", "law"):  # whatever order they are asked for in, a name is that of its own weights
        some = mixture.keep_experts(["law", "seed"])
        with one_hot_gates(some, some.config.expert_names.index(expert)):
            close(some(ids).logits, mixture.keep_experts(expert)(ids).logits)
    for rows in ((0,), (2,), (0, 1), (1, 2)):
        of_kept_experts(mixture, rows)
    assert of_kept_experts(mixture, (1,)) is not kept, "the last few are remembered"
    with torch.no_grad():
        mixture.model.model.layers[0].self_attn.o_proj.weight.mul_(2.0)
        assert of_kept_experts(mixture, (0, 2)) is not None
        close(of_kept_experts(mixture, (1,))(ids).logits, keep_experts(mixture, ["code"])(ids).logits)


@pytest.mark.parametrize("rows", [[0, 2], [0, 2, 3], [1, 2, 3]])
def test_experts_kept_of_kept_ones(rows: list[int], tmp_path: Path) -> None:
    mixture, ids = random_mixture("llama", num_experts=4), tokens()
    kept = keep_experts(mixture, rows)
    for some in ([0], [1], [0, len(rows) - 1]):
        with torch.no_grad():
            close(keep_experts(kept, some)(ids).logits, keep_experts(mixture, [rows[row] for row in some])(ids).logits)
    if rows == [1, 2, 3]:
        kept.save_pretrained(tmp_path)
        close(load(tmp_path)(ids).logits, kept(ids).logits)
    else:
        with pytest.raises(ValueError, match="share tensors with the others of their mixture: branchmix remove-expert"):
            kept.save_pretrained(tmp_path)


def test_rows_of_several_choices_are_padded_as_transformers_pads() -> None:
    """With the end of text where there is no padding token, and as a generation config says."""
    mixture, ids = random_mixture("llama"), tokens(3)
    mixture.generation_config.pad_token_id = None
    with torch.no_grad():
        mixture.model.model.embed_tokens.weight[ids[1]] += 3.0
    choices = chosen_experts(mixture, 1, ids)
    assert len(set(choices)) > 1
    kept = keep_experts(mixture, choices[0])
    end = int(kept.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=1, do_sample=False)[0, -1])
    settings = GenerationConfig(eos_token_id=end, max_new_tokens=5, do_sample=False)
    out = mixture.generate(ids, attention_mask=torch.ones_like(ids), experts=1, generation_config=settings)
    assert set(out[0, ids.shape[1] :].tolist()) == {end}, "it ends at once"
    two = mixture.generate(ids[::2], settings, attention_mask=torch.ones_like(ids[::2]), experts=1)
    assert choices[0] != choices[2] and set(two[0, ids.shape[1] :].tolist()) == {end}
    for refused in ({"return_dict_in_generate": True}, {"prefix_allowed_tokens_fn": lambda row, ids: [row]}):
        with pytest.raises(ValueError, match="which tokens they may have, or return more than ids"):
            mixture.generate(ids, experts=1, generation_config=settings, **refused)


def test_what_a_generation_config_leaves_open_is_the_mixtures() -> None:
    """Its padding token, also to find the padding by; and a tensor of tokens that end a text is of all rows."""
    mixture, ids = random_mixture("llama"), tokens(2)
    mixture.generation_config.pad_token_id = 7
    ids[0, :3] = 7
    mask = (ids != 7).long()
    with torch.no_grad():
        mixture.model.model.embed_tokens.weight[ids[1]] += 3.0
    choices = chosen_experts(mixture, 1, ids, mask)
    assert len(set(choices)) > 1
    wanted = mixture.generate(ids, attention_mask=mask, experts=1, max_new_tokens=5, do_sample=False)
    settings = GenerationConfig(max_new_tokens=5, do_sample=False)
    assert torch.equal(mixture.generate(ids, settings, experts=1), wanted)
    first, second = (wanted[row, ids.shape[1] + row].item() for row in range(2))
    ends = {"attention_mask": mask, "experts": 1, "max_new_tokens": 5, "do_sample": False}
    both = mixture.generate(ids, eos_token_id=torch.tensor([second, first]), **ends)
    assert torch.equal(both, mixture.generate(ids, eos_token_id=[second, first], **ends))
    assert both[0, ids.shape[1] :].tolist() == [first, *[7] * (both.shape[1] - ids.shape[1] - 1)]


def test_kept_experts_follow_the_mixtures_attention() -> None:
    mixture = random_mixture("llama")
    before = of_kept_experts(mixture, (1,))
    mixture.set_attn_implementation("eager")
    assert of_kept_experts(mixture, (1,)) is not before
    assert of_kept_experts(mixture, (1,)).config._attn_implementation == "eager"


def test_inference_tensors() -> None:
    with torch.inference_mode():
        mixture = random_mixture("llama")
        assert greedy(mixture, tokens(), experts=1).shape[1] == tokens().shape[1] + 6


def test_the_cache_is_that_of_the_experts_kept() -> None:
    mixture, ids = random_mixture("llama"), tokens()
    with torch.no_grad():
        whole, kept = (model(ids, use_cache=True).past_key_values for model in (mixture, keep_experts(mixture, [2])))
    assert whole.layers[0].keys.shape[1] == 3 * kept.layers[0].keys.shape[1]


def test_refusals() -> None:
    mixture, ids = random_mixture("llama", expert_names=["seed", "code", "law"]), tokens()
    for wanted, message in (
        (["medicine"], "no expert is called 'medicine': this mixture has seed, code, law"),
        ([3], "no expert is called 3"),
        ([], "keep at least one expert"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture.keep_experts(wanted)
    with pytest.raises(ValueError, match="4 experts cannot be kept: this mixture has 3"):
        greedy(mixture, ids, experts=4)
    with pytest.raises(ValueError, match="give input_ids"):
        mixture.generate(inputs_embeds=torch.zeros(1, 3, 32), experts=1)
    soup = random_mixture("llama", "average", ffn="average")
    with pytest.raises(ValueError, match="no experts to choose from"):
        greedy(soup, ids, experts="auto")
