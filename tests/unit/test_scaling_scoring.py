"""Scores of options are those of a plain loop: every family, mixtures, any batch size and order, shared or not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from branchmix.errors import CheckpointError
from branchmix.scaling.scoring.passes import can_share, score_options
from branchmix.scaling.scoring.plan import PASS_OVERHEAD, batches, plan
from branchmix.scaling.scoring.tokens import Encoded
from families import BY_NAME, NAMES
from mixtures import BOTH, gated, random_mixture


def questions(number: int = 14, *, seed: int = 0) -> list[Encoded]:
    """Prompts of which most begin alike and some exactly so; options of one to four tokens, some beginning alike."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 97) for _ in range(count))

    shared = tokens(12)
    found = []
    for n in range(number):
        context = shared[: draw.choice((0, 5, 12, 12))] + tokens(draw.randint(1, 9))
        lengths = [(1, 1), (1, 1, 1), (2, 2), (1, 3), (4, 2), (3,), (1,)][n % 7]
        options = [tokens(length) for length in lengths]
        if n % 7 == 4:
            options.append(options[0][:-1] + tokens(1))  # differs in its last token only
        found.append(Encoded(context, tuple(options)))
    found.append(Encoded(refused="longer than the context"))
    return found


def naive(model: Any, question: Encoded) -> list[float]:
    """One option at a time, all logits, no cache."""
    sums = []
    for option in question.options:
        row = torch.tensor([[*question.context, *option[:-1]]])
        with torch.inference_mode():
            logp_TV = model(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)
        start = len(question.context)
        sums.append(sum(float(logp_TV[start + n - 1, token]) for n, token in enumerate(option)))
    return sums


def agree(model: Any, asked: list[Encoded], tolerance: float = 1e-5, **options: Any) -> None:
    found = dict(score_options(model, asked, **options))
    assert set(found) == {n for n, question in enumerate(asked) if question.refused is None}
    for number, sums in found.items():
        wanted = naive(model, asked[number])
        assert sums == pytest.approx(wanted, abs=tolerance, rel=tolerance), number


@pytest.mark.parametrize("name", NAMES)
def test_every_family_scores_as_a_plain_loop(name: str) -> None:
    model = BY_NAME[name].model(0)
    assert can_share(model)
    agree(model, questions())


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2", "gpt2"])
def test_every_mixture_scores_as_a_plain_loop(name: str, attention: str) -> None:
    model = random_mixture(name, attention)
    assert can_share(model)
    agree(model, questions())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_mixture_with_document_gates_scores_as_a_plain_loop(name: str) -> None:
    model = gated(name)
    assert can_share(model)
    agree(model, questions())


def mixtral() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model("mixtral", **sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_mixtral_scores_as_a_plain_loop() -> None:
    agree(mixtral(), questions())


@pytest.mark.parametrize("kind", ["dense", "mixture", "mixtral"])
def test_neither_batch_size_nor_order_nor_sharing_changes_a_score(kind: str) -> None:
    models = {
        "dense": BY_NAME["llama"].model,
        "mixture": lambda _: random_mixture("llama"),
        "mixtral": lambda _: mixtral(),
    }
    model = models[kind](0)
    asked = questions(21, seed=1)
    wanted = dict(score_options(model, asked))
    order = list(range(len(asked)))
    random.Random(2).shuffle(order)
    for options in ({"batch_tokens": 1}, {"batch_tokens": 64}, {"share": False}, {"share": False, "batch_tokens": 1}):
        found = dict(score_options(model, [asked[n] for n in order], **options))
        for place, sums in found.items():
            assert sums == pytest.approx(wanted[order[place]], abs=1e-5)


def test_a_model_that_looks_at_the_length_of_rows_is_scored_row_by_row() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 12}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    model = BY_NAME["llama"].model(0, rope_parameters=rope)
    assert not can_share(model)
    agree(model, questions())


