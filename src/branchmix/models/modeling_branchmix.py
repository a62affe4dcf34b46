"""BranchMix: a dense family's own transformers model, widened into a mixture of attention and FFN experts.

The model is the seed family's causal LM with two modules of every block replaced: attention by ``BranchMixAttention``
(all experts' heads in one attention call, gated and projected outside) and the FFN by ``BranchMixSparseMoeBlock``.
Rotary variants, masks, windows, norms, residuals, caches and generation stay the family's. BAM, arXiv 2408.08274.

Saved with every checkpoint, so it imports only torch, transformers and its neighbours.
Shapes: B batch, T tokens, E experts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import logging
from transformers.utils.output_capturing import OutputRecorder

from .attention_branchmix import BranchMixAttention, BranchMixExpertRotary, widen_attention
from .balance_branchmix import BranchMixBalance, Routed
from .chunked_branchmix import AUTOMATIC, CHUNKED
from .configuration_branchmix import BranchMixConfig
from .documents_branchmix import KINDS, WITHOUT_STATE, BranchMixDocumentGate, Documented, documented, remember, run_with
from .experts_branchmix import EXPERTS_AUTOMATIC, BranchMixExperts, BranchMixSparseMoeBlock, widen_ffn
from .kept_branchmix import generate_with_kept_experts, keep_experts
from .low_rank_branchmix import BranchMixLowRank
from .routing_branchmix import (
    BranchMixRouter,
    BranchMixRouterDomains,
    BranchMixRouterRows,
    BranchMixSharedRouter,
)
from .stitched_branchmix import BranchMixStitch, stitch
from .trunk_branchmix import BranchMixTrunkExperts, widen_trunk

logger = logging.get_logger(__name__)


# ---- Widening a dense model ----


def widen(model: Any, config: BranchMixConfig) -> None:
    """Replace attention and FFN of every block of a dense family model by experts, in place.

    Args:
        model: the family's causal LM, or its base model.
    """
    if config.stitches is not None:
        stitch(model, config, path_of_blocks(model, config))
        return
    layout = config.layout
    for layer, block in enumerate(blocks_of(model, config)):
        if config.has_attention_experts:
            setattr(block, layout["attention"], widen_attention(getattr(block, layout["attention"]), config, layer))
        if config.has_ffn_experts:
            widen_ffn(block, config, layer)
        if config.shared_router:
            attention = getattr(block, layout["attention"])
            own = attention.expert_gate
            attention.expert_gate = BranchMixSharedRouter(getattr(block, layout["ffn"]).gate, own.top_k, own.normalize)
    if config.expert_bias:
        for router in [module for module in model.modules() if isinstance(module, BranchMixRouter)]:
            router.add_bias()
    if config.trunk == "experts":
        widen_trunk(model, config)
    if config.expert_rope_parameters is not None:
        base = getattr(model, model.base_model_prefix, model)
        base.rotary_emb = BranchMixExpertRotary(base.rotary_emb, config.seed_config, config.expert_rope_parameters)


def blocks_of(model: Any, config: BranchMixConfig) -> Any:
    """The list of blocks of a family's causal LM or base model."""
    return model.get_submodule(path_of_blocks(model, config))


def path_of_blocks(model: Any, config: BranchMixConfig) -> str:
    """The name of that list in the model."""
    if not config.layout:
        raise ValueError("config.layout is empty: build the config with branchmix.models.mixture_config(seed_config)")
    path = str(config.layout["layers"])
    is_base = isinstance(model, _family_class(config.seed_config, causal_lm=False))
    return path.removeprefix(f"{model.base_model_prefix}.") if is_base else path


