"""The forecast of a training step's memory against the tensors that autograd keeps, storage by storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from branchmix.accounting import parameters
from branchmix.models.chosen_branchmix import Chosen
from branchmix.study.memory import activation_bytes, training_bytes
from branchmix.study.models import new_model
from branchmix.train import trained_parts
from branchmix.train.counters import DomainLoss
from branchmix.train.models import Computing, attention_options

VOCABULARY = 48
SEED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
COHERE: dict[str, Any] = {"model_type": "cohere", **SEED}
LLAMA: dict[str, Any] = {"model_type": "llama", **SEED}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "head_dim": 16, **SEED}


def mixture(seed: dict[str, Any], attention: str, top_k: int = 1, **options: Any) -> dict[str, Any]:
    return {
        "model_type": "branchmix",
        "seed_config": seed,
        "num_experts": 4,
        "attention": attention,
        "num_experts_per_tok": top_k,
        **options,
    }


def kept_bytes(config: dict[str, Any], rows: int, length: int, *, bf16: bool) -> int:
    """Of what autograd keeps of a micro-batch of packed documents, without parameters and logits."""
    computing = Computing(torch.device("cpu"), bf16)
    model = new_model(config, **attention_options(config["model_type"], computing, length)).train()
    trained_parts.only_stitches(model, [])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[-1:] != (VOCABULARY,):
            storages[storage.data_ptr()] = storage
        return tensor

    ids_BT = torch.randint(0, VOCABULARY, (rows, length))
    positions_BT = torch.cat([torch.arange(length // 4), torch.arange(length - length // 4)]).expand(rows, -1)
    counting = DomainLoss(["code"]).counting(model, torch.zeros(rows, dtype=torch.long))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), computing.autocast(), counting:
        model(input_ids=ids_BT, labels=ids_BT, position_ids=positions_BT, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


CASES = {
    "dense": (COHERE, False),
    "btx": (mixture(COHERE, "average"), False),
    "expert KV": (mixture(COHERE, "kv_experts"), False),
    "shared KV, top 2": (mixture(COHERE, "kv_sharing", 2), False),
    "soft FFN": (mixture(COHERE, "kv_experts", 4), False),
    "no FFN experts": (mixture(COHERE, "kv_experts", ffn="average"), False),
    "one router": (mixture(COHERE, "kv_experts", shared_router=True), False),
    "llama": (LLAMA, False),
    "llama's mixture": (mixture(LLAMA, "kv_experts", 2), False),
    "eager in bf16": (COHERE, True),
    "chunks in bf16": (mixture(COHERE, "kv_experts"), True),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_are_within_a_tenth_of_what_autograd_keeps(case: str) -> None:
    config, bf16 = CASES[case]
    counted = activation_bytes(config, {"batch_size": 2, "sequence_length": 64}, bf16=bf16)
    measured = kept_bytes(config, 2, 64, bf16=bf16)
    if bf16:  # the difference of two micro-batches: without the weights' copies
        measured = kept_bytes(config, 4, 64, bf16=bf16) - measured
    assert counted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("seed", "attention", "top_k", "rows", "bf16"),
    [
        (COHERE, "kv_sharing", 1, 8, False),
        (COHERE, "kv_sharing", 2, 24, False),
        (LLAMA, "kv_experts", 1, 24, False),
        (COHERE, "kv_experts", 2, 48, False),
        (QWEN3, "kv_sharing", 1, 8, False),
        (COHERE, "kv_sharing", 1, 96, True),
        (COHERE, "kv_experts", 1, 128, True),
    ],
)
def test_chosen_heads_are_counted_where_they_are_computed_alone(
    seed: dict[str, Any], attention: str, top_k: int, rows: int, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batches on both sides of what ``LEAST_SAVED`` says: of the smaller one, all experts' heads are counted."""
    sorted_by: list[int] = []
    made = Chosen.__init__
    monkeypatch.setattr(Chosen, "__init__", lambda self, *args: sorted_by.append(1) or made(self, *args))
    config, length = mixture(seed, attention, attention_num_experts_per_tok=top_k), 128
    soft = {**config, "attention_num_experts_per_tok": None}
    for batch in (rows, rows // 4):
        run = {"batch_size": batch, "sequence_length": length}
        counted, whole = (activation_bytes(each, run, bf16=bf16) for each in (config, soft))
        sorted_by.clear()
        assert counted == pytest.approx(kept_bytes(config, batch, length, bf16=bf16), rel=0.12)
        assert bool(sorted_by) == (counted != whole) == (batch == rows)
    eager_run = {**run, "batch_size": rows, "attn_implementation": "eager"}
    eager, all_eager = (activation_bytes(each, eager_run, bf16=bf16) for each in (config, soft))
    assert (eager < all_eager) == (attention == "kv_sharing")


@pytest.mark.parametrize("seed", [LLAMA, COHERE], ids=["llama", "cohere"])
@pytest.mark.parametrize("stitches", [["experts", "hub"], [None, None, "experts", "hub"], [None, "hub", None, "hub"]])
def test_of_stitched_models_only_the_stitches_are_trained(seed: dict[str, Any], stitches: list[str | None]) -> None:
    seed, whole = {**seed, "num_hidden_layers": len(stitches)}, {"ffn": "whole", "trunk": "whole"}
    config = mixture(seed, "whole", 4, stitches=stitches, **whole)
    run = {"batch_size": 2, "sequence_length": 64}
    kept = kept_bytes(config, 2, 64, bf16=False)
    counted = activation_bytes(config, run, bf16=False)
    assert 0.95 * kept <= counted <= 1.25 * kept
    counts, logits = parameters(config), 12 * 2 * 64 * VOCABULARY
    weights = training_bytes(config, run, bf16=False) - 1.6 * (logits + counted)
    assert weights == pytest.approx(4 * counts.total + 12 * counts.stitches, abs=1)


def test_a_step_has_them_and_logits_for_each_sequence_of_a_micro_batch() -> None:
    run = {"batch_size": 32, "sequence_length": 64}
    micro = [training_bytes(COHERE, {**run, "micro_batch_size": rows}, bf16=False) for rows in (4, 8, 16)]
    assert micro[2] - micro[1] == pytest.approx(2 * (micro[1] - micro[0]), abs=1)
    assert (micro[1] - micro[0]) / 4 > kept_bytes(COHERE, 1, 64, bf16=False) + 12 * 64 * VOCABULARY
    assert training_bytes(COHERE, run, bf16=False) == training_bytes(
        COHERE, {**run, "micro_batch_size": 32}, bf16=False
    )
    weights = micro[0] - (micro[1] - micro[0])
    assert weights == pytest.approx(16 * parameters(COHERE).total, abs=1)


def test_gradient_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    run, deep = {"batch_size": 2, "sequence_length": 64}, {**COHERE, "num_hidden_layers": 8}
    one = activation_bytes({**COHERE, "num_hidden_layers": 1}, run, bf16=False)
    inputs = 8 * 4 * 2 * 64 * COHERE["hidden_size"]
    assert activation_bytes(deep, {**run, "gradient_checkpointing": True}, bf16=False) == one + inputs
