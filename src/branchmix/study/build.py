"""From a study's settings to its graph.

Budgets are exact: the steps of every run follow from the settings and the models' configs alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.json_text import key_of
from branchmix.data.config import Source
from branchmix.errors import RecipeError
from branchmix.recipe import Recipe
from branchmix.settings import overlaid
from branchmix.study.facts import step_cost
from branchmix.study.graph import (
    FORMAT,
    NEGLIGIBLE,
    About,
    Cost,
    Graph,
    Group,
    Needs,
    Role,
    Step,
    StepKind,
    has_routers,
)
from branchmix.study.methods import METHODS
from branchmix.study.mixtures import Mixtures, seed_config
from branchmix.study.settings import SEED, InstalledText, Method, StudyFile
from branchmix.train.config import NewModel
from branchmix.train.run_folder import FREE_TO_CHANGE

HELD_OUT_WHILE_TRAINING = 2048
"""Tokens of a domain that a run itself evaluates at its end; the scores are a step of their own."""
_HASHED_BYTES = 4 << 30
"""Text up to this size is known by its content, above by sizes and dates."""
_LATER: dict[str, Any] = {"routing": {"shared": False}, "gates": None, "start": "even"}
"""Options of recipes that came after `graph.FORMAT` 1, with the values that mean what was done before there were any.