def document_gate(family: Any, config: BranchMixConfig) -> BranchMixDocumentGate | None:
    """The gate that all routers and the trunk of a widened family model share, whose blocks are made to read it; None
    where the config has none.

    Args:
        family: the family's causal LM or its base model, widened.
        config: of the mixture.
    """
    if config.document_gate is None:
        return None
    for block in blocks_of(family, config):
        if not isinstance(block, Documented):
            block.__class__ = documented(type(block))  # type: ignore[arg-type]
    trunk = any(isinstance(module, BranchMixTrunkExperts) for module in family.modules())
    has = {"attention": config.has_attention_experts, "ffn": config.has_ffn_experts, "trunk": trunk}
    return BranchMixDocumentGate(
        family.get_input_embeddings().weight.shape[0],
        len(config.document_gate["domains"]),
        config.num_experts,
        config.document_gate["decay"],
        tuple(kind for kind in KINDS if has[kind]),
        config.scoring_func,
    )


def router_domains(family: Any, config: BranchMixConfig) -> BranchMixRouterDomains | None:
    """The domains' embeddings that all routers of a widened family model share, connected to them; None where routers
    have weights of their own."""
    if config.domain_router is None:
        return None
    domains = BranchMixRouterDomains(config.num_experts, config.domain_router["width"])
    for module in family.modules():
        if isinstance(module, BranchMixRouterRows):
            module.domains = (domains,)
    return domains


