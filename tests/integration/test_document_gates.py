"""Document gates in the model: against a loop in numpy, in every cache, packed, padded, trained and saved."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_remote_code import LOAD_ALL, WITHOUT_BRANCHMIX
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from branchmix.accounting.formulas import parameters
from branchmix.data.sequences import packed_inputs, packing_method
from branchmix.models.attention_branchmix import BranchMixAttention
from branchmix.models.documents_branchmix import BLOCK, DocumentState, decayed_sums, remember
from branchmix.models.modeling_branchmix import BranchMixForCausalLM
from branchmix.train import trained_parts
from branchmix.train.schedule import part_of
from families import NAMES
from mixtures import BOTH, GATE, close, gated, load, random_mixture, tokens

FAMILIES = ("llama", "cohere", "gemma3", "gpt-neox", "gpt2", "opt", "gptj", "falcon", "phi3")


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def logits_of(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **{"use_cache": False, **inputs}).logits


# ---- the sums ----


def loop(evidence: np.ndarray, decay: float, starts: np.ndarray, carry: np.ndarray) -> np.ndarray:
    """The definition, token by token, in fp64."""
    sums = np.zeros_like(evidence)
    for row in range(len(evidence)):
        last = carry[row]
        for t, found in enumerate(evidence[row]):
            last = found + decay * (0 if starts[row, t] else last)
            sums[row, t] = last
    return sums


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("restarts", [None, "rare", "often"])
def test_sums_are_the_loops(restarts: str | None, length: int, decay: float) -> None:
    rng = np.random.default_rng(length)
    evidence, carry = rng.normal(size=(3, length, 4)), rng.normal(size=(3, 4))
    starts = rng.random((3, length)) < {None: 0.0, "rare": 0.01, "often": 0.3}[restarts]
    given = None if restarts is None else torch.tensor(starts)
    for before in (carry, np.zeros_like(carry)):
        expected = loop(evidence, decay, starts, before)
        found = decayed_sums(torch.tensor(evidence), decay, given, torch.tensor(before))
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)


def test_router_logits_are_the_documents_and_the_tokens() -> None:
    """Of both kinds, in every layer; the part of the token is what is left when the gate is silent."""
    model = gated("llama", router_aux_loss_coef=0.0)
    ids, gate = tokens(2, 9), model.document_gate
    with torch.no_grad():
        model.get_submodule("model.model.layers.0.mlp.gate").weight.zero_()
        model.get_submodule("model.model.layers.0.self_attn.expert_gate").weight.zero_()
        out = model(ids, output_router_logits=True)
    table = gate.evidence.detach().double().numpy()
    sums = loop(table[ids.numpy()], 0.9, np.zeros((2, 9), bool), np.zeros((2, 4)))
    z = np.exp(gate.prior.detach().double().numpy() + sums)
    posterior = z / z.sum(-1, keepdims=True)
    for found, wanted in (
        (out.router_logits[0], gate.ffn),
        (out.attention_router_logits[0], gate.attention),
    ):
        shares = np.exp(wanted.detach().double().numpy())
        expected = np.log(posterior @ (shares / shares.sum(0)).T)
        np.testing.assert_allclose(found.view(2, 9, 3).numpy(), expected, rtol=0, atol=1e-5)


# ---- off, and on ----


@pytest.mark.parametrize("name", FAMILIES)
def test_a_silent_gate_changes_nothing_and_none_has_no_tensors(name: str) -> None:
    plain = random_mixture(name)
    assert plain.document_gate is None and not [key for key in plain.state_dict() if "document" in key]
    model = BranchMixForCausalLM(copy.deepcopy(plain.config)).eval()
    fresh = random_mixture(name, document_gate=GATE)
    with torch.no_grad():
        for parameter in fresh.document_gate.parameters():
            parameter.zero_()
    missing, extra = fresh.load_state_dict(plain.state_dict(), strict=False)
    assert not extra and all(key.startswith("document_gate.") for key in missing)
    close(logits_of(fresh, tokens()), logits_of(plain, tokens()), 1e-6)
    assert model.document_gate is None


def test_a_new_gate_is_silent() -> None:
    torch.manual_seed(0)
    gate = BranchMixForCausalLM(gated("llama").config).document_gate
    assert not any(tensor.any() for tensor in gate.state_dict().values())


def test_ids_are_needed() -> None:
    model = gated("llama")
    embeddings = model.get_input_embeddings()(tokens())
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=embeddings)
    plain = random_mixture("llama")
    with torch.no_grad():
        close(plain(inputs_embeds=plain.get_input_embeddings()(tokens())).logits, logits_of(plain, tokens()))


def test_servers_without_a_state_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", lambda *_: None)  # as vLLM registers its own
    config = gated("llama").config
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=r"vLLM keeps no state .* --token-only"):
        BranchMixForCausalLM(config)
    model = gated("llama")

    class Paged:
        def get_seq_length(self) -> int:
            return 0

    with pytest.raises(ValueError, match=r"Paged cannot keep the state .* --token-only"):
        model(tokens(), past_key_values=Paged())
    filled = random_mixture("llama")(tokens()).past_key_values
    with pytest.raises(ValueError, match="filled by another model"):
        model(tokens(2, 1), past_key_values=filled)


@pytest.mark.parametrize("attention", (*BOTH, "average"))
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_parameters_are_counted_to_the_last(name: str, attention: str) -> None:
    model = gated(name, attention)
    counted = parameters(model.config.to_dict())
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    routers = parameters({**model.config.to_dict(), "document_gate": None}).routers
    kinds = 1 + (attention != "average")
    assert counted.routers - routers == 4 * (97 + 1 + kinds * 3)


def test_gates_without_anything_to_choose_from_are_refused() -> None:
    for options, message in (
        ({"attention": "average", "ffn": "average"}, "needs experts to choose from"),
        ({"document_gate": {"domains": ["a"]}}, "a decay from 0 to 1"),
        ({"document_gate": {"domains": [], "decay": 0.5}}, "needs domains"),
    ):
        with pytest.raises(ValueError, match=message):
            random_mixture("llama", **{"document_gate": GATE, **options})


# ---- caches ----


@pytest.mark.parametrize("name", NAMES)
def test_cached_is_uncached(name: str) -> None:
    """In one step, in chunks, token by token, after a crop, and with reordered rows: in every family."""
    model = gated(name)
    ids = tokens(2, 11)
    whole = logits_of(model, ids)
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        cache = first.past_key_values
        close(first.logits, whole[:, :5])
        close(model(ids[:, 5:10], past_key_values=cache, use_cache=True).logits, whole[:, 5:10])
        for layer in cache.layers:
            if not getattr(layer, "is_sliding", False):
                continue
            break
        else:
            cache.crop(-4)  # windows cannot be cropped any more
            close(model(ids[:, 6:10], past_key_values=cache, use_cache=True).logits, whole[:, 6:10])
        cache.reorder_cache(torch.tensor([1, 0]))
        close(model(ids[:, 10:].flip(0), past_key_values=cache, use_cache=True).logits, whole[:, 10:].flip(0))


@pytest.mark.parametrize("attention", (*BOTH, "average"))
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_is_the_same_in_every_cache(name: str, attention: str) -> None:
    model = gated(name, attention)
    dynamic = generate(model, tokens())
    assert torch.equal(generate(model, tokens(), use_cache=False), dynamic)
    assert torch.equal(generate(model, tokens(), cache_implementation="static"), dynamic)
    assert torch.equal(generate(model, tokens(), prefill_chunk_size=3), dynamic)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_and_drafts(name: str) -> None:
    model = gated(name)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, tokens(), use_cache=False, **beams)
    assert torch.equal(generate(model, tokens(), **beams), expected)
    assert torch.equal(generate(model, tokens(), cache_implementation="static", **beams), expected)
    if name in ("gemma3", "phi3"):  # sliding caches cannot be cropped
        return
    prompt = tokens(1, 6).repeat(1, 3)  # n-grams to find
    expected = generate(model, prompt)
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(model, prompt, assistant_model=model.keep_experts([0, 2])), expected)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_changes_no_continuation(name: str, attention: str) -> None:
    model = gated(name, attention)
    prompts = [tokens(1, 9, seed=1), tokens(1, 5, seed=2)]
    alone = torch.cat([generate(model, prompt) for prompt in prompts])
    pad = torch.full((1, 4), 5)  # a token with evidence of its own
    batch = torch.cat([prompts[0], torch.cat([pad, prompts[1]], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    assert torch.equal(generate(model, batch, mask), alone)
    assert torch.equal(generate(model, batch, mask, cache_implementation="static"), alone)
    assert torch.equal(generate(model, batch, mask, prefill_chunk_size=3), alone)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_static_caches_step_by_step(name: str) -> None:
    model = gated(name)
    ids = tokens(2, 9)
    whole = logits_of(model, ids)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=16)
    for again in range(2):
        with torch.no_grad():
            close(model(ids[:, :4], past_key_values=cache, use_cache=True).logits, whole[:, :4])
            for step in range(4, 9):
                close(
                    model(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits[:, 0], whole[:, step]
                )
        if not again:
            cache.reset()


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("attention", BOTH)
def test_a_compiled_step_with_a_static_cache_is_the_same(attention: str) -> None:
    model = gated("llama", attention)
    ids = tokens(2, 9)
    expected = logits_of(model, ids)[:, 8]
    cache = StaticCache(model.config.get_text_config(), max_cache_len=16)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True)
        found = step(ids[:, 8:], past_key_values=cache, position_ids=torch.full((2, 1), 8), use_cache=True).logits[:, 0]
    close(found, expected)
    torch._dynamo.reset()
    with torch.no_grad():
        whole = torch.compile(model, fullgraph=True)
        close(whole(ids, use_cache=False).logits, logits_of(model, ids))
        cache = StaticCache(model.config.get_text_config(), max_cache_len=16)
        positions = torch.arange(8).expand(2, 8)
        close(whole(ids[:, :8], past_key_values=cache, position_ids=positions).logits, logits_of(model, ids)[:, :8])
        close(whole(ids[:, 8:], past_key_values=cache, position_ids=torch.full((2, 1), 8)).logits[:, 0], expected)


# ---- documents ----


@pytest.mark.parametrize("attention", ("kv_experts", "average"))
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_alone(name: str, attention: str) -> None:
    model = gated(name, attention)
    how = packing_method(model)
    documents = [tokens(1, length, seed=length) for length in (5, 1, 9)]
    batch = {
        "input_ids": torch.cat(documents, dim=1),
        "position_ids": torch.cat([torch.arange(document.shape[1]) for document in documents])[None],
    }
    alone = torch.cat([logits_of(model, document) for document in documents], dim=1)
    with torch.no_grad():
        close(model(**packed_inputs(batch, how)).logits, alone)


def test_padding_carries_no_evidence() -> None:
    """On either side, with and without positions."""
    model = gated("llama")
    own = tokens(1, 6)
    alone = logits_of(model, own)
    pad = torch.full((1, 3), 5)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = torch.cat((pad, own), dim=1)
    close(logits_of(model, padded, attention_mask=mask, position_ids=positions)[:, 3:], alone)
    close(logits_of(model, torch.cat((own, pad), dim=1), attention_mask=mask.flip(1))[:, :6], alone)
    with torch.no_grad():
        gate = model.document_gate
        close(gate(padded, mask)[0].ffn[:, 3:], gate(own)[0].ffn)  # positions restart nowhere here


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name not in ("gemma3", "phi3")]
)  # whose windows count padding
def test_padding_between_two_turns_changes_nothing(name: str) -> None:
    """A chat in a batch: the first answers had different lengths, and the shorter one has padding behind it."""
    model = gated(name)
    first, second = tokens(1, 5, seed=1), tokens(1, 6, seed=2)
    alone = generate(model, torch.cat((first, second), dim=1))
    batch = torch.cat((torch.cat((first, torch.full((1, 4), 5), second), dim=1), tokens(1, 15, seed=3)))
    mask = torch.ones_like(batch)
    mask[0, 5:9] = 0
    caches: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    for how in (*caches, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 7}):
        assert torch.equal(generate(model, batch, mask, **how)[:1], alone), how


def test_padding_keeps_the_state_of_the_token_before_it() -> None:
    """With positions and without, in one pass and in two."""
    gate = gated("llama").document_gate
    own, mask = tokens(1, 6), torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1]])
    padded = torch.full_like(mask, 5).masked_scatter(mask > 0, own)
    with torch.no_grad():
        _, alone = gate(own)
        for positions in (None, (mask.cumsum(-1) - 1).clamp_min(0)):
            _, state = gate(padded, mask, positions)
            close(state.sums[:, mask[0] > 0], alone.sums)
            close(state.sums[:, [3, 4, 8, 9]], alone.sums[:, [1, 1, 4, 4]])


@pytest.mark.parametrize("sparse", [None, True])
@pytest.mark.parametrize("attention", BOTH)
def test_forward_passes_in_several_threads_do_not_meet(attention: str, sparse: bool | None) -> None:
    """One waits in its second layer until the other is through, or cannot get through."""
    model = gated("llama", attention, **({} if sparse is None else {"attention_num_experts_per_tok": 1}))
    ids, others = tokens(1, 11, seed=1), tokens(1, 11, seed=2)
    alone = logits_of(model, ids), logits_of(model, others)
    for module in model.modules():
        if isinstance(module, BranchMixAttention):
            module.sparse = sparse
    inside, through, found = threading.Event(), threading.Event(), {}

    def wait(module: Any, args: Any) -> None:
        if threading.current_thread().name == "first":
            inside.set()
            through.wait(0.3)

    model.get_submodule("model.model.layers.1.self_attn.heads.k_proj").register_forward_pre_hook(wait)

    def first() -> None:
        found["first"] = logits_of(model, ids)

    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert inside.wait(30)
    found["second"] = logits_of(model, others)
    through.set()
    thread.join()
    close(found["first"], alone[0])
    close(found["second"], alone[1])


def test_a_forward_pass_that_fails_leaves_nothing_behind() -> None:
    model = random_mixture("llama", document_gate=GATE, trunk="experts")
    broken = model.get_submodule("model.model.layers.1.mlp").register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    broken.remove()
    copy.deepcopy(model)
    with pytest.raises(ValueError, match="call the whole mixture"):
        model.get_output_embeddings()(torch.zeros(1, 2, 32))


def test_offloading_caches_fetch_their_first_layer_again() -> None:
    """The state is the layer behind the last one, and is never taken away itself."""
    model = gated("llama")
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
    state = cache.layers.pop()
    fetched: list[int] = []
    for number, layer in enumerate(cache.layers):
        layer.prefetch = partial(fetched.append, number)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, True, nullcontext()
    remember(cache, DocumentState(state.keys[:, 0], state.values[:, 0, :, 0]))
    for number in range(len(cache.layers)):
        cache.prefetch(number)
    assert fetched == [0, 1, 0]


# ---- training ----


def test_copies_of_the_routers_that_peft_trains_read_the_document() -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model = gated("llama")
    before = logits_of(model, tokens())
    names = ["gate", "expert_gate", "document_gate"]
    model = get_peft_model(model, LoraConfig(target_modules=["k_proj"], modules_to_save=names))
    close(logits_of(model, tokens()), before)
    model.train()(tokens(), labels=tokens()).loss.backward()
    saved = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    assert len(saved) == 8 and all(parameter.grad.any() for parameter in saved)


@pytest.mark.parametrize("attention", (*BOTH, "average"))
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(name: str, attention: str) -> None:
    """With a second forward pass in between, whose logits must not be those of the first's backward."""
    gradients = []
    for checkpointing in (False, True):
        model = gated(name, attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        losses = [model(ids, labels=ids, use_cache=False).loss for ids in (tokens(2, 11, 1), tokens(2, 7, 2))]
        sum(losses).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for parameter, grad in gradients[0].items():
        assert grad is not None, parameter
        close(gradients[1][parameter], grad, 1e-6)
    assert gradients[0]["document_gate.evidence"].abs().max() > 0


def test_gates_are_trained_like_routers() -> None:
    model = gated("llama")
    trained_parts.freeze(model, ["all_but_routers"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {f"document_gate.{name}" for name in ("evidence", "prior", "attention", "ffn")}
    assert own < trained and all(part_of(name) == "routers" for name in trained)
    model = gated("llama")
    trained_parts.add_adapters(model)
    assert own < {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_routers_still_add_up_under_autocast() -> None:
    model = gated("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(tokens(), output_router_logits=True)
    assert all(layer.dtype == torch.float32 for layer in (*out.router_logits, *out.attention_router_logits))


# ---- saved ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = gated(name)
    model.document_gate.counts += torch.arange(4, dtype=torch.int32)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.document_gate == GATE
    assert torch.equal(again.document_gate.counts, model.document_gate.counts)
    assert torch.equal(logits_of(again, tokens()), logits_of(model, tokens()))
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half.document_gate.counts.dtype == torch.int32
    copies = (copy.deepcopy(again), pickle.loads(pickle.dumps(again)))  # pickled as processes send it to one another
    with torch.no_grad():
        again.document_gate.ffn.zero_()
        again.document_gate.attention.zero_()
    for copied in copies:
        assert torch.equal(logits_of(copied, tokens()), logits_of(model, tokens())), "a copy has a gate of its own"


def test_loads_without_the_package(tmp_path: Path) -> None:
    model = gated("llama")
    folder = tmp_path / "models" / "gated"
    model.save_pretrained(folder)
    ids = tokens()
    with torch.no_grad():
        hidden = model.model.base_model
        expected = {
            "ids": ids,
            "logits": model(ids).logits,
            "hidden": model.base_model(ids).last_hidden_state,
            "generated": generate(model, ids, max_new_tokens=6, min_new_tokens=6),
        }
    assert hidden is not None
    expected["generated"] = torch.cat((ids, expected["generated"]), dim=1)
    save_file(expected, folder / "expected.safetensors")
    (tmp_path / "copies").mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""}
    arguments = [str(tmp_path / "models"), str(tmp_path / "copies")]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_BRANCHMIX + LOAD_ALL, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_resized_embeddings_take_the_table_along() -> None:
    model = gated("llama")
    before = logits_of(model, tokens())
    model.resize_token_embeddings(101)
    assert model.document_gate.evidence.shape == model.document_gate.counts.shape == (101, 4)
    close(logits_of(model, tokens())[..., :97], before)
    logits_of(model, torch.full((1, 3), 100))