Left out of keys at these values, so that a study which an older version began is resumed."""
_SEED_PHASE, _EXPERT_PHASE, _MIXTURE_PHASE = 0, 1, 2

Order = tuple[int, ...]
Config = dict[str, Any]


def build(study: StudyFile) -> Graph:
    """The graph of a study; reads configs and hashes of what is given, and no weights.

    Raises:
        BranchMixError: the seed or text is missing, or a recipe makes no sense.
    """
    return _Builder(study).build()


class _Builder:
    def __init__(self, study: StudyFile):
        self.study = study
        self.steps: dict[str, Step] = {}
        given = resolve(study.seed, study.folder) if isinstance(study.seed, str) else None
        self.given_identity = _identity_of_seed(given)
        self.seed_config = seed_config(study, given)
        self.mixtures = Mixtures(study, self.seed_config)
        self.per_step = study.step_tokens
        self.text = "text" if isinstance(study.data, InstalledText) else None

    # ---- the main path ----

    def build(self) -> Graph:
        study = self.study
        if isinstance(study.data, InstalledText):
            self._add("text", "text", study.data.model_dump(), Needs(), (0,))
        self.data = _identity_of_text(study)
        self.reference_cost = self._reference_cost()
        repetitions = range(len(study.random_seeds))
        for repetition in repetitions:
            self._dense_models(repetition)
        groups: tuple[tuple[Group, list[Method]], ...] = (("methods", study.methods), ("ablations", study.ablations))
        for number, (group, methods) in enumerate(groups, start=1):
            for repetition in repetitions:
                for place, method in enumerate(methods):
                    if method.repetitions is None or repetition < method.repetitions:
                        self._method(method, repetition, (number, repetition, place), group)
        self._routes()
        self._inference()
        return Graph(dict(sorted(self.steps.items(), key=lambda item: item[1].order)))

    def _dense_models(self, repetition: int) -> None:
        study, order = self.study, (1, repetition, -1)
        about = About("dense", repetition, "seed", "Seed", title=SEED)
        seed = self._seed_step(repetition)
        if isinstance(study.seed, NewModel):
            assert study.tokens.seed is not None
            new = study.seed.model_dump(exclude_unset=True) | {"model_type": study.seed.model_type}
            run = {"model": new, "mix": study.seed_mix or {study.general: 1.0}, **self._rate(1.0)}
            seed = self._train(
                Needs(), run, study.tokens.seed // self.per_step, _SEED_PHASE, order, self.seed_config, about
            )
        self._scores(seed, order, self.seed_config, about)
        for number, expert in enumerate(study.expert_names, start=1):
            about = About("dense", repetition, "expert", f"{expert.capitalize()} expert", title=expert)
            share = study.general_share if expert != study.general else 0.0
            mix = {expert: 1.0 - share, study.general: share} if share else {expert: 1.0}
            run = overlaid({"mix": mix, **self._rate(study.learning_rate.expert)}, study.expert_train)
            steps, place = study.tokens.expert // self.per_step, (*order, number)
            cost = step_cost(study, self.seed_config, study.expert_train)
            step = self._train(Needs(model=seed), run, steps, _EXPERT_PHASE, place, self.seed_config, about, cost)
            self._scores(step, (*place, 1), self.seed_config, about)

    def _method(self, method: Method, repetition: int, order: Order, group: Group) -> None:
        preset, title = METHODS[method.method], method.title
        about = About(
            group,
            repetition,
            "upcycle",
            method.label or preset.label,
            title=title,
            method=title,
            preset=method.method,
            what=preset.what,
            warning=preset.warning,
        )
        seed = self._seed_step(repetition)
        experts = {name: f"r{repetition + 1}.train.{name}" for name in self.study.expert_names}
        dense = ({SEED: seed} if seed else {}) | experts
        if preset.kind == "dense":
            self._runs(method, {}, seed, self.seed_config, order, about)
            return
        if preset.kind == "ensemble":
            options = {"members": [SEED, *experts], **self._evaluation(), **self.given_identity}
            about = replace(about, role="ensemble")
            name = f"r{repetition + 1}.scores.{title}"
            needs = Needs(self.text, members=dense)
            self._add(name, "ensemble", options, needs, (*order, 9), config=self.seed_config, about=about)
            return
        recipe = self.mixtures.recipe(method, self._random(repetition, _MIXTURE_PHASE))
        config, content = self.mixtures.config(recipe), _identity_of_recipe(recipe)
        names = [expert.name for expert in recipe.experts]
        needs = Needs(members={role: step for role, step in dense.items() if role in (SEED, *names)})
        options = {"recipe": content, "experts": names, **self.given_identity}
        if recipe.gates is not None:
            needs = replace(needs, text=self.text)
            options |= {"data": self.data, "held_out": {"share": self.study.held_out.share}}
        name = f"r{repetition + 1}.upcycle.{title}"
        self._add(name, "upcycle", options, needs, (*order, 0), recipe=content, config=config, about=about)
        same = next(step.name for step in self.steps.values() if step.key == self.steps[name].key)
        if same != name:  # another method measures the same merge, or trains it, in another way
            del self.steps[name]
        if preset.kind == "forced":
            self._scores(same, (*order, 1), config, replace(about, role="forced"), "forced")
        elif any(step.kind == "scores" and step.needs.model == same for step in self.steps.values()):
            pass
        elif preset.kind == "merge":
            self._scores(same, (*order, 1), config, replace(about, role="merge"))
        else:
            self._scores(same, (*order, 1), config, replace(about, role="step 0", title=f"{title}-step0"))
        if preset.kind == "mixture":
            self._runs(method, preset.train, same, config, (*order, 2), about)

    def _runs(
        self, method: Method, train: dict[str, Any], model: str | None, config: Config, order: Order, about: About
    ) -> None:
        """Training at equal data and at equal compute; where these are the same run, it is one."""
        study = self.study
        train = overlaid(train, method.train)
        is_reference = method.title == study.reference
        role: Role = "reference" if is_reference else "trained"
        reference_steps, total = self.reference_cost
        wanted = method.match if method.match is not None else METHODS[method.method].match
        per_step = step_cost(study, config, train)
        matches_of: dict[int, list[str]] = {}
        for match in ["dm"] if is_reference else wanted:
            steps = reference_steps
            if match == "cm" and abs(reference_steps * per_step.total - total) > NEGLIGIBLE * total:
                steps = total // per_step.total
            if steps < 1:
                raise RecipeError(
                    f"methods: {method.title}: one step costs more than all of {study.reference}: raise tokens.mixture"
                )
            matches_of.setdefault(steps, []).append(match)
        for number, (steps, matches) in enumerate(matches_of.items()):
            title = method.title if is_reference else f"{method.title}-{matches[0]}"
            matched = ["dm", "cm"] if is_reference else matches
            if steps == reference_steps and "dm" not in matched:  # equal data comes with equal compute
                matched = ["dm", *matched]
            run_about = replace(about, role=role, title=title, match=tuple(matched))
            run = overlaid({"mix": study.mix, **self._rate(study.learning_rate.mixture)}, train)
            place, needs = (*order, 2 * number), Needs(model=model)
            name = self._train(needs, run, steps, _MIXTURE_PHASE, place, config, run_about, per_step)
            self._scores(name, (*order, 2 * number + 1), config, run_about)

    # ---- kinds of steps ----

    def _train(
        self,
        needs: Needs,
        settings: dict[str, Any],
        steps: int,
        phase: int,
        order: Order,
        config: Config,
        about: About,
        per_step: Cost | None = None,
    ) -> str:
        """Adds a training run; returns its name."""
        study, name = self.study, f"r{about.repetition + 1}.train.{about.title}"
        if steps < 1:
            raise RecipeError(
                f"tokens: {name} has less than one step of {self.per_step:,} tokens: raise its budget, or lower "
                "batch_size"
            )
        run = {
            **study.run_of(settings),
            "held_out": {"share": study.held_out.share, "tokens": HELD_OUT_WHILE_TRAINING},
            "budget": {"steps": steps},
            "random_seed": self._random(about.repetition, phase),
        }
        run = json.loads(json.dumps(run))
        per_step = per_step or step_cost(study, config, {})
        cost = Cost(steps, steps * self.per_step, steps * per_step.flops, steps * per_step.optimizer)
        # What does not change the result is not part of the key.
        free = FREE_TO_CHANGE - {"micro_batch_size"} if has_routers(config) else FREE_TO_CHANGE
        options = {"run": {key: value for key, value in run.items() if key not in free}, "data": self.data}
        options |= self.given_identity if needs.model is None and "model" not in run else {}
        needs = replace(needs, text=self.text)
        self._add(name, "train", options, needs, order, run=run, config=config, cost=cost, about=about)
        return name

    def _scores(self, model: str | None, order: Order, config: Config, about: About, kind: StepKind = "scores") -> None:
        options = {**self._evaluation(), **(self.given_identity if model is None else {})}
        name, needs = f"r{about.repetition + 1}.scores.{about.title}", Needs(self.text, model)
        self._add(name, kind, options, needs, (*order, 99), config=config, about=about)

    def _routes(self) -> None:
        """Pages of the first repetition's routers, token by token: of a method's first trained run."""
        options = {name: value for name, value in self._evaluation().items() if name != "precision"}
        for number, method in enumerate(self.study.routes):
            run = next((step for step in self.steps.values() if _trains(step, method)), None)
            if run is None or run.about is None or not has_routers(run.config):
                trained = [m.title for m in self.study.all_methods if METHODS[m.method].kind == "mixture"]
                raise RecipeError(
                    f"routes: {method!r} is not a mixture that the study trains{nearest(method, trained)}; there are "
                    f"{', '.join(trained)}"
                )
            name, needs = f"r1.routes.{run.about.title}", Needs(self.text, run.name)
            self._add(name, "routes", options, needs, (8, number), config=run.config, about=run.about)

    def _inference(self) -> None:
        if self.study.inference is None:
            return
        models = {SEED: seed} if (seed := self._seed_step(0)) else {}
        models |= {
            step.about.method: step.name
            for step in self.steps.values()
            if step.kind == "upcycle" and step.about and (step.about.repetition, step.about.group) == (0, "methods")
        }
        options = {**self.study.inference.model_dump(), **self.given_identity}
        self._add("inference", "inference", options, Needs(members=models), (9,))

    def _add(self, name: str, kind: StepKind, options: dict[str, Any], needs: Needs, order: Order, **more: Any) -> None:
        """Adds a step; ``options`` are all that its result depends on, but for what it needs."""
        if name in self.steps:
            raise RecipeError(f"methods: two of them make {name}: give one another name")
        keys = {role: self.steps[needed].key for role, needed in needs.by_role().items()}
        key = key_of({"format": FORMAT, "kind": kind, "options": options, "needs": keys})
        self.steps[name] = Step(name, kind, needs, key, order, **more)

    # ---- parts ----

    def _random(self, repetition: int, phase: int) -> int:
        """Phases draw different numbers: an expert's general text is not the seed's first."""
        return 4 * self.study.random_seeds[repetition] + phase

    def _seed_step(self, repetition: int) -> str | None:
        return f"r{repetition + 1}.train.{SEED}" if isinstance(self.study.seed, NewModel) else None

    def _rate(self, ratio: float) -> dict[str, Any]:
        rate = self.study.learning_rate
        return {"learning_rate": {"peak": rate.peak * ratio, "warmup": rate.warmup, "final": rate.final}}

    def _evaluation(self) -> dict[str, Any]:
        study = self.study
        return {
            "held_out": study.held_out.model_dump(),
            "max_length": study.sequence_length,
            "precision": study.precision,
            "data": self.data,
        }

    def _reference_cost(self) -> tuple[int, int]:
        """Steps of the reference, and all its FLOPs."""
        study = self.study
        method = study.method(study.reference)
        preset = METHODS[method.method]
        config = self.seed_config
        if preset.kind != "dense":
            config = self.mixtures.config(self.mixtures.recipe(method, self._random(0, _MIXTURE_PHASE)))
        steps = study.tokens.mixture // self.per_step
        return steps, steps * step_cost(study, config, overlaid(preset.train, method.train)).total


def _trains(step: Step, method: str) -> bool:
    """Whether a step is a run of a method's first repetition."""
    return step.kind == "train" and step.about is not None and (step.about.repetition, step.about.method) == (0, method)


