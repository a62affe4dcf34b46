"""Embeddings of experts' domains, which routers make rows of (Nexus, arXiv 2408.15901).

The paper takes them from a text encoder. Here the seed is the encoder: it does not change when the mixture is trained,
so an expert that joins later is embedded as the first ones were. A domain's embedding is the mean of the seed's final
hidden state over its text. These means have most in common, whatever the text, so they are stored as differences from
the mean over the first experts, divided by their root mean square.

SmolLM2-135M, with general text, code and licences as the first domains and mathematics as a newcomer: the means have
cosines of 0.87 to 0.95, the differences of two domains at most 0.44, of two halves of one domain's text 0.94 to 0.98.
Shapes: E experts, C width of the final hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from branchmix.accounting.formulas import table_positions
from branchmix.checkpoint.expressions import Expression
from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.generated_tensors import Constant, Held
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import read_config
from branchmix.data.config import EvalData
from branchmix.errors import RecipeError
from branchmix.upcycling.gates.text import DomainText, read, require_known_tokens
from branchmix.upcycling.plan import ROUTER_DOMAINS, Progress

DOCUMENTS, TOKENS = 64, 128
"""Documents of a domain that are read, and tokens of each from its beginning: variety says more than length."""
Text = Mapping[str, Sequence[DomainText]]
"""By expert, the text of its domains."""


def text_of_experts(
    names: Sequence[str],
    data: EvalData,
    seed: ResolvedModel,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Text:
    """The text of each expert's domain, in the seed's tokens.

    Raises:
        RecipeError: an expert has no domain, or every document is held out.
        DataError, CheckpointError: text, or the seed's tokenizer, cannot be read, or does not fit the seed.
    """
    from branchmix.accounting.shape import shape_of
    from branchmix.likelihood.loading import load_tokenizer

    # An expert that joins alone has the domain of its name only.
    rest = [domain for domain in data.data if domain not in names] if len(names) > 1 else []
    domains = {name: [name] if name in data.data else rest if name == "seed" else [] for name in names}
    for name, own in domains.items():
        if not own:
            without = "; without the seed (include_seed: false) it needs none" if name == "seed" and names[1:] else ""
            raise RecipeError(
                f"data: no domain is called {name!r}{nearest(name, [*data.data])}: routers need text of the domain of "
                f"every expert, under its name{without}"
            )
    wanted = {domain: data.data[domain] for own in domains.values() for domain in own}
    tokenizer = load_tokenizer(seed.folder, given=seed.given, trust_remote_code=trust_remote_code)
    text = read(data.model_copy(update={"data": wanted}), tokenizer, progress)
    require_known_tokens(text, shape_of(read_config(seed.folder)).sizes.vocab_size, seed.given)
    return {name: [text[domain] for domain in own] for name, own in domains.items()}


def mean_states(text: Text, seed: ResolvedModel, progress: Progress | None = None) -> np.ndarray:
    """The mean of the seed's final hidden state over each expert's text, [E, C] in fp64."""
    import torch

    from branchmix.likelihood.loading import load_language_model

    model = load_language_model(seed.folder, given=seed.given, dtype=torch.float32).eval()
    length = min(TOKENS, table_positions(read_config(seed.folder)) or TOKENS)
    means = []
    for number, domains in enumerate(text.values()):
        if progress is not None:
            progress("embedding domains", number, len(text))
        documents = [d[:length] for of_one in domains for d in (of_one.measured + of_one.counted)[:DOCUMENTS]]
        total, count = 0.0, 0
        for tokens in documents:  # one by one, so that no padding is among the states
            with torch.no_grad():
                states = model.base_model(torch.from_numpy(tokens)[None].long(), use_cache=False).last_hidden_state
            total, count = total + states[0].double().sum(0).numpy(), count + len(tokens)
        means.append(total / count)
    return np.stack(means)


def embeddings(means_EC: np.ndarray, centre_C: np.ndarray) -> np.ndarray:
    """``means_EC - centre_C``, each of mean square 1, in fp32."""
    differences_EC = means_EC - centre_C
    rms_E1 = np.sqrt((differences_EC**2).mean(1, keepdims=True))
    return (differences_EC / np.maximum(rms_E1, 1e-12)).astype(np.float32)


def embedding_of(
    name: str,
    data: EvalData,
    seed: ResolvedModel,
    centre: Expression,
    *,
    dry_run: bool,
    trust_remote_code: bool,
    progress: Progress | None,
) -> Expression:
    """The embedding [1, C] of an expert that joins, whose domain has its name; zeros in a dry run, which only looks for
    the text. Errors as for ``text_of_experts``."""
    text = text_of_experts([name], data, seed, trust_remote_code=trust_remote_code, progress=progress)
    if dry_run:
        return Constant((1, centre.num_rows), 0.0, "F32")
    return Held(embeddings(mean_states(text, seed, progress), centre.rows(0, centre.num_rows)), "F32")


def router_domains(means_EC: np.ndarray) -> dict[str, Expression]:
    """The tensors of a new mixture's ``router_domains``, by name."""
    centre_C = means_EC.mean(0).astype(np.float32)
    held = {"embeddings": embeddings(means_EC, centre_C), "centre": centre_C}
    return {f"{ROUTER_DOMAINS}{name}": Held(values, "F32") for name, values in held.items()}
