"""The models of a study from configs alone: what its methods merge into, how large that is, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from branchmix.accounting import active_parameters, flops_per_token, kv_cache_bytes_per_token, parameters, shape_of
from branchmix.accounting.shape import domain_router_of
from branchmix.checkpoint.families import dimensions, family_of, matrix_shapes
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.index import read_config
from branchmix.errors import RecipeError
from branchmix.recipe import STITCHED, Recipe
from branchmix.settings import overlaid, parse
from branchmix.study.graph import Cost
from branchmix.study.settings import Method, StudyFile
from branchmix.train.config import Balance, NewModel
from branchmix.train.schedule import counts_ahead, optimizer_flops, token_flops
from branchmix.upcycling.low_rank import matrices_of

Config = dict[str, Any]
DATA = "data.yaml"
"""The file of a step that names the study's text, such as for gates."""


def seed_config(study: StudyFile, given: ResolvedModel | None) -> Config:
    """The config of the seed that is given, or else of the new one.

    Raises:
        BranchMixError: there is no such model, or its keys make no new one.
    """
    from branchmix.train.models import new_config, training_tokenizer

    if given is not None:
        return read_config(given.folder)
    new = study.seed
    assert isinstance(new, NewModel)
    vocabulary = new.train_tokenizer
    if vocabulary is None:
        folder = resolve(new.tokenizer or "", study.folder)
        vocabulary = len(training_tokenizer(folder, trust_remote_code=study.trust_remote_code))
    return dict(new_config(new, vocabulary).to_dict())


@dataclass(frozen=True)
class Mixtures:
    """What the methods of a study merge into."""

    study: StudyFile
    seed_config: Config

    def recipe(self, method: Method, random_seed: int) -> Recipe:
        """A method's recipe, with names instead of models; ``random_seed`` is the routers'.

        Raises:
            RecipeError: its keys make no sense together.
        """
        study, preset, where = self.study, method.preset, f"method {method.title}"
        experts = [{"name": name, "model": name} for name in study.expert_names]
        own: dict[str, Any] = {"seed": "seed", "experts": experts, "routed_scaling_factor": "auto", "dtype": "float32"}
        fields = overlaid(own, study.recipe, preset.recipe, method.recipe)
        if fields.get("stitches") is not None:  # the study's experts, gates and averages are for other methods
            return parse(Recipe, {key: fields[key] for key in fields if key in STITCHED | method.recipe.keys()}, where)
        init = fields.get("router_init", {})
        init = {"method": init} if isinstance(init, str) else init
        if isinstance(init, dict):
            fields["router_init"] = {"seed": random_seed, **init}
        is_soup = fields.get("ffn") == "average" and fields.get("attention") in ("average", "seed")
        if is_soup and "gates" not in method.recipe:  # those of the study are for merges with experts
            fields.pop("gates", None)
        gates = fields.get("gates")
        if isinstance(gates, dict):
            if "data" in gates:
                raise RecipeError(f"{where}: gates.data: a study fits gates on its own text: leave it out")
            fields["gates"] = {"data": DATA, **gates}
        elif preset.kind == "forced":
            raise RecipeError(f"{where}: gates: the fit says which expert is the best one: give gates: {{}}")
        routing = fields.get("routing")
        if isinstance(routing, dict) and isinstance(routing.get("domains"), dict):
            if "data" in routing["domains"]:
                raise RecipeError(f"{where}: routing.domains.data: a study has its own text: leave it out")
            fields["routing"] = {**routing, "domains": {"data": DATA}}
        if "seed_copies" not in method.recipe:
            if method.method == "sparse-upcycling":
                fields["seed_copies"] = len(experts)
            if preset.larger is not None:
                fields |= self._larger(fields, preset.larger)
        return parse(Recipe, fields, where)

    def _larger(self, fields: dict[str, Any], match: str) -> dict[str, Any]:
        """Copies of the seed, and top-k, that come nearest to the parameters of BAM Expert KV."""
        goal = self.config(self.recipe(Method(method="bam-expert-kv"), 0))

        def larger(copies: int, top_k: int) -> dict[str, Any]:
            return {"seed_copies": copies, "routing": {"ffn": {"top_k": top_k, "normalize": False}}}

        def gap(count: Any, copies: int, top_k: int) -> int:
            config = self.config(parse(Recipe, fields | larger(copies, top_k), "recipe"))
            return abs(count(config).total - count(goal).total)

        copies = min(range(1, 17), key=lambda copies: gap(parameters, copies, 1))
        if match == "total":
            return {"seed_copies": copies}
        largest = 1 + len(fields["experts"]) + copies
        return larger(copies, min(range(1, largest + 1), key=lambda top_k: gap(active_parameters, copies, top_k)))

    def config(self, recipe: Recipe) -> Config:
        """The config of the mixture that a recipe makes."""
        attention = recipe.routing.attention.top_k if recipe.has_attention_experts else None
        config: Config = {
            "model_type": "branchmix",
            "seed_config": self.seed_config,
            **recipe.parts,
            "num_experts": len(recipe.expert_names),
            "num_experts_per_tok": recipe.num_experts_per_tok,
            "attention_num_experts_per_tok": attention,
            "shared_expert_weight": recipe.shared_expert_weight,
            "shared_router": recipe.routing.shared,
            "domain_router": domain_router_of(self.seed_config) if recipe.routing.domains else None,
            "stitches": recipe.stitched_layers(dimensions(self.seed_config).num_layers),
        }
        if recipe.is_low_rank:
            config["expert_ranks"] = self._ranks(recipe)
        if recipe.gates is None:
            return config
        from branchmix.upcycling.gates.fit import TopK

        own = TopK(recipe.num_experts_per_tok, True, 1.0, attention, True)
        fitted = own.calibrated(len(recipe.expert_names), keep_top_k=recipe.gates.keep_top_k)
        config |= {name: getattr(fitted, name) for name in ("num_experts_per_tok", "attention_num_experts_per_tok")}
        if not recipe.gates.token_only:  # the decay is fitted; it costs the same whatever it is
            config["document_gate"] = {"domains": self.study.domains, "decay": 1.0}
        return config

    def _ranks(self, recipe: Recipe) -> list[dict[str, list[int]]]:
        """The ranks that full fine-tunes are cut to; the seed's is 0.

        Raises:
            RecipeError: the ranks are found in the weights, which are not there when a study is planned.
        """
        if not isinstance(recipe.expert_rank, int):
            raise RecipeError("expert_rank: auto: a study needs to know sizes before it begins: give a number")
        shapes, ranks = matrix_shapes(dimensions(self.seed_config)), {}
        for matrix in matrices_of(family_of(self.seed_config), recipe.attention, recipe.ffn):
            rank = min(recipe.expert_rank, *shapes[matrix])
            ranks[matrix] = [0 if name == "seed" else rank for name in recipe.expert_names]
        return [ranks]


