"""Routers from hidden states: an expert's row points to where the seed's states lie on text of that expert's domain.

mergekit's ``gate_mode: hidden``, with two changes. Rows are centred over the experts, which no softmax can see but
which keeps the logits (and the z-loss) small; and they get the length of random rows, so that routing starts soft.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from branchmix.accounting.formulas import table_positions
from branchmix.checkpoint.expressions import Expression
from branchmix.checkpoint.generated_tensors import Held
from branchmix.checkpoint.text import LONG
from branchmix.errors import CheckpointError, RecipeError
from branchmix.recipe import Recipe
from branchmix.upcycling.compatibility import foldable_norms
from branchmix.upcycling.plan import output_dtype
from branchmix.upcycling.sources import DenseExpert

MAX_TOKENS = 512
"""Tokens used of each prompt or text; the mean over more hardly changes."""
ILL_CONDITIONED = 100.0
"""Condition number of the matrix of unit rows [E, D] above which a note says that the rows are nearly dependent."""


def router_texts(recipe: Recipe) -> dict[str, list[str]]:
    """Texts typical of each expert, by its name: ``router_init.prompts``, and the content of ``router_init.text``.

    Raises RecipeError for a text file that is missing or empty.
    """
    init = recipe.router_init
    texts = {name: list((init.prompts or {}).get(name, [])) for name in recipe.expert_names}
    paths = init.text or {}
    for name in [name for name in texts if name in paths]:
        file = recipe.folder / paths[name]
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            kind = type(error).__name__
            raise RecipeError(f"router_init.text: {file} cannot be read ({kind}): check the path") from None
        if not text.strip():
            raise RecipeError(f"router_init.text: {file} is empty: put text typical of {name!r} there")
        texts[name].append(text[:LONG])  # MAX_TOKENS are far fewer; a tokenizer would take all of a large file
    return texts


def hidden_state_routers(
    recipe: Recipe, seed: DenseExpert, texts: dict[str, list[str]], *, trust_remote_code: bool = False
) -> tuple[dict[str, Expression], list[str]]:
    """Routers [E, D] of every layer, by output name, and notes for the user.

    The seed is loaded in fp32 and run on the texts, one or more of every expert. Raises RecipeError if it has no
    tokenizer that loads without code of its own or with code that is trusted, CheckpointError if it cannot be loaded.
    """
    import torch

    from branchmix.likelihood.loading import load_language_model, load_tokenizer

    folder = seed.index.folder
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise RecipeError(f"router_init: the seed has no tokenizer to read prompts with: {error}") from None
    model = load_language_model(folder, dtype=torch.float32).eval()
    dtype = output_dtype(recipe, seed)
    length = min(MAX_TOKENS, table_positions(seed.index.config) or MAX_TOKENS)
    states: dict[str, list[np.ndarray]] = {}
    for name in recipe.expert_names:
        with torch.no_grad(), _mean_inputs(recipe, seed, model) as means:
            for text in texts[name]:
                ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=length).input_ids
                model(ids, use_cache=False)
        for router, (total, count) in means.items():
            states.setdefault(router, []).append((total / count).numpy())

    rows: dict[str, Expression] = {}
    worst = 0.0
    for router, vectors in states.items():
        matrix_ED = np.stack(vectors).astype(np.float64)
        unit_ED = matrix_ED / np.linalg.norm(matrix_ED, axis=1, keepdims=True)
        worst = max(worst, float(np.linalg.cond(unit_ED)))
        centred_ED = matrix_ED - matrix_ED.mean(0)
        lengths_E1 = np.maximum(np.linalg.norm(centred_ED, axis=1, keepdims=True), 1e-12)
        as_random_ED = centred_ED / lengths_E1 * recipe.router_init.std * matrix_ED.shape[1] ** 0.5
        rows[router] = Held(as_random_ED.astype(np.float32), dtype)
    notes = []
    if worst > ILL_CONDITIONED:
        notes.append(
            f"router_init: the experts' mean hidden states are nearly parallel (condition number up to {worst:.0f}), "
            "so the routers start close to one another: give prompts that differ more, or more of them"
        )
    return rows, notes


@contextmanager
def _mean_inputs(recipe: Recipe, seed: DenseExpert, model: Any) -> Iterator[dict[str, tuple[Any, int]]]:
    """Sum and number of the states that routers would read while the block runs, by the routers' output names.

    A router reads what attention or FFN reads; where the norm before them is folded, it has a gain of 1 in the mixture.
    """
    import torch

    family = seed.family
    folded = foldable_norms(recipe, seed) if recipe.merge.fold_norms else []
    readers = {"attention": (family.attention, family.attention_input_norm), "ffn": (family.ffn, family.ffn_input_norm)}
    sums: dict[str, tuple[Any, int]] = {}

    def add(name: str, applied: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = applied(args[0] if args else kwargs["hidden_states"])
        flat = hidden.reshape(-1, hidden.shape[-1])
        total, count = sums.get(name, (0.0, 0))
        sums[name] = (total + flat.sum(0), count + flat.shape[0])

    with ExitStack() as hooks:
        for path in (f"{family.layers}.{layer}" for layer in range(seed.dims.num_layers)):
            block = model.get_submodule(path)
            for kind, router in recipe.routers(family).items():
                reader, norm = readers[kind]
                module, applied = block.get_submodule(reader), torch.nn.Identity()
                if norm in folded:
                    module = block.get_submodule(norm)
                    applied = copy.deepcopy(module)
                    with torch.no_grad():
                        applied.weight.fill_(1.0 - family.gain_offset)  # a gain of 1
                hook = partial(add, f"model.{path}.{router}", applied)
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield sums
