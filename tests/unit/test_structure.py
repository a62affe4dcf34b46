"""What holds the package together: who may import whom, what loads fast, what travels, and lists that must agree."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import branchmix
from branchmix.accounting.shape import MIXTURE_DEFAULTS
from branchmix.checkpoint.families import families, family_of
from branchmix.models import configuration_branchmix
from branchmix.upcycling import execute, plan
from families import FAMILIES as TINY

ROOT = Path(branchmix.__file__).parent
LEVELS = {
    "errors": 0,
    **dict.fromkeys(
        ("checkpoint", "settings", "models", "accounting", "recipe", "data", "pages", "likelihood", "statistics"), 1
    ),
    **dict.fromkeys(("upcycling", "train", "evaluate", "scaling"), 2),
    **dict.fromkeys(("study", "export"), 3),
    "cli": 4,
}
"""cli -> {study, export} -> {upcycling, train, ...} -> {checkpoint, models, data, pages, ...} -> errors."""
ENTRANCES = {"__init__", "__main__", "_registration"}
"""The package's own doors: they name everything, lazily."""
FILES = sorted(ROOT.rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """Absolute names of all imported modules, those inside functions too, each with the name taken from it."""
    package = ("branchmix", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from ((module, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_dependencies_point_one_way(file: Path) -> None:
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in ENTRANCES:
        return
    for module, name in imports(file):
        if module == "branchmix":
            assert name == "__version__", f"imports {name} from the package's door"
        elif module.startswith("branchmix."):
            other = module.split(".")[1]
            assert other == part or other in LEVELS, f"{module}: has no level"
            # Parts of one level don't use each other, but for the first level's own ground floor.
            below = LEVELS[other] < LEVELS[part] or other in ("checkpoint", "settings")
            assert other == part or below, f"{part} imports {module}"


def test_there_is_no_circle_of_files() -> None:
    """Imports inside functions and for type checkers count too; those of the package's doors do not."""
    files = [file for file in FILES if file.relative_to(ROOT).parts[0].removesuffix(".py") not in ENTRANCES]
    names = {".".join(("branchmix", *file.relative_to(ROOT).with_suffix("").parts)): file for file in files}
    modules = {name.removesuffix(".__init__"): file for name, file in names.items()}
    uses = {
        name: {f"{module}.{taken}" if f"{module}.{taken}" in modules else module for module, taken in imports(file)}
        & (modules.keys() - {name})
        for name, file in modules.items()
    }
    assert "branchmix.checkpoint.folder" in uses["branchmix.pages.pictures"]
    list(TopologicalSorter(uses).static_order())  # a circle is an error that names it


def test_whether_strangers_code_runs_is_always_said() -> None:
    """transformers' Auto classes ask on the terminal where it is left open."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if not (isinstance(called, ast.Attribute) and called.attr == "from_pretrained"):
                continue
            if isinstance(called.value, ast.Name) and called.value.id.startswith("Auto"):
                said = {keyword.arg for keyword in node.keywords}
                assert "trust_remote_code" in said, f"{file.name}, line {node.lineno}"


def test_every_part_has_a_level() -> None:
    parts = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES}
    assert parts - ENTRANCES <= LEVELS.keys()


def test_checkpoint_needs_nothing_above_it() -> None:
    for file in (ROOT / "checkpoint").glob("*.py"):
        above = [name for name, _ in imports(file) if name.startswith("branchmix.")]
        assert all(name.split(".")[1] in ("checkpoint", "errors") for name in above), file.name


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh process after ``code``."""
    script = f"import sys\n{code}\nprint('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


LIGHT = [
    *(f"branchmix.checkpoint.{file.stem}" for file in (ROOT / "checkpoint").glob("*.py") if file.stem != "__init__"),
    "branchmix.upcycling.plan",
    "branchmix.upcycling.edit_experts",
    "branchmix.export",
    "branchmix.accounting",
    "branchmix.recipe",
    "branchmix.settings",
    "branchmix.train.config",
    "branchmix.cli",
]


def test_planning_needs_neither_torch_nor_transformers() -> None:
    loaded = modules_after("\n".join(f"import {name}" for name in LIGHT))
    assert not loaded & {"torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub"}


def test_importing_the_package_costs_nothing() -> None:
    loaded = modules_after("import branchmix; branchmix.Recipe")
    assert "pydantic" in loaded and not loaded & {"torch", "transformers", "numpy", "rich", "typer"}
    assert not modules_after("import branchmix") & {"pydantic", "yaml", "torch", "transformers", "numpy"}


def test_help_answers_at_once() -> None:
    """In CPU time, the best of three: other processes share the machine."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "branchmix", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0
    code = "import branchmix.cli\ntry: branchmix.cli.app(['--help'])\nexcept SystemExit: pass"
    assert not modules_after(code) & {"torch", "transformers", "numpy", "pydantic", "yaml"}


def test_lists_that_stand_twice_agree() -> None:
    """The planner may not import transformers, so it cannot take them from the configuration."""
    assert plan.AUTO_MAP == configuration_branchmix.AUTO_MAP
    for key, value in MIXTURE_DEFAULTS.items():
        assert getattr(configuration_branchmix.BranchMixConfig, key) == value, key
    for place in plan.AUTO_MAP.values():
        file, name = place.split(".")
        classes = [
            node.name
            for node in ast.walk(ast.parse((ROOT / "models" / f"{file}.py").read_text()))
            if isinstance(node, ast.ClassDef)
        ]
        assert ROOT / "models" / f"{file}.py" in execute.CODE_FILES and name in classes


@pytest.mark.parametrize("name", [file.name for file in execute.CODE_FILES])
def test_travelling_files_need_only_torch_and_transformers(name: str) -> None:
    siblings = {f"branchmix.models.{file.stem}" for file in execute.CODE_FILES}
    for module, _ in imports(ROOT / "models" / name):
        allowed = module.split(".")[0] in {"torch", "transformers"} | sys.stdlib_module_names or module in siblings
        assert allowed, f"{name} imports {module}, which a checkpoint does not bring along"
    text = (ROOT / "models" / name).read_text(encoding="utf-8")
    assert "import branchmix" not in text and "from branchmix" not in text


def test_public_names_resolve() -> None:
    assert set(branchmix.__all__) == {*branchmix._HOME, "__version__"} == {*dir(branchmix)}
    for name in branchmix.__all__:
        assert getattr(branchmix, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'upcycel'"):
        branchmix.upcycel  # noqa: B018


def test_every_family_of_the_table_has_a_tiny_one() -> None:
    """``ministral`` is Mistral under another name and shares its tests."""
    tested = {family.model_type for family in TINY}
    assert set(families()) - tested <= {"ministral"}
    inferred = [family for family in TINY if family_of(family.config().to_dict()).inferred]
    assert inferred and not {family.model_type for family in inferred} & set(families())


@pytest.mark.parametrize("family", TINY, ids=lambda family: family.name)
def test_tiny_families_say_their_block(family) -> None:  # type: ignore[no-untyped-def]
    found = family_of(family.config().to_dict())
    assert found.block == family.block.removesuffix("-2")
    if family.block != "sequential" and found.ffn_input_norm is not None:
        assert (found.attention_input_norm != found.ffn_input_norm) == (family.block == "parallel-2")
