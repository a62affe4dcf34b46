"""What a model makes of held-out documents, domain by domain, where its routers send them, and what generation costs.

Documents are kept apart, so that two models can be compared document by document.
Shapes: B sequences, T tokens of a document.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers.utils import logging

from branchmix.checkpoint.companions import is_adapter
from branchmix.checkpoint.expressions import Stored
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import CheckpointIndex, TensorRef
from branchmix.data.config import Source
from branchmix.data.corpus import open_corpus
from branchmix.data.sequences import IGNORED, Packing, packing_method
from branchmix.errors import BranchMixError
from branchmix.evaluate.perplexity import score_documents
from branchmix.evaluate.scores import ScoredDocument, mixed
from branchmix.likelihood.loading import load_language_model
from branchmix.likelihood.models import TextModel
from branchmix.study.folder import rounded
from branchmix.study.settings import Inference, StudyFile
from branchmix.train.counters import RouterMonitor
from branchmix.train.measure import model_inputs
from branchmix.train.models import Computing, attention_options
from branchmix.train.schedule import part_of
from branchmix.upcycling.layers import cast
from branchmix.upcycling.lora import Adapter
from branchmix.upcycling.sources import DenseExpert

ROUTED_SEQUENCES = 64
"""Sequences of a domain, for the routing by domain."""
BATCH = 16

Scored = dict[str, list[ScoredDocument]]
"""By domain, every document that the model predicts."""


@dataclass(frozen=True)
class HeldOutText:
    """The held-out documents of a study's domains, and how models read them.

    Models compute as runs do: weights in fp32, matrix products as the study's precision says, or, if that is ``auto``,
    in bf16 where the device is faster in it. The ``measure`` functions return
    ``{"documents": {domain: [[nats, predicted tokens, bytes], ...]}, "routing": ...}``; only mixtures have a routing.
    """

    study: StudyFile
    """The window has the tokens of a training sequence."""
    sources: Mapping[str, Source]
    folder: Path
    """Where relative paths of the sources start from."""

    def measure(self, model: Path) -> dict[str, Any]:
        """Scores of one model, and the load of each expert by domain, of each layer's routers."""
        loaded, tokenizer, computing = self._load(model)
        # Found out without autocast, as runs do: what bf16 rounds away would be taken for other documents.
        monitor = RouterMonitor(loaded, list(self.sources))
        packing = packing_method(loaded) if monitor.options else None
        with computing.autocast():
            scored = self._scored(loaded, tokenizer)
            sequences = self._corpus(tokenizer).held_out(sequence_length=self.study.sequence_length)
            routing = _routing(loaded, sequences, monitor, packing) if packing else None
        return {"documents": _rows(scored), "routing": rounded(routing)}

    def measure_forced(self, model: Path, experts: Mapping[str, str]) -> dict[str, Any]:
        """Scores of a mixture with all gates forced to one expert, ``experts`` by domain."""
        loaded, tokenizer, computing = self._load(model)
        scored: Scored = {}
        with computing.autocast():
            for domain, expert in experts.items():
                scored |= self._scored(loaded.keep_experts([expert]), tokenizer, [domain])
        return {"documents": _rows({domain: scored[domain] for domain in self.sources}), "routing": None}

    def measure_ensemble(self, models: Sequence[Path]) -> dict[str, Any]:
        """Scores of models with one tokenizer together, weighted by the posterior of the domain (BTM)."""
        of_models: list[Scored] = []
        for model in models:
            loaded, tokenizer, computing = self._load(model)
            with computing.autocast():
                of_models.append(self._scored(loaded, tokenizer))
        by_domain = {domain: zip(*(scored[domain] for scored in of_models), strict=True) for domain in self.sources}
        together = {domain: [mixed(of_one) for of_one in documents] for domain, documents in by_domain.items()}
        return {"documents": _rows(together), "routing": None}

    def _load(self, folder: Path) -> tuple[Any, Any, Computing]:
        computing = Computing.of(self.study.precision, _device())
        model = TextModel(ResolvedModel(str(folder), folder), "float32", self.study.trust_remote_code)
        options = attention_options(model.config.model_type, computing, self.study.sequence_length)
        return model.load(**options), model.tokenizer, computing

    def _corpus(self, tokenizer: Any) -> Any:
        held_out = self.study.held_out
        return open_corpus(dict(self.sources), tokenizer, folder=self.folder, cache=None, held_out=held_out)

    def _scored(self, model: Any, tokenizer: Any, domains: Iterable[str] | None = None) -> Scored:
        corpus = self._corpus(tokenizer)
        scored = {}
        for domain in self.sources if domains is None else domains:
            texts = corpus.held_out_texts(domain)
            of_number = dict(score_documents(model, tokenizer, texts, max_length=self.study.sequence_length))
            scored[domain] = [of_number[number] for number in sorted(of_number)]
        return scored


