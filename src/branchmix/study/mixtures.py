"""From a study's methods to recipes and model configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from branchmix.accounting import active_parameters, parameters
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.errors import RecipeError
from branchmix.recipe import Recipe
from branchmix.settings import overlaid, parse
from branchmix.study.folder import DATA
from branchmix.study.methods import METHODS
from branchmix.study.settings import Method, StudyFile
from branchmix.train.config import NewModel


def seed_config(study: StudyFile, given: ResolvedModel | None) -> dict[str, Any]:
    """The config of the seed that is given, or else of the new one.

    Raises:
        BranchMixError: there is no such model, or its keys make no new one.
    """
    from branchmix.train.models import new_config, require_model_type, training_tokenizer

    if given is not None:
        return require_model_type(given)
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
    seed_config: dict[str, Any]

    def recipe(self, method: Method, random_seed: int) -> Recipe:
        """A method's recipe, with names instead of models; ``random_seed`` is the routers'.

        Raises:
            RecipeError: its keys make no sense together.
        """
        study, preset = self.study, METHODS[method.method]
        experts = [{"name": name, "model": name} for name in study.expert_names]
        fields = overlaid(
            {"seed": "seed", "experts": experts, "routed_scaling_factor": "auto", "dtype": "float32"},
            study.recipe,
            preset.recipe,
            method.recipe,
        )
        init = fields.get("router_init", {})
        init = {"method": init} if isinstance(init, str) else init
        if isinstance(init, dict):
            fields["router_init"] = {"seed": random_seed, **init}
        is_soup = fields.get("ffn") == "average" and fields.get("attention") in ("average", "seed")
        if is_soup and "gates" not in method.recipe:  # those of the study are for merges with experts
            fields.pop("gates", None)
        gates, where = fields.get("gates"), f"method {method.title}: gates"
        if isinstance(gates, dict):
            if "data" in gates:
                raise RecipeError(f"{where}.data: a study fits gates on its own text: leave it out")
            fields["gates"] = {"data": DATA, **gates}
        elif preset.kind == "forced":
            raise RecipeError(f"{where}: the fit says which expert is the best one: give gates: {{}}")
        if method.method == "sparse-upcycling" and "seed_copies" not in method.recipe:
            fields["seed_copies"] = len(experts)
        if preset.larger is not None and "seed_copies" not in method.recipe:
            fields |= self._larger(fields, preset.larger)
        return parse(Recipe, fields, f"method {method.title}")

    def _larger(self, fields: dict[str, Any], match: str) -> dict[str, Any]:
        """Copies of the seed, and top-k, that come nearest to the parameters of BAM Expert KV."""
        goal = self.config(self.recipe(Method(method="bam-expert-kv"), 0))

        def config(copies: int, top_k: int) -> dict[str, Any]:
            ffn = {"top_k": top_k, "normalize": False}
            return self.config(parse(Recipe, {**fields, "seed_copies": copies, "routing": {"ffn": ffn}}, "recipe"))

        total, active = parameters(goal).total, active_parameters(goal).total
        copies = min(range(1, 17), key=lambda n: abs(parameters(config(n, 1)).total - total))
        if match == "total":
            return {"seed_copies": copies}
        largest = 1 + len(fields["experts"]) + copies
        top_k = min(range(1, largest + 1), key=lambda k: abs(active_parameters(config(copies, k)).total - active))
        return {"seed_copies": copies, "routing": {"ffn": {"top_k": top_k, "normalize": False}}}

    def config(self, recipe: Recipe) -> dict[str, Any]:
        """The config of the mixture that a recipe makes."""
        attention = recipe.routing.attention.top_k if recipe.attention in ("kv_experts", "kv_sharing") else None
        config = {
            "model_type": "branchmix",
            "seed_config": self.seed_config,
            "attention": recipe.attention,
            "ffn": recipe.ffn,
            "num_experts": len(recipe.expert_names),
            "num_experts_per_tok": recipe.num_experts_per_tok,
            "attention_num_experts_per_tok": attention,
            "shared_router": recipe.routing.shared,
        }
        if recipe.gates is None:
            return config
        from branchmix.upcycling.gates.fit import Routing

        own = Routing(recipe.num_experts_per_tok, True, 1.0, attention, True)
        fitted = own.calibrated(len(recipe.expert_names), keep_top_k=recipe.gates.keep_top_k)
        config |= {name: getattr(fitted, name) for name in ("num_experts_per_tok", "attention_num_experts_per_tok")}
        if not recipe.gates.token_only:  # the decay is fitted; it costs the same whatever it is
            config["document_gate"] = {"domains": self.study.domains, "decay": 1.0}
        return config
