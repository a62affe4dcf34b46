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


class DocumentLogits(NamedTuple):
    """What a forward pass adds to the logits of all routers of a kind, and the logits of the trunk's experts:
    [B, T, E], or None where there are none."""

    attention: torch.Tensor | None
    ffn: torch.Tensor | None
    trunk: torch.Tensor | None = None


class DocumentState(NamedTuple):
    """Sums after each token [B, T, M] and the tokens' positions [B, T]."""

    sums: torch.Tensor
    positions: torch.Tensor


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
        self.score_of = dict.fromkeys(DocumentLogits._fields, "softmax") | {"ffn": ffn_score}
        self.evidence = nn.Parameter(torch.empty(vocab_size, num_domains))
        self.prior = nn.Parameter(torch.empty(num_domains))
        for kind in DocumentLogits._fields:
            logits = nn.Parameter(torch.empty(num_experts, num_domains)) if kind in kinds else None
            self.register_parameter(kind, logits)
        # How often each token was counted in each domain: what the evidence is fitted from. Not used here.
        self.register_buffer("counts", torch.zeros(vocab_size, num_domains, dtype=torch.int32))
        self.logits: DocumentLogits | None = None
        """Logits of the forward pass that is running; blocks take them as an argument."""
        self.outside: tuple[tuple[nn.Module, bool], ...] = ()
        """Experts of the trunk that are in no block, and whether they are the head's."""

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
            mask_BT: 0 for padding; may cover cached tokens too.
            positions_BT: the tokens' positions in their documents; consecutive if not given.
            cache: of the tokens before these, if there are any.
        """
        batch, length = input_ids.shape
        before = _last_state(cache)
        with torch.autocast(device_type=self.evidence.device.type, enabled=False):
            evidence_BTM = F.embedding(input_ids.to(self.evidence.device), self.evidence).float()
            if mask_BT is not None:
                evidence_BTM = evidence_BTM * mask_BT[:, -length:, None].to(evidence_BTM)
            if positions_BT is None:
                first_B = evidence_BTM.new_zeros(batch) if before is None else before.positions[:, -1] + 1
                steps_T = torch.arange(length, device=evidence_BTM.device)
                positions_BT, starts_BT = first_B[:, None] + steps_T, None
            else:
                positions_BT = positions_BT.to(evidence_BTM.device).expand(batch, length)
                previous_B1 = positions_BT[:, :1] - 1 if before is None else before.positions[:, -1:]
                starts_BT = positions_BT != torch.cat((previous_B1, positions_BT[:, :-1]), dim=1) + 1
            carry_BM = None if before is None else before.sums[:, -1]
            sums_BTM = decayed_sums(evidence_BTM, self.decay, starts_BT, carry_BM)
            posterior_BTM = (self.prior.float() + sums_BTM).softmax(-1)
            by_kind = ((getattr(self, kind), score) for kind, score in self.score_of.items())
            logits = DocumentLogits(
                *(None if A_EM is None else _mixed(posterior_BTM, A_EM, score) for A_EM, score in by_kind)
            )
        return logits, DocumentState(sums_BTM, positions_BT)

    def tell(self, logits: DocumentLogits | None, logits_to_keep: int | torch.Tensor = 0) -> None:
        """Hand the logits of a forward pass to all who read them; None when it is over.

        Args:
            logits: for every token.
            logits_to_keep: the tokens that the head sees, as in the family's ``forward``.
        """
        self.logits = logits
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        trunk: Any = None if logits is None else logits.trunk
        for module, is_head in self.outside:
            module.document_logits = trunk[:, kept] if is_head and trunk is not None else trunk

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
    evidence_BTM: torch.Tensor, decay: float, starts_BT: torch.Tensor | None, carry_BM: torch.Tensor | None
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
        if carry_BM is None:
            return evidence_BTM
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
    if carry_BM is None:
        carry_BM = evidence_BTM.new_zeros(batch, num_domains)
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


class BranchMixDocumentLayer(DynamicLayer):
    """Sums [B, 1, T, M] as keys and positions [B, 1, T, 1] as values: a cropped cache finds its earlier sum."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class BranchMixStaticDocumentLayer(CacheLayerMixin):
    """The last sum and position only, in tensors that keep their address, beside layers of fixed size."""

    is_compileable = True
    supports_early_init = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., -1:, :].clone(), value_states[..., -1:, :].clone()
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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

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
        cache.layers.append(layer)
    layer.update(state.sums.detach()[:, None], state.positions[:, None, :, None].to(state.sums.dtype))


def _document_layer(cache: Any) -> Any:
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"{type(cache).__name__} cannot keep the state of document gates: {WITHOUT_STATE}")
    kinds = (BranchMixDocumentLayer, BranchMixStaticDocumentLayer)
    return layers[-1] if layers and isinstance(layers[-1], kinds) else None


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


@functools.cache
def documented(block_class: type[nn.Module]) -> type[nn.Module]:
    """A family's block whose routers, and experts of norms, get the document's logits as an argument of the block.

    It finds them in ``_document_readers``, with what they are (``attention``, ``ffn`` or ``trunk``), and the logits in
    the gate that is the one element of ``_document_gate``: a tuple, so that weights keep one name.
    As an argument, because gradient checkpointing calls a block again with the arguments that it had: by then the
    model may hold the logits of a later forward pass.
    """

    class Documented(block_class):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, document_logits=self._document_gate[0].logits, **kwargs)

        def forward(self, *args: Any, document_logits: DocumentLogits | None = None, **kwargs: Any) -> Any:
            for kind, reader in self._document_readers:
                reader.document_logits = None if document_logits is None else getattr(document_logits, kind)
            outputs = super().forward(*args, **kwargs)
            for _, reader in self._document_readers:
                reader.document_logits = None
            return outputs

        def __reduce__(self) -> Any:  # the class itself has no name that pickle could find it by
            return _new_documented, (block_class,), self.__dict__

    Documented.__name__, Documented.__qualname__ = block_class.__name__, block_class.__qualname__
    return Documented


def _new_documented(block_class: Any) -> nn.Module:
    made = documented(block_class)
    return made.__new__(made)