def test_equal_logits_leave_the_number_of_tokens() -> None:
    """With constant logits a token has probability 1/97 wherever it stands: shorter options win."""
    model = BY_NAME["llama"].model(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    asked = questions()
    for number, sums in score_options(model, asked):
        lengths = [len(option) for option in asked[number].options]
        assert sums == pytest.approx([-torch.log(torch.tensor(97.0)).item() * length for length in lengths])


def test_what_is_shared_is_computed_once() -> None:
    """Tokens of all passes, counted on the model itself."""
    model, seen = BY_NAME["llama"].model(0), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    shared = tuple(range(3, 33))
    asked = [Encoded((*shared, 40 + n), ((50,), (60,))) for n in range(20)]
    list(score_options(model, asked, share=True))
    assert sum(seen) == 30 + 20  # the beginning, and a token of each
    seen.clear()
    long = [Encoded(tuple(range(3 + n, 33 + n)), ((50, 51, 52), (60, 61, 62))) for n in range(3)]
    list(score_options(model, long, share=True))
    assert sum(seen) == 3 * 30 + 3 * 2 * 2  # each prompt once, and of each option all but its last token
    seen.clear()
    list(score_options(model, [Encoded((5, 6), ((50,), (60,), (70,)))], share=False))
    assert seen == [2]  # options of one token need one row


def test_one_prompt_of_many_questions_keeps_a_token_to_predict_from() -> None:
    """All share the whole prompt; and one prompt is where others only begin."""
    shared = tuple(range(3, 53))
    asked = [Encoded(shared, ((60 + n,), (70, 71 + n))) for n in range(6)]
    asked += [Encoded((*shared, 7 + n), ((60, 5), (61, 6))) for n in range(3)]
    assert [len(trunk.tokens) for trunk in plan(asked)] == [49]
    agree(BY_NAME["llama"].model(0), asked)


def test_the_plan_takes_a_trunk_only_where_it_pays() -> None:
    def rows(length: int, number: int) -> list[Encoded]:
        return [Encoded((*range(3, 3 + length), 40 + n, 9), ((50,), (60,))) for n in range(number)]

    saved = PASS_OVERHEAD * 2
    few, many = plan(rows(saved // 4, 5)), plan(rows(saved // 4, 6))
    assert [len(trunk.tokens) for trunk in few] == [0]
    assert [len(trunk.tokens) for trunk in many] == [saved // 4]
    families = [Encoded((*[first] * 40, n + 3), ((50,), (60,))) for first in (7, 8, 9) for n in range(4)]
    trunks = plan([*families, Encoded((1,), ((2,),))])
    assert sorted(len(trunk.tokens) for trunk in trunks) == [0, 40, 40, 40]
    assert sorted(row.question for trunk in trunks for row in trunk.rows) == list(range(13))


def test_rows_with_branches_are_never_padded() -> None:
    asked = questions(40, seed=3)
    for trunk in plan(asked):
        for batch in batches(trunk, 60):
            lengths = {len(row.tokens) for row in batch}
            assert len(batch) == 1 or max(lengths) * len(batch) <= 60
            assert len(lengths) == 1 or not any(row.branches for row in batch)
            assert len({bool(row.branches) for row in batch}) == 1


def test_what_is_no_models_own_tokenizer_and_broken_weights_are_refused() -> None:
    model = BY_NAME["llama"].model(0)
    with pytest.raises(CheckpointError, match="token 500, but the model knows 97"):
        list(score_options(model, [Encoded((3, 500), ((4,),))]))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        list(score_options(model, questions()))


def test_the_models_mode_stays() -> None:
    model = BY_NAME["llama"].model(0, attention_dropout=0.5).train()
    asked = questions()
    assert dict(score_options(model, asked)) == dict(score_options(model, asked))
    assert model.training and model.model.layers[0].self_attn.training
    for _ in score_options(model, asked):  # nor does the caller's own code run in another
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
