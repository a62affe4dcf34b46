"""Document gates: what the document so far says about its domain, added to the logits of every router.

A token alone says little about its domain; the document so far says nearly everything. A table gives each token's
evidence for M domains, a causal decayed sum over the document becomes a posterior over domains, and the posterior
becomes logits of the experts: one set for all attention routers, one for all FFN routers, and one for the experts of
the trunk. The sum is kept in the KV
cache as one more layer, so that beam search, cropping, batching and offloading treat it like keys and values.

Saved with every checkpoint, so it imports only torch and transformers.
Shapes: B batch, T tokens, V vocabulary, M domains, E experts, N blocks of S tokens.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

LEAST_SHARE = 1e-13
"""Smallest share of an expert, which keeps its logit finite."""
MOST_SHARE = 0.999
"""Largest share that a sigmoid's logit stands for, so that the router can still learn, and the z-loss stays small."""
BLOCK = 64
"""Tokens that one matrix of decays covers; sums are carried from block to block."""


KINDS = ("attention", "ffn", "trunk")
"""What document gates have logits for: the two kinds of routers, and the experts of the trunk."""


class DocumentLogits(NamedTuple):
    """What a forward pass adds to the logits of all routers of a kind, and the logits of the trunk's experts:
    [B, T, E], or None where there are none."""

    attention: torch.Tensor | None
    ffn: torch.Tensor | None
    trunk: torch.Tensor | None = None
    head: torch.Tensor | None = None
    """The trunk's, for the tokens that the head sees."""


class DocumentState(NamedTuple):
    """Sums after each token [B, T, M] and the tokens' positions [B, T]."""

    sums: torch.Tensor
    positions: torch.Tensor


_THREAD = threading.local()  # and no module's: PEFT and DataParallel run copies of modules, servers several threads


def document_logits(kind: str) -> torch.Tensor | None:
    """The logits for ``attention``, ``ffn``, ``trunk`` or ``head`` in the forward pass that this thread runs; None
    without document gates."""
    logits = getattr(_THREAD, "logits", None)
    return None if logits is None else getattr(logits, kind)


@contextmanager
def run_with(logits: DocumentLogits | None) -> Iterator[None]:
    """Let routers and trunk read these logits inside the block."""
    before = getattr(_THREAD, "logits", None)
    _THREAD.logits = logits
    try:
        yield
    finally:
        _THREAD.logits = before


def narrow_head(rows_N: torch.Tensor, places_N: torch.Tensor) -> None:
    """Let the head of the forward pass that this thread runs see these tokens only, as [1, N]."""
    logits: DocumentLogits | None = getattr(_THREAD, "logits", None)
    if logits is not None and logits.head is not None:
        device = logits.head.device
        _THREAD.logits = logits._replace(head=logits.head[rows_N.to(device), places_N.to(device)][None])