def _device() -> Any:
    """A GPU if there is one; transformers' advice is turned off."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def distance(model: Path, seed: Path) -> dict[str, float]:
    """How far a model's attention and FFN went from its seed: the norm of the difference over that of the seed's.

    A part that cannot be compared is left out. A LoRA adapter changes nothing but what it adapts.
    """
    squares = {"attention": [0.0, 0.0], "ffn": [0.0, 0.0]}
    try:
        base = DenseExpert.open(seed.name, CheckpointIndex.open(seed))
        adapter = Adapter.read(model, base) if is_adapter(model) else None
        ours = base.tensors if adapter else DenseExpert.open(model.name, CheckpointIndex.open(model)).tensors
        for name, theirs in base.tensors.items():
            if (part := part_of(name)) in squares and name in ours and ours[name].shape == theirs.shape:
                went_from = _values(theirs)
                went = adapter.squared_change(name) if adapter else _square(_values(ours[name]) - went_from)
                for place, square in enumerate((went, _square(went_from))):
                    squares[part][place] += square
    except BranchMixError as error:  # the training that this is told about is done
        print(f"note: how far it went from the seed is not known: {error}", file=sys.stderr)
        return {}
    return {part: (went / size) ** 0.5 for part, (went, size) in squares.items() if size > 0 and isfinite(went / size)}


def _values(ref: TensorRef) -> Any:
    tensor = cast(Stored(ref), "F32")
    return tensor.rows(0, tensor.num_rows)


def _square(values: Any) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _rows(scored: Scored) -> dict[str, list[list[float]]]:
    return {
        domain: [[round(document.nll, 3), document.tokens, document.bytes] for document in documents]
        for domain, documents in scored.items()
    }


def _routing(model: Any, held_out: dict[str, Any], monitor: RouterMonitor, packing: Packing) -> dict[str, Any]:
    with torch.inference_mode():
        for number, sequences in enumerate(held_out.values()):
            rows = range(min(len(sequences), ROUTED_SEQUENCES))
            for start in rows[::BATCH]:
                batch = default_collate([sequences[place] for place in rows[start : start + BATCH]])
                inputs = model_inputs(batch, packing, model.device)
                labels_BT = inputs.pop("labels")
                output = model(**inputs, **monitor.options)
                monitor.add(output, torch.full_like(labels_BT[:, 0], number), labels_BT != IGNORED)
    return monitor.read().as_dict()


def measure_inference(
    models: Mapping[str, Path], settings: Inference, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Latency and KV memory of models, as in BAM's section 7.3: ``{name: {"seconds": [...], "kv_cache_bytes": ...}}``.

    Weights and cache are bf16 where the device is faster in it, else fp32; greedy, one sequence, random tokens. The
    first run is not timed. Models are timed in turn, run after run, so that a machine that becomes slower does so for
    all of them; they have to fit into memory together.
    """
    device = _device()
    dtype = torch.bfloat16 if Computing.of("auto", device).bf16 else torch.float32
    loaded = {
        name: load_language_model(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval().to(device)
        for name, folder in models.items()
    }
    options = {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    options |= {"max_new_tokens": settings.new_tokens, "min_new_tokens": settings.new_tokens}
    measured: dict[str, Any] = {name: {"seconds": []} for name in loaded}
    for run in range(settings.runs + 1):
        for name, model in loaded.items():
            vocabulary = model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(run)
            ids = torch.randint(0, vocabulary, (1, settings.prompt), generator=generator).to(device)
            begin = time.perf_counter()
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:
                measured[name]["seconds"].append(round(time.perf_counter() - begin, 5))
            cached = [kept for layer in output.past_key_values.layers for kept in (layer.keys, layer.values)]
            measured[name]["kv_cache_bytes"] = sum(kept.numel() * kept.element_size() for kept in cached)
    return {
        "models": measured,
        **settings.model_dump(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