def step_cost(study: StudyFile, config: Config, train: dict[str, Any]) -> Cost:
    """What one optimizer step of a run costs; keys of ``train`` say what is trained.

    Raises:
        RecipeError: there is no formula for the family's FLOPs.
    """
    shares, lora, trained = None, 0, parameters(config).total
    if any(train.get(key) for key in ("freeze", "adapters", "lora")) or config.get("stitches"):
        shares, lora, trained = _what_is_trained(config, train)
    run = study.run_of(train)
    flops = token_flops(config, study.sequence_length, shares, lora, ahead=runs_ahead(run))
    if flops is None:
        model_type = config.get("seed_config", config)["model_type"]
        raise RecipeError(f"seed: there is no formula for the FLOPs of {model_type}, and no equal compute without")
    clips = run["optimizer"]["max_grad_norm"] > 0
    return Cost(1, study.step_tokens, flops.training * study.step_tokens, optimizer_flops(trained, clips=clips))


def runs_ahead(run: dict[str, Any]) -> bool:
    """Whether a run of one process with these settings counts the load of each step ahead."""
    balance = run.get("balance")
    accumulation = run["batch_size"] // (run.get("micro_batch_size") or run["batch_size"])
    return counts_ahead(Balance(**balance) if balance else None, accumulation)


def _what_is_trained(config: Config, train: dict[str, Any]) -> tuple[dict[str, float], int, int]:
    """Shares by part, LoRA's parameters, and all trained parameters, of a model without storage."""
    import torch

    from branchmix.train import trained_parts
    from branchmix.train.config import Lora
    from branchmix.train.schedule import shares_trained

    with torch.device("meta"):
        model = new_model(config)
    trained_parts.only_stitches(model, [key for key in ("freeze", "adapters") if train.get(key)])
    if train.get("adapters"):
        trained_parts.add_adapters(model)
    if lora := train.get("lora"):
        model = trained_parts.add_lora(model, parse(Lora, lora, "lora"))
    if named := train.get("freeze"):
        trained_parts.freeze(model, [named] if isinstance(named, str) else named)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return *shares_trained(model), trained


def new_model(config: Config, **options: Any) -> Any:
    """A dense model or a mixture of random weights, from a config with ``model_type`` (and ``seed_config``).

    ``options`` are those of ``from_config``, such as the attention that a run chooses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from branchmix.models import mixture_config

    logging.set_verbosity_error()
    is_mixture = config["model_type"] == "branchmix"
    fields = {key: value for key, value in config.items() if key != "model_type"}
    made = mixture_config(**fields) if is_mixture else AutoConfig.for_model(config["model_type"], **fields)
    return AutoModelForCausalLM.from_config(made, **options)


def facts_of(config: Config, context: int) -> dict[str, Any]:
    """Sizes of a model from its config: parameters, active ones, FLOPs of a token, bytes of its cache in bf16."""
    flops, counts, shape = flops_per_token(config, context), parameters(config), shape_of(config)
    layer, layers = flops.layer, shape.sizes.num_layers
    qkv = flops_per_token({**config, "attention_num_experts_per_tok": None}, context).layer.qkv // 2  # of all experts
    return {
        "parameters": counts.total,
        "active_parameters": active_parameters(config).total,
        "forward_flops_per_token": flops.total,
        "layer_flops": {**asdict(layer), "attention": layer.attention, "total": layer.total},
        # In the parts of the paper's Table 10; a matrix takes two FLOPs for each of its parameters.
        "layer_parameters": {
            "attention_router": shape.router_parameters * ("attention" in shape.routers),
            "qkv": qkv,
            "output": counts.attention // layers - qkv,
            "ffn_router": shape.router_parameters * ("ffn" in shape.routers),
            "ffn": counts.ffn // layers,
            **({"stitch": counts.stitches // layers} if shape.stitches else {}),  # mean of all layers
        },
        "experts": config.get("num_experts", 1),
        "top_k": config.get("num_experts_per_tok", 1),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config, "bfloat16"),
    }