class BranchMixDocumentGate(nn.Module):
    """Evidence of the document so far for each domain, and the experts that each domain wants.

    ``c_t = decay * c_(t-1) + evidence[x_t]``, ``p_t = softmax(prior + c_t)``, and ``log(softmax(A_kind) p_t)`` is added
    to the logits of the routers of a kind: each domain shares its gates among the experts, by a column of
    ``softmax(A_kind)``, and a document has the mean of its domains' shares. Routers with sigmoid scores get the
    log-odds of these shares instead, so that their scores are the shares too. A document begins where positions
    restart; padding carries no evidence. All of it is computed in fp32.

    Args:
        vocab_size: V, rows of the input embeddings.
        num_domains: M.
        num_experts: E.
        decay: factor on the sum for each token, 0 to 1. With 1 nothing is forgotten; otherwise about
            1 / (1 - decay) tokens are remembered.
        kinds: ``attention``, ``ffn`` and ``trunk``, those that the mixture routes.
        ffn_score: of the FFN routers; the others have ``softmax``.
    """

    counts: torch.Tensor

    def __init__(
        self,
        vocab_size: int,
        num_domains: int,
        num_experts: int,
        decay: float,
        kinds: tuple[str, ...],
        ffn_score: str = "softmax",
    ):
        super().__init__()
        self.decay = decay
        self.score_of = dict.fromkeys(KINDS, "softmax") | {"ffn": ffn_score}
        self.evidence = nn.Parameter(torch.empty(vocab_size, num_domains))
        self.prior = nn.Parameter(torch.empty(num_domains))
        for kind in KINDS:
            logits = nn.Parameter(torch.empty(num_experts, num_domains)) if kind in kinds else None
            self.register_parameter(kind, logits)
        # How often each token was counted in each domain: what the evidence is fitted from. Not used here.
        self.register_buffer("counts", torch.zeros(vocab_size, num_domains, dtype=torch.int32))

    def forward(
        self,
        input_ids: torch.Tensor,
        mask_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        cache: Any = None,
    ) -> tuple[DocumentLogits, DocumentState]:
        """Logits for every token, and what ``remember`` puts into the cache.

        Args:
            input_ids: [B, T].
            mask_BT: 0 for padding, wherever it is; may cover cached tokens too.
            positions_BT: the tokens' positions in their documents; consecutive if not given.
            cache: of the tokens before these, if there are any.
        """
        batch, length = input_ids.shape
        before = _last_state(cache)
        with torch.autocast(device_type=self.evidence.device.type, enabled=False):
            evidence_BTM = F.embedding(input_ids.to(self.evidence.device), self.evidence).float()
            restarts = positions_BT is not None
            if positions_BT is None:
                first_B = evidence_BTM.new_zeros(batch) if before is None else before.positions[:, -1] + 1
                positions_BT = first_B[:, None] + torch.arange(length, device=evidence_BTM.device)
            positions_BT = positions_BT.to(evidence_BTM.device).expand(batch, length)
            real_BT = None if mask_BT is None else (mask_BT[:, -length:] != 0).long().to(evidence_BTM.device)
            if real_BT is not None:  # real tokens first: what lies between two of them is of no document
                order_BT = real_BT.argsort(dim=1, descending=True, stable=True)
                evidence_BTM = evidence_BTM.gather(1, order_BT[..., None].expand_as(evidence_BTM))
                positions_BT = positions_BT.gather(1, order_BT)
            if before is None:
                before = DocumentState(torch.zeros_like(evidence_BTM[:, :1]), positions_BT[:, :1] - 1)
            positions_BT = torch.cat((before.positions, positions_BT), dim=1)
            starts_BT = positions_BT[:, 1:] != positions_BT[:, :-1] + 1 if restarts else None
            sums_BTM = decayed_sums(evidence_BTM, self.decay, starts_BT, before.sums[:, -1])
            if real_BT is None:
                positions_BT = positions_BT[:, 1:]
            else:  # each token back in its place, and padding with the state of the last real token before it
                sums_BTM = torch.cat((before.sums, sums_BTM), dim=1)
                last_BT = real_BT.cumsum(1)
                sums_BTM = sums_BTM.gather(1, last_BT[..., None].expand(-1, -1, sums_BTM.shape[-1]))
                positions_BT = positions_BT.gather(1, last_BT)
            posterior_BTM = (self.prior.float() + sums_BTM).softmax(-1)
            by_kind = ((getattr(self, kind), score) for kind, score in self.score_of.items())
            logits = DocumentLogits(
                *(None if A_EM is None else _mixed(posterior_BTM, A_EM, score) for A_EM, score in by_kind)
            )
        return logits, DocumentState(sums_BTM, positions_BT)

    def resize(self, vocab_size: int) -> None:
        """Follow the embeddings to another size; new tokens carry no evidence."""
        added = vocab_size - len(self.evidence)
        self.evidence = nn.Parameter(F.pad(self.evidence.data, (0, 0, 0, added)), self.evidence.requires_grad)
        self.counts = F.pad(self.counts, (0, 0, 0, added))


def _mixed(posterior_BTM: torch.Tensor, logits_EM: torch.Tensor, score: str = "softmax") -> torch.Tensor:
    """Logits whose scores are the experts' shares, [B, T, E]: log, or log-odds for sigmoids.

    Probabilities are mixed, not logits, or else a domain that is sure of its expert would decide for a document that is
    hardly of that domain.
    """
    shares_BTE = F.linear(posterior_BTM, logits_EM.float().softmax(0))
    if score == "sigmoid":
        return shares_BTE.clamp(LEAST_SHARE, MOST_SHARE).logit()
    return shares_BTE.clamp_min(LEAST_SHARE).log()