def _family_class(seed_config: Any, *, causal_lm: bool) -> type[PreTrainedModel]:
    """The family's own model class.

    Imported here and not above: whoever imports transformers' auto classes may be registering this very module there.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    return (MODEL_FOR_CAUSAL_LM_MAPPING if causal_lm else MODEL_MAPPING)[type(seed_config)]


# ---- Sharding over devices ----


def parallel_plans(model: Any, layers: str) -> tuple[dict[str, str], dict[str, str]]:
    """Rules for tensor and for expert parallelism, by module name with ``*`` for the layer.

    The family's rules are kept except for the modules that were replaced. The experts' heads are sharded in storage and
    gathered for computation, as transformers does for Phi-3, because a rank's slice of heads would meet the gates of
    other experts. FFN experts are sharded along their inner width, except those with biases, since each rank would add
    the bias. Experts that are low-rank changes of the seed are not sharded, nor are stitched models.

    Args:
        model: a mixture, whose ``tp_plan`` is that of its family's model.
        layers: path of its list of blocks.
    """
    if model.config.stitches is not None:
        return {}, {}
    layout, first = model.config.layout, model.get_submodule(layers)[0]
    attention, ffn = getattr(first, layout["attention"]), getattr(first, layout["ffn"])
    # A rank's part of a vocabulary would need its own part of the choice: experts of the trunk are not sharded.
    whole = {re.sub(r"\.\d+\.", ".*.", n) for n, m in model.named_modules() if isinstance(m, BranchMixTrunkExperts)}
    replaced, tensor_rules, expert_rules = [], {}, {}
    if isinstance(attention, BranchMixAttention):
        replaced.append(layout["attention"])
        for name, module in attention.heads.named_children():
            if isinstance(module, nn.Linear):
                tensor_rules[f"{layout['attention']}.heads.{name}"] = "colwise_gather_output"
        if isinstance(attention.o_proj, nn.Linear):
            tensor_rules[f"{layout['attention']}.o_proj"] = "rowwise_split_input"
    if isinstance(ffn, BranchMixSparseMoeBlock):
        replaced += [layout["ffn"], layout["down"]]
    if isinstance(ffn, BranchMixSparseMoeBlock) and isinstance(ffn.experts, BranchMixExperts):
        path = f"{layout['ffn']}.experts"
        names = [name for name, _ in ffn.experts.named_parameters()]
        if not ffn.experts.has_bias:
            styles = {"gate_up_proj": "packed_colwise", "up_proj": "colwise", "down_proj": "rowwise"}
            tensor_rules |= {f"{path}.{name}": styles[name] for name in names} | {path: "moe_tp_experts"}
        expert_rules = {f"{path}.{name}": "grouped_gemm" for name in names} | {path: "ep_dispatch_experts"}
    block = f"{layers}.*."
    kept = {
        rule: style
        for rule, style in model.tp_plan.items()
        if not any(f"{rule}.".startswith(f"{block}{module}.") for module in replaced) and rule not in whole
    }
    tensor_rules = kept | {block + rule: style for rule, style in tensor_rules.items()}
    return tensor_rules, {block + rule: style for rule, style in expert_rules.items()}


# ---- Models ----


@dataclass
class BranchMixModelOutputWithPast(MoeModelOutputWithPast):
    """The usual outputs, and one [B * T, E] tensor a layer for each kind of router, if asked for."""

    attention_router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class BranchMixCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """The usual outputs, both routers' logits if asked for, and the losses of the FFN router (``aux_loss``,
    ``z_loss``, summed over layers and not weighted) when they were computed. ``loss`` contains them, weighted."""

    z_loss: torch.Tensor | None = None
    attention_router_logits: tuple[torch.Tensor, ...] | None = None


class BranchMixPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of mixtures. Tensor names are those of the seed's causal LM behind
    ``model.``; inside a block, attention is ``heads`` (all experts' heads), ``o_proj`` and ``expert_gate``."""

    config_class = BranchMixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["expert_bias", "router_domains"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"router_logits": OutputRecorder(BranchMixRouter, index=0)}
    document_gate: BranchMixDocumentGate | None
    balance: BranchMixBalance
    """How training balances the experts' load; a trainer may set another. Not saved."""
    _causal_lm: ClassVar[bool]

    def __init__(self, config: BranchMixConfig):
        asked_for = config._attn_implementation
        super().__init__(config)
        family = self._build_family(asked_for)
        # A base model has the name that the family's causal LM gives it, so that tensors have the same names in both.
        self._family_name = "model" if self._causal_lm else family.base_model_prefix
        self.add_module(self._family_name, family)
        self.document_gate = document_gate(family, config)
        self.router_domains = router_domains(family, config)
        self.balance = BranchMixBalance()
        self.post_init()
        layers = f"model.{config.layout['layers']}" if self._causal_lm else config.layout["layers"]
        self._tp_plan, self._ep_plan = parallel_plans(self, layers)

    @property
    def _family(self) -> PreTrainedModel:
        """The seed family's own model inside."""
        return getattr(self, self._family_name)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **settings: Any
    ) -> None:
        """Switches checkpointing on or off. Not reentrant: its forward pass has no graph, and the routers' losses are
        computed there.

        Raises:
            ValueError: it is reentrant.
        """
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "reentrant gradient checkpointing would train no router by its own losses: "
                'give gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **settings)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Routers N(0, initializer_range^2), experts like the family's other matrices, biases zero."""
        seed_config = self.config.seed_config
        std = getattr(seed_config, "initializer_range", None) or getattr(seed_config, "init_std", None) or 0.02
        for module in self.modules():
            if isinstance(module, BranchMixRouter) and module.expert_bias is not None:
                init.zeros_(module.expert_bias)
            if getattr(module, "_is_hf_initialized", False):
                continue
            if isinstance(module, BranchMixRouter):
                if module.weight is not None:
                    init.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, BranchMixRouterDomains):
                init.normal_(module.embeddings)
                init.zeros_(module.centre)
            elif isinstance(module, BranchMixExperts):
                for name, parameter in module.named_parameters(recurse=False):
                    init.zeros_(parameter) if name.endswith("_bias") else init.normal_(parameter, std=std)
            elif isinstance(module, BranchMixLowRank):
                for name, parameter in module.named_parameters(recurse=False):
                    zero = name in ("bias", "low_rank_B")
                    init.zeros_(parameter) if zero else init.normal_(parameter, std=std)
            elif isinstance(module, BranchMixAttention) and module.o_bias is not None:
                init.zeros_(module.o_bias)
            elif isinstance(module, BranchMixDocumentGate):
                for tensor in (*module.parameters(recurse=False), module.counts):
                    init.zeros_(tensor)
            elif isinstance(module, BranchMixStitch):
                for linear in (module.gate, *module.projections):
                    init.zeros_(linear.weight)
                    linear._is_hf_initialized = True  # else the family draws them at random
        super().initialize_weights()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As usual, and save this code next to the weights, so that the folder loads without branchmix installed.

        Raises:
            ValueError: some of a mixture's experts were kept, which share its tensors with those that were not.
        """
        if any(isinstance(module, BranchMixSparseMoeBlock) and module.rows is not None for module in self.modules()):
            raise ValueError(
                "these experts share tensors with the others of their mixture: branchmix remove-expert writes a "
                "mixture without the others"
            )
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            for file in Path(__file__).parent.glob("*_branchmix.py"):
                shutil.copyfile(file, Path(save_directory) / file.name)

    def get_input_embeddings(self) -> nn.Module:
        return self._family.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._family.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As usual; families that keep the vocabulary's size in an attribute compute their loss by it."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if hasattr(self._family, "vocab_size"):
            self._family.vocab_size = self.config.seed_config.vocab_size
        if self.document_gate is not None:
            self.document_gate.resize(len(embeddings.weight))
        return embeddings

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Where the trunk has experts, one after the other, as transformers does it; stitched models have one head."""
        tables, heads = self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(tables, BranchMixTrunkExperts):
            return super()._resize_token_embeddings(*args, **kwargs)
        have_heads = isinstance(heads, BranchMixTrunkExperts)
        for number, table in enumerate(tables):
            if number and not have_heads:
                tables[number] = self._get_resized_embeddings(table, *args, **kwargs)
                continue
            self.set_input_embeddings(table)
            if have_heads:
                self.set_output_embeddings(heads[number])
            tables[number] = super()._resize_token_embeddings(*args, **kwargs)
            if have_heads:
                heads[number] = self.get_output_embeddings()
        self.set_input_embeddings(tables)
        if have_heads:
            self.set_output_embeddings(heads)
        return tables

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers would look for experts in this file's source, but they are in another file."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Like transformers, but with branchmix's kernel as the default where it can run."""
        implementation = super().get_correct_experts_implementation(requested_experts)
        return EXPERTS_AUTOMATIC if requested_experts is None and implementation == "grouped_mm" else implementation

    def _build_family(self, attention: str | None) -> PreTrainedModel:
        """The seed family's model, widened, with the attention that was asked for.

        If none was asked for and the family supports torch's fused attention, use the one that chooses for each call.
        branchmix's names are set after construction, since Falcon and GPT-J look up a class by the name.

        Raises:
            ValueError: attention in chunks was asked for, of a dense attention that computes itself.
        """
        config, seed_config = self.config, self.config.seed_config
        if attention in (AUTOMATIC, CHUNKED):
            seed_config._attn_implementation_internal = None
        if config.document_gate is not None and attention == "vllm":
            raise ValueError(f"vLLM keeps no state of document gates between tokens: {WITHOUT_STATE}")
        model = _family_class(seed_config, causal_lm=self._causal_lm)(seed_config)
        widen(model, config)
        takes_any = config.has_attention_experts or model._can_set_attn_implementation()
        if attention in (AUTOMATIC, CHUNKED) and not takes_any:
            raise ValueError(
                f'{seed_config.model_type} has no attn_implementation="{attention}": use "sdpa" or "eager"'
            )
        if attention is None and seed_config._attn_implementation == "sdpa" and takes_any:
            attention = AUTOMATIC
        if attention in (AUTOMATIC, CHUNKED):
            config._attn_implementation_internal = seed_config._attn_implementation_internal = attention
        return model

    @contextmanager
    def _recorded_routers(self, wanted: bool) -> Iterator[dict[str, list[Routed]]]:
        """What both kinds of routers say, layer by layer, in the forward pass inside the block."""
        routed: dict[str, list[Routed]] = {"ffn": [], "attention": []}
        hooks = []
        if wanted:
            for module in self.modules():
                if isinstance(module, BranchMixRouter):
                    hooks.append(module.register_forward_hook(partial(_record, routed[module.kind])))
        try:
            yield routed
        finally:
            for hook in hooks:
                hook.remove()

    def _hidden_states(
        self, family: nn.Module, input_ids: torch.Tensor | None, output_router_logits: bool | None, **kwargs: Any
    ) -> BranchMixModelOutputWithPast:
        """The outputs of a family's base model, and both routers' logits if asked for."""
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        kwargs.pop("return_dict", None)
        with self._recorded_routers(wanted) as routed:
            outputs = self._run(family, input_ids=input_ids, **kwargs)
        return BranchMixModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=_logits(routed["ffn"]),
            attention_router_logits=_logits(routed["attention"]),
        )

    def _run(
        self,
        family: nn.Module,
        *,
        input_ids: torch.Tensor | None,
        document_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's outputs, with the document gate if there is one.

        Args:
            family: the family's model.
            input_ids: [B, T].
            document_mask: [B, T], 0 for padding, where ``attention_mask`` is not of that form.
            **kwargs: what the family takes.

        Raises:
            ValueError: there is a document gate, but no ids, or no place for its state.
        """
        gate = self.document_gate
        if gate is None:
            return family(input_ids=input_ids, return_dict=True, **kwargs)
        if input_ids is None:
            raise ValueError("the document gates of this mixture read token ids: give input_ids, not inputs_embeds")
        if kwargs.get("cache") is not None:  # transformers' continuous batching
            raise ValueError(f"continuous batching keeps no state of document gates between tokens: {WITHOUT_STATE}")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if document_mask is None and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            document_mask = mask
        logits, state = gate(input_ids, document_mask, kwargs.get("position_ids"), cache)
        if logits.trunk is not None:
            kept = kwargs.get("logits_to_keep", 0)
            logits = logits._replace(head=logits.trunk[:, slice(-kept, None) if isinstance(kept, int) else kept])
        with run_with(logits):
            outputs = family(input_ids=input_ids, return_dict=True, **kwargs)
        remember(outputs.get("past_key_values") if cache is None else cache, state)
        return outputs


def _record(routed: list[Routed], module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> None:
    routed.append(Routed(output[0].flatten(0, -2), module))


def _logits(routed: list[Routed]) -> tuple[torch.Tensor, ...] | None:
    return tuple(layer.logits_SE for layer in routed) or None


class BranchMixModel(BranchMixPreTrainedModel):
    """The mixture without its language-modelling head: the seed family's base model, widened."""

    _causal_lm = False

    def forward(
        self, input_ids: torch.Tensor | None = None, output_router_logits: bool | None = None, **kwargs: Any
    ) -> BranchMixModelOutputWithPast:
        """As the family's base model; ``output_router_logits`` adds both routers' logits."""
        return self._hidden_states(self._family, input_ids, output_router_logits, **kwargs)


class _Headless:
    """The family's base model inside a causal LM, as whoever needs hidden states calls it: with router logits."""

    def __init__(self, model: BranchMixForCausalLM):
        self._model = model

    def __call__(
        self, input_ids: torch.Tensor | None = None, output_router_logits: bool | None = None, **kwargs: Any
    ) -> BranchMixModelOutputWithPast:
        return self._model._hidden_states(self._model.model.base_model, input_ids, output_router_logits, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model.model.base_model, name)


class BranchMixForCausalLM(BranchMixPreTrainedModel, GenerationMixin):
    """A language model of attention experts and FFN experts: the seed family's own causal LM, widened."""

    _causal_lm = True
    model: Any

    @property
    def base_model(self) -> Any:
        """Returns ``last_hidden_state``, for trainers that compute the loss themselves (TRL)."""
        return _Headless(self)

    experts_at_inference: str | int | Sequence[str | int] | None = None
    """Which experts ``generate`` keeps for a prompt if its argument ``experts`` says nothing. None: all."""

    def keep_experts(self, experts: Sequence[str | int]) -> BranchMixForCausalLM:
        """This mixture with some of its experts only: see ``kept_branchmix.keep_experts``."""
        return keep_experts(self, experts)

    def use_top_k(self, top_k: int) -> None:
        """Let the FFN routers choose this number of experts from now on.

        A config that says so before loading would not do: routers that choose all experts have no ``expert_bias``.
        """
        self.config.routed_scaling_factor = self.config.scaling_for(self.config.num_experts, top_k)
        self.config.num_experts_per_tok = top_k
        for module in self.modules():
            if isinstance(module, BranchMixSparseMoeBlock):
                module.gate.top_k, module.scaling = top_k, self.config.routed_scaling_factor

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        experts: str | int | Sequence[str | int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' ``generate``; with ``experts``, each prompt runs on the experts that it keeps.

        Args:
            inputs, *args, **kwargs: as transformers has them.
            experts: ``auto``, how many, or which: see ``kept_branchmix.chosen_experts``.
        """
        wanted = self.experts_at_inference if experts is None else experts
        if wanted is None or (isinstance(wanted, int) and wanted == self.config.num_experts):
            return super().generate(inputs, *args, **kwargs)
        return generate_with_kept_experts(self, wanted, inputs, args, kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The family's own: Phi-3 drops its cache where its rotary factors change, be it an expert's own."""
        past = kwargs.get("past_key_values")
        if past is not None and hasattr(self.config.seed_config, "original_max_position_embeddings"):
            for rope in self.config.expert_rope_parameters or ():
                boundary = rope.get("original_max_position_embeddings", input_ids.shape[1])
                if past.get_seq_length() <= boundary < input_ids.shape[1]:
                    kwargs |= {"past_key_values": None, "next_sequence_length": None}
        inputs = self.model.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        mask, ids = kwargs.get("attention_mask"), inputs.get("input_ids")
        if self.document_gate is not None and mask is not None and ids is not None:  # static caches get masks of 4-D
            inputs["document_mask"] = mask[:, -ids.shape[1] :]
        return inputs

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> BranchMixCausalLMOutputWithPast:
        """As the family's causal LM, with BAM's losses (eq. 2) added to ``loss``.

        The router losses are added during training, and whenever router logits are requested. In all other cases
        ``loss`` is the plain negative log-likelihood, so that evaluations measure just that.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 for padding, which counts in no loss.
            position_ids: as the family has it. ``generate`` looks for this name, ``inputs_embeds`` and
                ``logits_to_keep`` in the signature: without it left padding shifts learned positions.
            past_key_values, inputs_embeds, use_cache, logits_to_keep: as the family has them.
            labels: [B, T], -100 where no loss is wanted.
            output_router_logits: return ``router_logits`` and ``attention_router_logits``, [B * T, E] for each layer.
            **kwargs: what the family takes. ``num_items_in_batch`` (from ``Trainer``) is the number of labels of the
                whole accumulated batch; the router losses are then weighted by this micro-batch's share of it.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        add_losses = labels is not None and (self.training or wanted)
        if self.training and labels is None and kwargs.get("num_items_in_batch") is not None:
            logger.warning_once(
                "Trainer computes the loss itself (label smoothing or compute_loss_func) and passes no labels: the "
                "mixture cannot add its router losses"
            )
        kwargs.pop("return_dict", None)
        with self._recorded_routers(wanted or add_losses or self.balance.is_counting) as routed:
            outputs = self._run(
                self.model,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        loss, aux_loss, z_loss = outputs.loss, None, None
        if self.balance.is_counting:
            self.balance.add_ahead(self.config, routed, attention_mask)
        elif wanted or add_losses:
            num_sequences = next(len(x) for x in (input_ids, inputs_embeds) if x is not None)
            in_step = add_losses and self.training and torch.is_grad_enabled()
            losses = self.balance.losses(
                self.config, routed, attention_mask, num_sequences=num_sequences, in_step=in_step
            )
            aux_loss, z_loss = losses.balance, losses.z
            if labels is not None and losses.weighted is not None:
                share = self.balance.share(losses, labels, kwargs.get("shift_labels"), kwargs.get("num_items_in_batch"))
                loss = loss + (losses.weighted * share).to(loss.device)
        return BranchMixCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=_logits(routed["ffn"]) if wanted else None,
            attention_router_logits=_logits(routed["attention"]) if wanted else None,
        )


__all__ = ["BranchMixForCausalLM", "BranchMixModel", "BranchMixPreTrainedModel"]