# ---------------------------------------------------------------------------------------------------------------------
# What distinguishes one seed, text or merge from another: part of the keys of all steps that depend on them
# ---------------------------------------------------------------------------------------------------------------------


def _identity_of_recipe(recipe: Recipe) -> dict[str, Any]:
    """JSON of all that a merge depends on, but for the models themselves."""
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude={"seed", "experts"})
    return _without(content, _LATER)


def _without(content: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A mapping without the keys that have their default, at any depth."""
    return {
        key: _without(value, default) if isinstance(default := defaults.get(key, ...), dict) else value
        for key, value in content.items()
        if value != defaults.get(key, ...)
    }


def _identity_of_seed(given: ResolvedModel | None) -> dict[str, Any]:
    """A given seed's revision on the Hub, or the hash of its folder; empty if a step trains the seed."""
    if given is None:
        return {}
    if given.revision:
        return {"seed": f"{given.given}@{given.revision}"}
    from branchmix.likelihood.records import model_hash

    return {"seed": model_hash(given.folder)}


def _identity_of_text(study: StudyFile) -> dict[str, Any]:
    """What the text of all domains depends on; that of a text step is in its key."""
    if isinstance(study.data, InstalledText):
        return {}
    return {name: _identity_of_source(source, study.folder) for name, source in study.data.items()}


def _identity_of_source(source: Source, folder: Path) -> dict[str, Any]:
    from branchmix.checkpoint.writer import FileHashes
    from branchmix.data.sources import find_files

    if source.files is None:
        return source.model_dump(exclude_none=True)
    patterns = [source.files] if isinstance(source.files, str) else source.files
    files = find_files(patterns, folder, exclude=source.exclude)
    if sum(file.stat().st_size for file in files) > _HASHED_BYTES:
        known: list[Any] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:
        with FileHashes(files) as hashes:
            known = [[file.name, hashes.of(file)] for file in files]
    return {"files": known, "column": source.column}
