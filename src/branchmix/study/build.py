"""From a study's settings to its graph.

Budgets are exact: the steps of every run follow from the settings and the models' configs alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.hashes import key_of
from branchmix.checkpoint.hub import resolve
from branchmix.errors import RecipeError
from branchmix.settings import overlaid
from branchmix.study.facts import step_cost
from branchmix.study.graph import FORMAT, NEGLIGIBLE, About, Cost, Graph, Group, Kind, Role, Step, has_routers
from branchmix.study.identity import identity_of_recipe, identity_of_seed, identity_of_text
from branchmix.study.methods import METHODS
from branchmix.study.mixtures import Mixtures, seed_config
from branchmix.study.settings import InstalledText, Method, StudyFile
from branchmix.train.run_folder import FREE_TO_CHANGE

HELD_OUT_WHILE_TRAINING = 2048
"""Tokens of a domain that a run itself evaluates at its end; the scores are a step of their own."""


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
        self.given = resolve(study.seed, study.folder) if isinstance(study.seed, str) else None
        self.given_identity = identity_of_seed(self.given)
        self.seed_config = seed_config(study, self.given)
        self.mixtures = Mixtures(study, self.seed_config)
        self.per_step = study.step_tokens

    # ---- the main path ----

    def build(self) -> Graph:
        study = self.study
        if isinstance(study.data, InstalledText):
            self._add("text", "text", study.data.model_dump(), {}, (0,))
        self.data = identity_of_text(study)
        self.reference = self._reference_cost()
        for repetition in range(len(study.random_seeds)):
            self._dense_models(repetition)
        for group, methods in enumerate((study.methods, study.ablations)):
            for repetition in range(len(study.random_seeds)):
                for place, method in enumerate(methods):
                    if method.repetitions is None or repetition < method.repetitions:
                        order = (1 + group, repetition, place)
                        self._method(method, repetition, order, "ablations" if group else "methods")
        self._routes()
        self._inference()
        return Graph(dict(sorted(self.found.items(), key=lambda item: item[1].order)))

    def _dense_models(self, repetition: int) -> None:
        study = self.study
        order = (1, repetition, -1)
        about = About("dense", repetition, "seed", "Seed", title="seed")
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
                about=about,
            )
        self._scores({"model": seed} if seed else {}, order, self.seed_config, about)
        for number, expert in enumerate(study.expert_names):
            step = self._expert_step(expert, repetition)
            about = About("dense", repetition, "expert", f"{expert.capitalize()} expert", title=expert)
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
                    about=about,
                )
            self._scores({"model": step}, (*order, 1 + number, 1), self.seed_config, about)

    def _method(self, method: Method, repetition: int, order: tuple[int, ...], group: Group) -> None:
        study, preset = self.study, METHODS[method.method]
        about = About(
            group,
            repetition,
            "upcycle",
            method.label or preset.label,
            title=method.title,
            method=method.title,
            preset=method.method,
            what=preset.what,
            warning=preset.warning,
        )
        dense = {
            "seed": self._seed_step(repetition),
            **{name: self._expert_step(name, repetition) for name in study.expert_names},
        }
        needs = {role: name for role, name in dense.items() if name is not None}
        if preset.kind == "ensemble":
            options = {"members": ["seed", *study.expert_names], **self._evaluation(), **self.given_identity}
            name = f"{self._prefix(repetition)}scores.{method.title}"
            about = replace(about, role="ensemble")
            needs |= self._text()
            self._add(name, "ensemble", options, needs, (*order, 9), config=self.seed_config, about=about)
            return
        if preset.kind == "dense":
            self._runs(method, {}, needs.get("seed"), self.seed_config, order, about)
            return
        recipe = self.mixtures.recipe(method, self._random(repetition, 2))
        config = self.mixtures.config(recipe)
        content = identity_of_recipe(recipe)
        names = [expert.name for expert in recipe.experts]
        needs = {role: name for role, name in needs.items() if role in ("seed", *names)}
        name = f"{self._prefix(repetition)}upcycle.{method.title}"
        options = {"recipe": content, "experts": names, **self.given_identity}
        self._add(name, "upcycle", options, needs, (*order, 0), config=config, about=about)
        same = next((s.name for s in self.found.values() if s.key == self.found[name].key), name)
        if same != name:  # another method trains the same merge otherwise
            del self.found[name]
        else:
            if preset.kind == "merge":
                untrained = replace(about, role="merge")
            else:
                untrained = replace(about, role="step 0", title=f"{method.title}-step0")
            self._scores({"model": name}, (*order, 1), config, untrained)
        name = same
        if preset.kind == "mixture":
            self._runs(method, preset.train, name, config, (*order, 2), about)

    def _runs(
        self,
        method: Method,
        train: dict[str, Any],
        model: str | None,
        config: dict[str, Any],
        order: tuple[int, ...],
        about: About,
    ) -> None:
        """Training at equal data, compute, time; where two of these are the same run, it is one."""
        study, repetition = self.study, about.repetition
        train = overlaid(train, method.train)
        is_reference = method.title == study.reference
        reference_steps, total = self.reference
        wanted = method.match if method.match is not None else list(METHODS[method.method].match)
        per_step = step_cost(study, config, train)
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
            if steps == reference_steps and "dm" not in matched:  # equal data comes with equal compute
                matched = ["dm", *matched]
            needs = {"model": model} if model else {}
            role: Role = "reference" if is_reference else "trained"
            run_about = replace(about, role=role, title=title, match=tuple(matched))
            timed = {}
            if steps == "time":
                needs["clock"] = f"{self._prefix(repetition)}train.{study.reference}"
                timed = {"minutes_of": "clock"}
            name = f"{self._prefix(repetition)}train.{title}"
            self._train(
                name,
                overlaid({"mix": study.mix, **self._rate(study.learning_rate.mixture)}, train, timed),
                needs,
                steps=reference_steps if timed else steps,
                random_seed=self._random(repetition, 2),
                order=(*order, 2 * number),
                config=config,
                about=run_about,
                per_step=per_step,
            )
            self._scores({"model": name}, (*order, 2 * number + 1), config, run_about)

    # ---- kinds of steps ----

    def _train(
        self,
        name: str,
        settings: dict[str, Any],
        needs: dict[str, str],
        *,
        steps: int,
        random_seed: int,
        order: tuple[int, ...],
        config: dict[str, Any],
        about: About,
        per_step: Cost | None = None,
    ) -> None:
        study = self.study
        if steps < 1:
            raise RecipeError(
                f"tokens: {name} has less than one step of {self.per_step:,} tokens: raise its budget, or lower "
                "batch_size"
            )
        run = {
            **study.run_of(settings),
            "held_out": {"share": study.held_out.share, "tokens": HELD_OUT_WHILE_TRAINING},
            "budget": {"steps": steps},
            "random_seed": random_seed,
        }
        run = json.loads(json.dumps(run))
        per_step = per_step or step_cost(self.study, config, {})
        cost = Cost(steps, steps * self.per_step, steps * per_step.flops, steps * per_step.optimizer)
        options = {
            "run": run,
            "data": self.data,
            **(self.given_identity if "model" not in needs and "model" not in run else {}),
        }
        self._add(name, "train", options, {**needs, **self._text()}, order, config=config, cost=cost, about=about)

    def _scores(self, needs: dict[str, str], order: tuple[int, ...], config: dict[str, Any], about: About) -> None:
        name = f"{self._prefix(about.repetition)}scores.{about.title}"
        options = {**self._evaluation(), **(self.given_identity if "model" not in needs else {})}
        self._add(name, "scores", options, {**needs, **self._text()}, (*order, 99), config=config, about=about)

    def _routes(self) -> None:
        """Pages of the first repetition's routers, token by token: of a method's first trained run."""
        for number, method in enumerate(self.study.routes):
            run = next((step for step in self.found.values() if _trains(step, method)), None)
            if run is None or run.about is None or not has_routers(run.config):
                trained = [m.title for m in self.study.all_methods if METHODS[m.method].kind == "mixture"]
                raise RecipeError(
                    f"routes: {method!r} is not a mixture that the study trains{nearest(method, trained)}; there are "
                    f"{', '.join(trained)}"
                )
            name = f"{self._prefix(0)}routes.{run.about.title}"
            needs = {"model": run.name, **self._text()}
            options = {name: value for name, value in self._evaluation().items() if name != "precision"}
            self._add(name, "routes", options, needs, (8, number), config=run.config, about=run.about)

    def _inference(self) -> None:
        study = self.study
        if study.inference is None:
            return
        needs = {"seed": seed} if (seed := self._seed_step(0)) else {}
        needs |= {
            step.about.method: step.name
            for step in self.found.values()
            if step.kind == "upcycle" and step.about and (step.about.repetition, step.about.group) == (0, "methods")
        }
        options = {**study.inference.model_dump(), **self.given_identity}
        self._add("inference", "inference", options, needs, (9,))

    def _add(
        self, name: str, kind: Kind, options: dict[str, Any], needs: dict[str, str], order: tuple[int, ...], **more: Any
    ) -> None:
        options = json.loads(json.dumps(options))
        if name in self.found:
            raise RecipeError(f"methods: two of them make {name}: give one another name")
        counted = options
        if kind == "train":  # what does not change the result is no part of the key
            free = FREE_TO_CHANGE - {"micro_batch_size"} if has_routers(more["config"]) else FREE_TO_CHANGE
            counted = {**options, "run": {key: value for key, value in options["run"].items() if key not in free}}
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

    def _reference_cost(self) -> tuple[int, int]:
        """Steps of the reference, and all its FLOPs."""
        study = self.study
        method = study.method(study.reference)
        preset = METHODS[method.method]
        config = self.seed_config
        if preset.kind != "dense":
            config = self.mixtures.config(self.mixtures.recipe(method, self._random(0, 2)))
        steps = study.tokens.mixture // self.per_step
        return steps, steps * step_cost(study, config, overlaid(preset.train, method.train)).total


def _trains(step: Step, method: str) -> bool:
    """Whether a step is a run of a method's first repetition."""
    return step.kind == "train" and step.about is not None and (step.about.repetition, step.about.method) == (0, method)
