"""Runs a mixture over documents and counts what its routers do with every token, once, whatever the batches are.

Shapes: S counted tokens of a batch, N documents, V kinds of tokens, E experts, R routers, M experts shown of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from branchmix.errors import CheckpointError
from branchmix.evaluate.perplexity import BATCH_TOKENS, TokenWindow, batches, check_window, sorted_windows
from branchmix.likelihood.forward import evaluating, head_at, length_dependent, padded
from branchmix.likelihood.models import Progress
from branchmix.models.routers import RouterPlace, Rule, entropy_of, load_of

KINDS_OF_TOKENS = 8192
"""The most frequent ones, among which the typical tokens of an expert are looked for."""
SHOWN = 8
"""Experts of a token whose probability is kept for the page, at most: the chosen, and the strongest of the rest."""


class RouterCounts:
    """Sums of one router, in fp64, and what it does with the tokens to be shown."""

    def __init__(self, place: RouterPlace, read: Any, documents: int, kinds: int, shown: int):
        self.place, self.rule = place, Rule.found_in(read)
        experts, top_k = self.experts, self.top_k = read.logits_SE.shape[1], read.index_Sk.shape[1]
        self.load_NE = torch.zeros(documents, experts, dtype=torch.float64)
        """What a document's tokens give to each expert: 1/k to each chosen one, or the gates if all are chosen."""
        self.gates_NE = torch.zeros_like(self.load_NE)
        """Probabilities before top-k."""
        self.strongest_E = torch.zeros(experts, dtype=torch.float64)
        """Tokens whose strongest expert it is."""
        self.entropy_N = torch.zeros(documents, dtype=torch.float64)
        """Nats, of each token's probabilities."""
        self.load_VE = torch.zeros(kinds, experts, dtype=torch.float64)
        most = min(experts, max(top_k, SHOWN))
        self.shown_index_TM = np.zeros((shown, most), dtype=np.uint16)
        """Experts of each shown token: the chosen ones first, the strongest of them first; then the rest."""
        self.shown_gates_TM = np.zeros((shown, most), dtype=np.float32)

    def add(self, read: Any, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts a batch; returns probabilities and the strongest expert of each token, [S, E] and [S]."""
        rows_S = batch.rows_S.to(read.logits_SE.device)
        gates_SE = self.rule.probabilities(read.logits_SE[rows_S]).cpu()
        soft = self.top_k == self.experts
        load_SE = load_of(gates_SE, None if soft else read.index_Sk[rows_S].cpu())
        # The chosen before all others, whatever a bias or a group did to the choice.
        order_SE = gates_SE if soft else gates_SE + 2 * (load_SE > 0)
        strongest_S = order_SE.argmax(-1)
        self.load_NE.index_add_(0, batch.document_S, load_SE.double())
        self.gates_NE.index_add_(0, batch.document_S, gates_SE.double())
        self.entropy_N.index_add_(0, batch.document_S, entropy_of(gates_SE.double()))
        self.strongest_E += torch.bincount(strongest_S, minlength=self.experts)
        known, shown = batch.kind_S >= 0, batch.shown_S >= 0
        self.load_VE.index_add_(0, batch.kind_S[known], load_SE[known].double())
        if bool(shown.any()):
            index_SM = order_SE[shown].topk(self.shown_index_TM.shape[1], dim=-1).indices
            places = batch.shown_S[shown].numpy()
            self.shown_index_TM[places] = index_SM.numpy().astype(np.uint16)
            self.shown_gates_TM[places] = gates_SE[shown].gather(1, index_SM).numpy()
        return gates_SE, strongest_S


@dataclass(frozen=True)
class ModelCounts:
    """What all routers of a model do with the documents."""

    routers: list[RouterCounts]
    agreement: dict[int, tuple[float, float]]
    """By layer, over all tokens: how many of them the FFN router and the attention gate give to the same expert first,
    and the sum of the smaller of both probabilities."""
    tokens_N: np.ndarray
    kinds_V: np.ndarray
    """Token ids of the kinds, in the order of ``load_VE``."""
    count_V: np.ndarray


@dataclass(frozen=True)
class _Batch:
    size: int
    """Tokens of the forward pass, padding and context included."""
    rows_S: torch.Tensor
    """Which of them count."""
    document_S: torch.Tensor
    kind_S: torch.Tensor
    """Place among the kinds of tokens, or -1."""
    shown_S: torch.Tensor
    """Place among the shown tokens, or -1."""


@torch.inference_mode()
def count(
    model: Any,
    places: Sequence[RouterPlace],
    documents: Sequence[np.ndarray],
    *,
    prefix: int | None,
    max_length: int,
    shown: Sequence[int],
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> ModelCounts:
    """Every token of every document, once, with at least half a window before it in longer documents.

    The prefix is context for the first token and counts for none, and so does padding (on the right, where causal
    attention never sees it). No document may be empty; ``shown`` says how many of each one's first tokens are to be
    shown. Other arguments are those of ``token_log_probs``.
    """
    stride = max(1, max_length // 2)
    check_window(model, documents, max_length, stride)
    texts = _Texts(documents, prefix, shown)
    # Windows are made for predictions, and a row's last token makes none: here it counts.
    windows = sorted_windows([len(row) + 1 for row in texts.rows], max_length, stride)
    sizes = (len(documents), len(texts.kinds_V), sum(shown))
    routers: dict[str, RouterCounts] = {}
    gated = {place.layer for place in places if place.kind == "attention"}
    agreement = {place.layer: (0.0, 0.0) for place in places if place.kind == "ffn" and place.layer in gated}
    tokens_N = np.array([len(document) for document in documents], dtype=np.float64)
    done, total = 0, int(tokens_N.sum())
    outputs: dict[str, Any] = {}
    with evaluating(model), ExitStack() as stack:
        for place in places:
            stack.callback(place.module.register_forward_hook(partial(_keep, outputs, place.name)).remove)
        for chosen in batches(windows, batch_tokens, equal_lengths=length_dependent(model.config)):
            inputs_BT, batch = texts.batch(chosen)
            with head_at(model, torch.tensor([0]), torch.tensor([0])):  # nobody wants the logits
                model(input_ids=inputs_BT.to(model.device), use_cache=False)
            chosen_by = {}
            for place in places:
                read = _read(place, outputs, batch.size)
                if place.name not in routers:
                    routers[place.name] = RouterCounts(place, read, *sizes)
                chosen_by[place.kind, place.layer] = routers[place.name].add(read, batch)
            for layer, (same, overlap) in agreement.items():
                (ffn_SE, ffn_S), (gates_SE, gate_S) = (chosen_by[kind, layer] for kind in ("ffn", "attention"))
                if ffn_SE.shape == gates_SE.shape:
                    smaller_SE = torch.minimum(ffn_SE, gates_SE).double()
                    agreement[layer] = same + int((ffn_S == gate_S).sum()), overlap + float(smaller_SE.sum())
            done += len(batch.rows_S)
            if progress is not None:
                progress("tokens", done, total)
    return ModelCounts(list(routers.values()), agreement, tokens_N, texts.kinds_V, texts.count_V)


def _keep(outputs: dict[str, Any], name: str, module: Any, args: Any, output: Any) -> None:
    outputs.setdefault(name, output)


def _read(place: RouterPlace, outputs: dict[str, Any], size: int) -> Any:
    """What a router gave back for ``size`` tokens, which is taken out of the outputs."""
    if place.name not in outputs:
        raise CheckpointError(f"the router {place.name} was not asked about the text")
    read = place.read(outputs.pop(place.name))
    if len(read.logits_SE) != size:
        raise CheckpointError(f"the router {place.name} does not give one row of logits for each token")
    if not bool(torch.isfinite(read.logits_SE).all()):
        raise CheckpointError(f"the logits of {place.name} are not finite: the model's weights are broken")
    return read


class _Texts:
    """The documents as windows and batches."""

    def __init__(self, documents: Sequence[np.ndarray], prefix: int | None, shown: Sequence[int]):
        self._ahead = 0 if prefix is None else 1
        """Tokens of a row before the document's own."""
        self.rows = [row if prefix is None else np.concatenate(([prefix], row)) for row in documents]
        self._shown_N = np.asarray(shown)
        self._first_shown_N = np.cumsum([0, *shown])
        kinds, counts = np.unique(np.concatenate(documents), return_counts=True)
        common = np.sort(np.argsort(-counts, kind="stable")[:KINDS_OF_TOKENS])
        self.kinds_V, self.count_V = kinds[common], counts[common].astype(np.float64)
        self._place_of = np.full(int(kinds.max()) + 1, -1)
        self._place_of[self.kinds_V] = np.arange(len(common))

    def batch(self, windows: Sequence[TokenWindow]) -> tuple[torch.Tensor, _Batch]:
        """Inputs [B, T], padded on the right, and which of them are what."""
        inputs_BT = padded([self.rows[window.document][window.start : window.end] for window in windows])
        rows, documents, positions = [], [], []
        for row, window in enumerate(windows):
            counted = np.arange(max(window.first, self._ahead), window.end)
            rows.append(row * inputs_BT.shape[1] + counted - window.start)
            documents.append(np.full(len(counted), window.document))
            positions.append(counted - self._ahead)
        rows_S, document_S, position_S = map(np.concatenate, (rows, documents, positions))
        kind_S = self._place_of[inputs_BT.numpy().reshape(-1)[rows_S]]
        is_shown_S = position_S < self._shown_N[document_S]
        shown_S = np.where(is_shown_S, self._first_shown_N[document_S] + position_S, -1)
        return inputs_BT, _Batch(inputs_BT.numel(), *map(torch.from_numpy, (rows_S, document_S, kind_S, shown_S)))
