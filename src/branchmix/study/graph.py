"""The steps of a study: what each does, what it needs, what it costs, and the key that says whether it is done.

A key is a hash of a step's options and of the keys of what it needs, so a changed option changes the keys of just those
steps that depend on it. Budgets are exact: steps of every run follow from the settings and the models' configs alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from branchmix.accounting import flops_per_token, kv_cache_bytes_per_token, parameters, shape_of
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.data.config import Source
from branchmix.errors import RecipeError
from branchmix.recipe import Recipe
from branchmix.settings import parse
from branchmix.study.methods import METHODS
from branchmix.study.settings import InstalledText, Method, StudyFile
from branchmix.train.config import NewModel
from branchmix.train.outputs import FREE_TO_CHANGE
from branchmix.train.schedule import optimizer_flops, token_flops

Kind = Literal["text", "train", "upcycle", "scores", "ensemble", "inference"]
FORMAT = 1
"""Of keys and results: another one makes every step a new one."""
CURVE_POINTS = 60
"""Of a training run."""
NEGLIGIBLE = 0.005
"""Where as many tokens cost as many FLOPs to within this share, equal data and equal compute are one run."""
HELD_OUT_WHILE_TRAINING = 2048
"""Tokens of a domain that a run itself evaluates at its end; the scores are a step of their own."""


@dataclass(frozen=True)
class Cost:
    """What a training run takes, exactly."""

    steps: int = 0
    tokens: int = 0
    flops: int = 0
    """Forward and backward."""
    optimizer: int = 0
    """FLOPs of AdamW and clipping."""

    @property
    def total(self) -> int:
        """All FLOPs."""
        return self.flops + self.optimizer


@dataclass(frozen=True)
class Step:
    """A node of the graph."""

    name: str
    kind: Kind
    options: dict[str, Any]
    """JSON: everything that its result depends on, but for what it needs."""
    needs: dict[str, str]
    """Names of other steps, by the part they play."""
    key: str
    order: tuple[int, ...]
    """Steps begin in this order, where they can."""
    config: dict[str, Any] | None = None
    """Of the model that it makes or measures."""
    cost: Cost = Cost()
    about: dict[str, Any] = field(default_factory=dict)
    """For reports: method, label, match, repetition, group. No part of the key."""

    @property
    def folder(self) -> str:
        """Below ``OUT/steps``."""
        return f"{self.name}-{self.key[:10]}"


@dataclass(frozen=True)
class Graph:
    """All steps, in the order in which they begin."""

    steps: dict[str, Step]

    def dependents(self, name: str) -> list[Step]:
        """Steps that need this one."""
        return [step for step in self.steps.values() if name in step.needs.values()]

    def with_needs(self, names: Iterator[str] | list[str]) -> list[Step]:
        """These steps and all that they need."""
        wanted: set[str] = set()

        def take(name: str) -> None:
            if name not in wanted:
                wanted.add(name)
                for needed in self.steps[name].needs.values():
                    take(needed)

        for name in names:
            take(name)
        return [step for step in self.steps.values() if step.name in wanted]


def key_of(content: Any) -> str:
    """A short name for what a result depends on."""
    from xxhash import xxh3_128_hexdigest

    return str(xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def build(study: StudyFile) -> Graph:
    """The graph of a study; reads configs and hashes of what is given, and no weights.

    Raises:
        BranchMixError: the seed or text is missing, or a recipe makes no sense.
    """
    return _Builder(study).build()


class _Builder:
    def __init__(self, study: StudyFile):
        self.study = study
        self.found: dict[str, Step] = {}
        self.given: ResolvedModel | None = None
        if isinstance(study.seed, str):
            self.given = resolve(study.seed, study.folder)
        self.seed_config = self._seed_config()
        self.per_step = study.step_tokens

    # ---- the main path ----

    def build(self) -> Graph:
        study = self.study
        if isinstance(study.data, InstalledText):
            self._add("text", "text", study.data.model_dump(), {}, (0,))
        self.data = self._data_identity()
        self.reference = self._reference_cost()
        for repetition in range(len(study.random_seeds)):
            self._dense_models(repetition)
        for group, methods in enumerate((study.methods, study.ablations)):
            for repetition in range(len(study.random_seeds)):
                for place, method in enumerate(methods):
                    if method.repetitions is None or repetition < method.repetitions:
                        self._method(
                            method, repetition, (1 + group, repetition, place), "methods" if not group else "ablations"
                        )
        self._inference()
        return Graph(dict(sorted(self.found.items(), key=lambda item: item[1].order)))

    def _dense_models(self, repetition: int) -> None:
        study = self.study
        order = (1, repetition, -1)
        about = {"group": "dense", "repetition": repetition}
        seed = self._seed_step(repetition)
        if seed is not None and seed not in self.found:
            assert study.tokens.seed is not None
            new = study.seed.model_dump(exclude_unset=True) | {"model_type": study.seed.model_type}  # type: ignore[union-attr]
            self._train(
                seed,
                {"model": new, "mix": study.seed_mix or {study.general: 1.0}, **self._rate(1.0)},
                {},
                steps=study.tokens.seed // self.per_step,
                random_seed=self._random(repetition, 0),
                order=order,
                config=self.seed_config,
                about={**about, "role": "seed", "label": "Seed"},
            )
        self._scores(
            repetition,
            "seed",
            {"model": seed} if seed else {},
            order,
            self.seed_config,
            {**about, "role": "seed", "label": "Seed"},
        )
        for number, expert in enumerate(study.expert_names):
            step = self._expert_step(expert, repetition)
            label = f"{expert.capitalize()} expert"
            if step not in self.found:
                share = study.general_share if expert != study.general else 0.0
                self._train(
                    step,
                    {
                        "mix": {expert: 1.0 - share, study.general: share} if share else {expert: 1.0},
                        **self._rate(study.learning_rate.expert),
                    },
                    {"model": seed} if seed else {},
                    steps=study.tokens.expert // self.per_step,
                    random_seed=self._random(repetition, 1),
                    order=(*order, 1 + number),
                    config=self.seed_config,
                    about={**about, "role": "expert", "label": label},
                )
            self._scores(
                repetition,
                expert,
                {"model": step},
                (*order, 1 + number, 1),
                self.seed_config,
                {**about, "role": "expert", "label": label},
            )

    def _method(self, method: Method, repetition: int, order: tuple[int, ...], group: str) -> None:
        study, preset = self.study, METHODS[method.method]
        label = method.label or preset.label
        about = {
            "group": group,
            "repetition": repetition,
            "method": method.title,
            "preset": method.method,
            "label": label,
            "what": preset.what,
        }
        if preset.warning:
            about["warning"] = preset.warning
        dense = {
            "seed": self._seed_step(repetition),
            **{name: self._expert_step(name, repetition) for name in study.expert_names},
        }
        needs = {role: name for role, name in dense.items() if name is not None}
        if preset.kind == "ensemble":
            options = {"members": ["seed", *study.expert_names], **self._evaluation(), **self._given()}
            self._add(f"{self._prefix(repetition)}scores.{method.title}", "ensemble", options, {**needs, **self._text()}, (*order, 9),
                      config=self.seed_config, about={**about, "role": "ensemble"})  # fmt: skip
            return
        if preset.kind == "dense":
            self._runs(
                method, repetition, {}, needs["seed"] if "seed" in needs else None, self.seed_config, order, about
            )
            return
        recipe = self._recipe(method, repetition)
        config = self._mixture_config(recipe)
        content = recipe.model_dump(mode="json", exclude={"seed", "experts"})
        names = [expert.name for expert in recipe.experts]
        needs = {role: name for role, name in needs.items() if role in ("seed", *names)}
        name = f"{self._prefix(repetition)}upcycle.{method.title}"
        self._add(
            name,
            "upcycle",
            {"recipe": content, "experts": names, **self._given()},
            needs,
            (*order, 0),
            config=config,
            about={**about, "role": "upcycle"},
        )
        step_0 = {**about, "role": "merge" if preset.kind == "merge" else "step 0"}
        title = method.title if preset.kind == "merge" else f"{method.title}-step0"
        self._scores(repetition, title, {"model": name}, (*order, 1), config, step_0)
        if preset.kind == "mixture":
            self._runs(method, repetition, preset.train, name, config, (*order, 2), about)

    def _runs(
        self,
        method: Method,
        repetition: int,
        train: dict[str, Any],
        model: str | None,
        config: dict[str, Any],
        order: tuple[int, ...],
        about: dict[str, Any],
    ) -> None:
        """Training at equal data, compute, time; where two of these are the same run, it is one."""
        study = self.study
        train = {**train, **method.train}
        is_reference = method.title == study.reference
        reference_steps, total = self.reference
        wanted = method.match if method.match is not None else list(METHODS[method.method].match)
        per_step = self._step_cost(config, train)
        budgets: dict[Any, list[str]] = {}
        for match in ["dm"] if is_reference else wanted:
            if match == "time":
                budgets.setdefault("time", []).append(match)
                continue
            steps = reference_steps
            if match == "cm" and abs(reference_steps * per_step.total - total) > NEGLIGIBLE * total:
                steps = total // per_step.total
            if steps < 1:
                raise RecipeError(
                    f"methods: {method.title}: one step costs more than all of {study.reference}: raise tokens.mixture"
                )
            budgets.setdefault(steps, []).append(match)
        for number, (steps, matches) in enumerate(budgets.items()):
            title = method.title if is_reference else f"{method.title}-{matches[0]}"
            matched = ["dm", "cm", "time"] if is_reference else matches
            needs = {"model": model} if model else {}
            run_about = {**about, "match": matched, "role": "reference" if is_reference else "trained", "title": title}
            timed = {}
            if steps == "time":
                needs["clock"] = f"{self._prefix(repetition)}train.{study.reference}"
                timed = {"minutes_of": "clock"}
            name = f"{self._prefix(repetition)}train.{title}"
            self._train(
                name,
                {"mix": study.mix, **self._rate(study.learning_rate.mixture), **train, **timed},
                needs,
                steps=reference_steps if timed else steps,
                random_seed=self._random(repetition, 2),
                order=(*order, 2 * number),
                config=config,
                about=run_about,
                per_step=per_step,
            )
            self._scores(repetition, title, {"model": name}, (*order, 2 * number + 1), config, run_about)

    # ---- kinds of steps ----

    def _train(self, name: str, settings: dict[str, Any], needs: dict[str, str], *, steps: int, random_seed: int, order: tuple[int, ...],
               config: dict[str, Any], about: dict[str, Any], per_step: Cost | None = None) -> None:  # fmt: skip
        study = self.study
        if steps < 1:
            raise RecipeError(
                f"tokens: {name} has less than one step of {self.per_step:,} tokens: raise its budget, or lower batch_size"
            )
        run = {
            **study.train,
            **settings,
            "held_out": {"share": study.held_out.share, "tokens": HELD_OUT_WHILE_TRAINING},
            "sequence_length": study.sequence_length,
            "batch_size": study.batch_size,
            "budget": {"steps": steps},
            "optimizer": study.optimizer.model_dump(mode="json"),
            "random_seed": random_seed,
        }
        if study.micro_batch_size is not None:
            run["micro_batch_size"] = study.micro_batch_size
        if study.trust_remote_code:
            run["trust_remote_code"] = True
        run = json.loads(json.dumps(run))
        per_step = per_step or self._step_cost(config, {})
        cost = Cost(steps, steps * self.per_step, steps * per_step.flops, steps * per_step.optimizer)
        options = {
            "run": run,
            "data": self.data,
            **(self._given() if "model" not in needs and "model" not in run else {}),
        }
        self._add(name, "train", options, {**needs, **self._text()}, order, config=config, cost=cost, about=about)

    def _scores(
        self,
        repetition: int,
        title: str,
        needs: dict[str, str],
        order: tuple[int, ...],
        config: dict[str, Any],
        about: dict[str, Any],
    ) -> None:
        name = f"{self._prefix(repetition)}scores.{title}"
        options = {**self._evaluation(), **(self._given() if "model" not in needs else {})}
        self._add(
            name,
            "scores",
            options,
            {**needs, **self._text()},
            (*order, 99),
            config=config,
            about={**about, "title": title},
        )

    def _inference(self) -> None:
        study = self.study
        if study.inference is None:
            return
        needs = {"seed": seed} if (seed := self._seed_step(0)) else {}
        needs |= {
            step.about["method"]: step.name
            for step in self.found.values()
            if step.kind == "upcycle" and step.about["repetition"] == 0 and step.about["group"] == "methods"
        }
        self._add(
            "inference",
            "inference",
            {**study.inference.model_dump(), **self._given()},
            needs,
            (9,),
            about={"role": "inference"},
        )

    def _add(
        self, name: str, kind: Kind, options: dict[str, Any], needs: dict[str, str], order: tuple[int, ...], **more: Any
    ) -> None:
        options = json.loads(json.dumps(options))
        counted = options
        if kind == "train":  # what does not change the result is no part of the key
            counted = {
                **options,
                "run": {key: value for key, value in options["run"].items() if key not in FREE_TO_CHANGE},
            }
        keys = {role: self.found[needed].key for role, needed in needs.items()}
        key = key_of({"format": FORMAT, "kind": kind, "options": counted, "needs": keys})
        self.found[name] = Step(name, kind, options, needs, key, order, **more)

    # ---- parts ----

    def _prefix(self, repetition: int) -> str:
        return f"r{repetition + 1}."

    def _random(self, repetition: int, phase: int) -> int:
        """Phases draw different numbers: an expert's general text is not the seed's first."""
        first = {0: ("all",), 1: ("all", "experts"), 2: ("all", "experts", "mixtures")}[phase]
        return 4 * self.study.random_seeds[repetition if self.study.repeat in first else 0] + phase

    def _seed_step(self, repetition: int) -> str | None:
        if self.given is not None:
            return None
        return f"{self._prefix(repetition)}train.seed" if self.study.repeat == "all" else "train.seed"

    def _expert_step(self, name: str, repetition: int) -> str:
        return f"train.{name}" if self.study.repeat == "mixtures" else f"{self._prefix(repetition)}train.{name}"

    def _rate(self, ratio: float) -> dict[str, Any]:
        rate = self.study.learning_rate
        return {"learning_rate": {"peak": rate.peak * ratio, "warmup": rate.warmup, "final": rate.final}}

    def _evaluation(self) -> dict[str, Any]:
        study = self.study
        return {
            "held_out": study.held_out.model_dump(),
            "max_length": study.sequence_length,
            "precision": study.train.get("precision", "auto"),
            "data": self.data,
        }

    def _text(self) -> dict[str, str]:
        return {"text": "text"} if "text" in self.found else {}

    def _given(self) -> dict[str, Any]:
        """What identifies a seed that is not trained here."""
        if self.given is None:
            return {}
        if self.given.revision:
            return {"seed": f"{self.given.given}@{self.given.revision}"}
        from branchmix.evaluate.records import model_hash

        if not hasattr(self, "_hash"):
            self._hash = model_hash(self.given.folder)
        return {"seed": self._hash}

    def _seed_config(self) -> dict[str, Any]:
        from branchmix.train.models import new_config, require_model_type

        if self.given is not None:
            return require_model_type(self.given)
        new = self.study.seed
        assert isinstance(new, NewModel)
        vocabulary = new.train_tokenizer
        if vocabulary is None:
            from branchmix.train.models import load_tokenizer

            vocabulary = len(load_tokenizer(resolve(new.tokenizer or "", self.study.folder), trust_remote_code=False))
        return dict(new_config(new, vocabulary).to_dict())

    def _recipe(self, method: Method, repetition: int) -> Recipe:
        """Of a method, with names instead of models."""
        study, preset = self.study, METHODS[method.method]
        experts = [{"name": name, "model": name} for name in study.expert_names]
        fields: dict[str, Any] = {
            "seed": "seed",
            "experts": experts,
            "routed_scaling_factor": "auto",
            "dtype": "float32",
        }
        for further in (study.recipe, preset.recipe, method.recipe):
            for key, value in further.items():
                both = isinstance(value, dict) and isinstance(fields.get(key), dict)
                fields[key] = {**fields[key], **value} if both else value
        init = fields.get("router_init", {})
        init = {"method": init} if isinstance(init, str) else init
        fields["router_init"] = {"seed": self._random(repetition, 2), **init}
        if method.method == "sparse-upcycling" and "seed_copies" not in method.recipe:
            fields["seed_copies"] = len(experts)
        if preset.larger is not None and "seed_copies" not in method.recipe:
            fields |= self._larger(fields, preset.larger, repetition)
        return parse(Recipe, fields, f"method {method.title}")

    def _larger(self, fields: dict[str, Any], match: str, repetition: int) -> dict[str, Any]:
        """Copies of the seed, and top-k, that come nearest to the parameters of BAM Expert KV."""
        from branchmix.accounting import active_parameters

        goal = self._mixture_config(self._recipe(Method(method="bam-expert-kv"), repetition))

        def config(copies: int, top_k: int) -> dict[str, Any]:
            ffn = {"top_k": top_k, "normalize": False}
            return self._mixture_config(
                parse(Recipe, {**fields, "seed_copies": copies, "routing": {"ffn": ffn}}, "recipe")
            )

        total, active = parameters(goal).total, active_parameters(goal).total
        copies = min(range(1, 17), key=lambda n: abs(parameters(config(n, 1)).total - total))
        if match == "total":
            return {"seed_copies": copies}
        largest = 1 + len(fields["experts"]) + copies
        top_k = min(range(1, largest + 1), key=lambda k: abs(active_parameters(config(copies, k)).total - active))
        return {"seed_copies": copies, "routing": {"ffn": {"top_k": top_k, "normalize": False}}}

    def _mixture_config(self, recipe: Recipe) -> dict[str, Any]:
        attention = recipe.routing.attention.top_k if recipe.attention in ("kv_experts", "kv_sharing") else None
        return {
            "model_type": "branchmix",
            "seed_config": self.seed_config,
            "attention": recipe.attention,
            "ffn": recipe.ffn,
            "num_experts": len(recipe.expert_names),
            "num_experts_per_tok": recipe.num_experts_per_tok,
            "attention_num_experts_per_tok": attention,
        }

    def _step_cost(self, config: dict[str, Any], train: dict[str, Any]) -> Cost:
        """Of one optimizer step."""
        study = self.study
        shares, lora, trained = None, 0, None
        if train.get("freeze") or train.get("adapters"):
            shares, lora, trained = _what_is_trained(config, train)
        flops = token_flops(config, study.sequence_length, shares, lora)
        if flops is None:
            raise RecipeError(
                f"seed: there is no formula for the FLOPs of {self.seed_config['model_type']}, and no equal compute without"
            )
        if trained is None:
            trained = parameters(config).total
        clips = study.optimizer.max_grad_norm > 0
        return Cost(1, self.per_step, flops.training * self.per_step, optimizer_flops(trained, clips=clips))

    def _reference_cost(self) -> tuple[int, int]:
        """Steps of the reference, and all its FLOPs."""
        study = self.study
        method = study.method(study.reference)
        preset = METHODS[method.method]
        config = self.seed_config if preset.kind == "dense" else self._mixture_config(self._recipe(method, 0))
        steps = study.tokens.mixture // self.per_step
        return steps, steps * self._step_cost(config, {**preset.train, **method.train}).total

    def _data_identity(self) -> dict[str, Any]:
        """What the text of all domains depends on; that of a text step is in its key."""
        if isinstance(self.study.data, InstalledText):
            return {}
        return {name: _identity(source, self.study.folder) for name, source in self.study.data.items()}


_HASHED_BYTES = 4 << 30
"""Text up to this size is known by its content, above by sizes and dates."""


def _identity(source: Source, folder: Path) -> dict[str, Any]:
    from branchmix.checkpoint.hashes import FileHashes
    from branchmix.data.sources import find_files

    content = source.model_dump(exclude_none=True)
    if source.files is None:
        return content
    patterns = [source.files] if isinstance(source.files, str) else source.files
    files = find_files(patterns, folder, exclude=source.exclude)
    if sum(file.stat().st_size for file in files) > _HASHED_BYTES:
        known: list[Any] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:
        with FileHashes(files) as hashes:
            known = [[file.name, hashes.of(file)] for file in files]
    return {"files": known, "column": source.column}


def _what_is_trained(config: dict[str, Any], train: dict[str, Any]) -> tuple[dict[str, float], int, int]:
    """Shares by part, LoRA's parameters, and all trained parameters, of a model without storage."""
    import torch

    from branchmix.study.speed import new_model
    from branchmix.train.record import trained_parts

    with torch.device("meta"):
        model = new_model(config, bf16=False)
    if train.get("adapters"):
        from branchmix.train import adapters

        adapters.add(model)
    if train.get("freeze"):
        from branchmix.train import freeze

        named = train["freeze"]
        freeze.apply(model, [named] if isinstance(named, str) else named)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return *trained_parts(model), trained


