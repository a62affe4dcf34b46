"""What a model makes of held-out documents, domain by domain, and where its routers send them.

Documents are kept apart, so that two models can be compared document by document.
Shapes: B sequences, T tokens of a document, E members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from branchmix.data.config import HeldOut, Source

if TYPE_CHECKING:
    from branchmix.data.packing import Packing
    from branchmix.train.routers import RouterMonitor

ROUTED_SEQUENCES = 64
"""Of a domain, for the routing by domain."""
BATCH = 16

Documents = dict[str, list[list[float]]]
"""By domain, ``[nats, predicted tokens, bytes]`` of each document."""


def measure(
    model: Path,
    sources: Mapping[str, Source],
    *,
    folder: Path,
    held_out: HeldOut,
    max_length: int,
    bf16: bool | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Scores of one model: ``{"domains": Documents, "routing": ...}``; no routing of a dense model.

    Args:
        model: its folder.
        sources: domains by name.
        folder: where relative paths of the sources start from.
        held_out: as in the runs.
        max_length: tokens of the window, those of a training sequence.
        bf16: autocast over fp32 weights, as runs compute; where the device is faster in it if None.
        trust_remote_code: run code that the model brings along.
    """
    from branchmix.data.packing import packing_method
    from branchmix.train.routers import RouterMonitor

    loaded = _Loaded(model, bf16, max_length, trust_remote_code)
    corpus = _corpus(sources, loaded.tokenizer, folder, held_out)
    # Found out without autocast, as runs do: what bf16 rounds away would be taken for other documents.
    monitor = RouterMonitor(loaded.model.config, list(sources))
    packing = packing_method(loaded.model) if monitor.options else None
    with loaded.computing.autocast():
        domains: Documents = {}
        for domain in sources:
            texts = corpus.held_out_texts(domain)
            domains[domain] = [list(score) for score, _ in loaded.documents(texts, max_length)]
        sequences = corpus.held_out(sequence_length=max_length)
        routed = _routing(loaded.model, sequences, monitor, packing) if packing else None
    return {"domains": domains, "routing": routed}


def measure_ensemble(
    models: Sequence[Path],
    sources: Mapping[str, Source],
    *,
    folder: Path,
    held_out: HeldOut,
    max_length: int,
    bf16: bool | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The same of an ensemble of models with one tokenizer, weighted by the posterior of the domain (BTM)."""
    from branchmix.evaluate.ensemble import ensemble_log_probs

    domains: Documents = {}
    logp: dict[str, list[list[np.ndarray]]] = {}
    for number, model in enumerate(models):
        loaded = _Loaded(model, bf16, max_length, trust_remote_code)
        corpus = _corpus(sources, loaded.tokenizer, folder, held_out)
        with loaded.computing.autocast():
            for domain in sources:
                found = loaded.documents(corpus.held_out_texts(domain), max_length)
                if not number:
                    domains[domain] = [list(score) for score, _ in found]
                logp.setdefault(domain, []).append([logp_T for _, logp_T in found])
    for domain, of_models in logp.items():
        for place, logp_ET in enumerate(zip(*of_models, strict=True)):
            domains[domain][place][0] = -float(ensemble_log_probs(np.stack(logp_ET)).sum())
    return {"domains": domains, "routing": None}


class _Loaded:
    """A model as it was trained: weights in fp32, matrix products in bf16 where the machine is faster in it."""

    def __init__(self, folder: Path, bf16: bool | None, max_length: int, trust_remote_code: bool):
        import torch
        from transformers import AutoConfig
        from transformers.utils import logging

        from branchmix.likelihood.loading import load, load_language_model, load_tokenizer
        from branchmix.likelihood.models import prefix_token
        from branchmix.models.chunked_branchmix import faster_in_bf16
        from branchmix.train.models import Computing, attention_options

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.computing = Computing(self.device, faster_in_bf16(self.device) if bf16 is None else bf16)
        config = load(AutoConfig, folder, trust_remote_code=trust_remote_code)
        options = attention_options(config.model_type, self.computing, max_length)
        model = load_language_model(folder, trust_remote_code=trust_remote_code, dtype=torch.float32, **options)
        self.model = model.eval().to(self.device)
        self.tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        self.prefix = prefix_token(self.tokenizer, self.model.config)

    def documents(self, texts: Sequence[str], max_length: int) -> list[tuple[tuple[float, int, int], np.ndarray]]:
        """Nats, tokens and bytes of each document, and the log-probabilities [T] of its tokens."""
        from branchmix.evaluate.perplexity import document_score, token_log_probs
        from branchmix.likelihood.models import encode

        tokens = encode(self.tokenizer, texts)
        found: list[Any] = [None] * len(texts)
        for number, logp_T in token_log_probs(
            self.model, tokens, prefix=self.prefix, max_length=max_length, stride=max_length
        ):
            score = document_score(texts[number], logp_T, self.tokenizer, tokens[number], self.prefix)
            found[number] = ((score.nll, score.tokens, score.bytes), np.asarray(logp_T))
        return [entry for entry in found if entry is not None]


def _corpus(sources: Mapping[str, Source], tokenizer: Any, folder: Path, held_out: HeldOut) -> Any:
    from branchmix.data.corpus import open_corpus

    return open_corpus(dict(sources), tokenizer, folder=folder, cache=None, held_out=held_out)


def _routing(model: Any, held_out: dict[str, Any], monitor: RouterMonitor, packing: Packing) -> dict[str, Any]:
    """Load of each expert by domain, of each layer's routers."""
    import torch

    from branchmix.data.packing import collate, packed_inputs
    from branchmix.train.losses import IGNORED

    with torch.inference_mode():
        for number, sequences in enumerate(held_out.values()):
            count = min(len(sequences), ROUTED_SEQUENCES)
            for start in range(0, count, BATCH):
                batch = collate([sequences[place] for place in range(start, min(start + BATCH, count))])
                batch = {name: value.to(model.device) for name, value in batch.items()}
                labels_BT = batch["labels"]
                domain_B = torch.full((len(labels_BT),), number, device=model.device)
                output = model(**packed_inputs(batch, packing), **monitor.options)
                monitor.add(output, domain_B, labels_BT != IGNORED)
    return monitor.read().as_dict()