def decayed_sums(
    evidence_BTM: torch.Tensor, decay: float, starts_BT: torch.Tensor | None, carry_BM: torch.Tensor
) -> torch.Tensor:
    """``c_t = decay * c_(t-1) + evidence_t`` within each document, [B, T, M], in matrices of ``BLOCK`` tokens.

    Args:
        evidence_BTM: of each token.
        decay: 0 to 1.
        starts_BT: True for the first token of a document; None where none begins.
        carry_BM: the sum before the first token.
    """
    batch, length, num_domains = evidence_BTM.shape
    if length == 1:
        kept_BM = carry_BM if starts_BT is None else carry_BM * ~starts_BT
        return evidence_BTM + decay * kept_BM[:, None]
    size = min(BLOCK, length)
    num_blocks = -(-length // size)
    padded = F.pad(evidence_BTM, (0, 0, 0, num_blocks * size - length))
    blocks_BNSM = padded.view(batch, num_blocks, size, num_domains)
    within_SS = _decays(size, decay, evidence_BTM)
    across_NN = _decays(num_blocks, decay**size, evidence_BTM)  # from the sum before a block to a later block
    steps_S1 = torch.arange(1, size + 1, device=evidence_BTM.device).view(-1, 1)
    powers_S1 = torch.full_like(evidence_BTM[0, :1, :1], decay) ** steps_S1
    same = across_same = reached = evidence_BTM.new_ones(())  # 1 within one document
    if starts_BT is not None:
        document_BT = F.pad(starts_BT.long().cumsum(1), (0, num_blocks * size - length), mode="replicate")
        document_BNS = document_BT.view(batch, num_blocks, size)
        same = document_BNS[..., :, None] == document_BNS[..., None, :]
        last_BN = F.pad(document_BNS[:, :-1, -1], (1, 0))  # document 0 is the one that the carry belongs to
        across_same = last_BN[..., :, None] == last_BN[..., None, :]
        reached = (document_BNS == last_BN[..., None])[..., None]
    inner_BNSM = (within_SS * same) @ blocks_BNSM
    ends_BNM = torch.cat((carry_BM[:, None], inner_BNSM[:, :-1, -1]), dim=1)
    sums = inner_BNSM + powers_S1 * reached * ((across_NN * across_same) @ ends_BNM)[:, :, None]
    return sums.reshape(batch, num_blocks * size, num_domains)[:, :length]


def _decays(size: int, decay: float, like: torch.Tensor) -> torch.Tensor:
    """[size, size] matrix of ``decay^(t - s)`` for s <= t, 0 above."""
    steps = torch.arange(size, device=like.device)
    powers = torch.full((size, size), decay, dtype=like.dtype, device=like.device)
    return powers.pow((steps[:, None] - steps).clamp_min(0)) * (steps[:, None] >= steps)


# ---- The cache ----


class _DocumentLayer:
    """What both kinds have in common. It is never offloaded itself."""

    first_offloaded: Any = None
    """Of the layers of an offloading cache: the one to fetch after the model's last."""

    def prefetch(self) -> None:
        if self.first_offloaded is not None:
            self.first_offloaded.prefetch()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class BranchMixDocumentLayer(_DocumentLayer, DynamicLayer):
    """Sums [B, 1, T, M] as keys and positions [B, 1, T, 1] as values: a cropped cache finds its earlier sum."""


class BranchMixStaticDocumentLayer(_DocumentLayer, CacheLayerMixin):
    """The last sum and position only, in tensors that keep their address, beside layers of fixed size."""

    is_compileable = True
    supports_early_init = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., -1:, :].clone(), value_states[..., -1:, :].clone()
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys.copy_(key_states[..., -1:, :])
        self.values.copy_(value_states[..., -1:, :])
        return self.keys, self.values

    def reset(self) -> None:
        self.is_initialized = False
        self.keys = self.values = None  # type: ignore[assignment]

    def get_seq_length(self) -> int:
        return int(self.is_initialized)

    def get_max_length(self) -> int:
        return -1


def remember(cache: Any, state: DocumentState) -> None:
    """Add the state of the tokens of a forward pass to the cache that it filled.

    Raises:
        ValueError: the cache has no list of layers, such as that of servers with paged attention.
    """
    if cache is None:
        return
    layer = _document_layer(cache)
    if layer is None:
        layer = BranchMixStaticDocumentLayer() if cache.is_compileable else BranchMixDocumentLayer()
        if getattr(cache, "offloading", False):
            taken = (one for one in cache.layers if not (one.is_sliding and cache.only_non_sliding))
            layer.first_offloaded = next(taken, None)
        cache.layers.append(layer)
    layer.update(state.sums.detach()[:, None], state.positions[:, None, :, None].to(state.sums.dtype))


def _document_layer(cache: Any) -> Any:
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"{type(cache).__name__} cannot keep the state of document gates: {WITHOUT_STATE}")
    return layers[-1] if layers and isinstance(layers[-1], _DocumentLayer) else None


def _last_state(cache: Any) -> DocumentState | None:
    """The state after the last token of a cache, with T = 1; None if it is empty."""
    layer = None if cache is None else _document_layer(cache)
    if layer is None or not layer.is_initialized or layer.get_seq_length() == 0:
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "this cache was filled by another model, so it has no state of the document gates: start with an empty "
                "cache"
            )
        return None
    return DocumentState(layer.keys[:, 0, -1:], layer.values[:, 0, -1:, 0])


WITHOUT_STATE = "use transformers' generate, or gates without a state: branchmix calibrate MODEL --token-only"
"""What to do where a program keeps no state of the document."""


# ---- Blocks ----


class Documented:
    """A family's block that takes the document's logits as an argument, and lets its routers and experts of norms read
    them: gradient checkpointing calls a block again with the arguments that it had, when the forward pass is over.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, document_logits=getattr(_THREAD, "logits", None), **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, document_logits: DocumentLogits | None = None, **kwargs: Any) -> Any:
        with run_with(document_logits):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:  # its class has no name that pickle could find it by
        return _new_documented, (type(self).__bases__[1],), self.__dict__


@functools.cache
def documented(block_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a family's blocks, as ``Documented``."""
    return type(block_class.__name__, (Documented, block_class), {})


def _new_documented(block_class: Any) -> nn.Module:
    made = documented(block_class)
    return made.__new__(made)