def facts_of(config: dict[str, Any], context: int) -> dict[str, Any]:
    """Sizes of a model from its config: parameters, active ones, FLOPs of a token, bytes of its cache in bf16."""
    from branchmix.accounting import active_parameters

    flops = flops_per_token(config, context)
    return {
        "parameters": parameters(config).total,
        "active_parameters": active_parameters(config).total,
        "forward_flops_per_token": flops.total,
        "layer_flops": {
            **asdict(flops.layer),
            **{name: getattr(flops.layer, name) for name in ("attention", "total")},
        },
        "layer_parameters": _layer_parameters(config),
        "experts": config.get("num_experts", 1),
        "top_k": config.get("num_experts_per_tok", 1),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config, "bfloat16"),
    }


def _layer_parameters(config: dict[str, Any]) -> dict[str, int]:
    """Of one layer, in the parts of the paper's Table 10."""
    counts, layers = parameters(config), shape_of(config).sizes.num_layers
    one = flops_per_token(config, 8).layer
    return {
        "attention_router": one.attention_router // 2,
        "qkv": one.qkv // 2,
        "output": counts.attention // layers - one.qkv // 2,
        "ffn_router": one.ffn_router // 2,
        "ffn": counts.ffn // layers,
    }


def chosen(graph: Graph, only: list[str]) -> list[Step]:
    """Steps whose name, or a part of it between dots, is or fits one of ``only``; all if there are none; and needs.

    Raises:
        RecipeError: nothing fits.
    """
    from fnmatch import fnmatchcase

    from branchmix.checkpoint.families import nearest

    if not only:
        return list(graph.steps.values())
    names: list[str] = []
    for wanted in only:
        fitting = [
            name
            for name in graph.steps
            if fnmatchcase(name, wanted) or any(fnmatchcase(part, wanted) for part in name.split("."))
        ]
        if not fitting:
            parts = sorted({part for name in graph.steps for part in (name, *name.split("."))})
            raise RecipeError(f"--only: no step is called {wanted!r}{nearest(wanted, parts)}; --dry-run lists them all")
        names += fitting
    return graph.with_needs(names)


def relative(path: Path, start: Path) -> str:
    """For files that go on meaning the same when the whole study is moved."""
    return os.path.relpath(path, start)
