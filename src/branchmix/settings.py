"""YAML files that users write: read strictly and checked as a whole; each problem is one line that names the key.

A kind of file is a subclass of ``Settings``: ``recipe.py`` has that of a merge, ``train/config.py`` those of training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.folder import PLAIN, is_file_name
from branchmix.checkpoint.json_text import MAX_DIGITS
from branchmix.checkpoint.text import whole_characters
from branchmix.errors import RecipeError, kind_of, short

if TYPE_CHECKING:
    from typing_extensions import Self

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}


def _count(value: Any) -> Any:
    """``100M``, ``2.5B``, ``1e9``: a number, with a unit or without."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMBGTPE]?)", value.strip(), re.IGNORECASE)
        if not match:
            raise ValueError(f"should be a number, such as 5000 or 100M, got {short(value)}")
        value = float(match[1]) * _UNITS[match[2].upper()]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_count), Field(gt=0, le=10**30)]
"""A whole number, with K, M, B, T, P or E for powers of ten."""
Share = Annotated[float, Field(ge=0, le=1)]


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError(f"may have {PLAIN}, got {short(name)}")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
"""A name that is used as that of a file or folder."""


class Settings(BaseModel):
    """A mapping of a YAML file: unknown keys are refused, and each key's docstring is its reference."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class SettingsFile(Settings):
    """Settings that fill a YAML file."""

    _file: Path | None = PrivateAttr(default=None)
    """The file they were read from, or will be written to."""

    @property
    def folder(self) -> Path:
        """Folder that relative paths start from: the file's."""
        return Path() if self._file is None else self._file.parent

    @classmethod
    def load(cls, path: Self | str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a file; ``overrides`` are ``key=value`` with dots (``budget.tokens=2M``), values as YAML.

        Settings that are given instead of a file are returned as they are.

        Raises:
            RecipeError: it is missing, not YAML, or inconsistent; with all problems at once.
        """
        if isinstance(path, cls):
            if overrides:
                raise RecipeError("overrides apply to settings from a file: change the object instead")
            return path
        assert isinstance(path, (str, Path))
        data = read_yaml(Path(path))
        for words in overrides:
            _override(data, words)
        settings: Self = parse(cls, data, str(path))
        settings._file = Path(path)
        return settings


def _override(data: Any, words: str) -> None:
    """Change ``data``, what a YAML file says, by one ``key=value``; dots lead into mappings."""
    keys, equals, value = words.partition("=")
    if not equals or not keys:
        raise RecipeError(f"{words}: is not key=value, such as budget.tokens=2M")
    *parents, last = keys.split(".")
    place = data
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise RecipeError(f"{words}: cannot be set in this file: {'.'.join(parents)} is not a mapping")
    place[last] = parse_yaml(value, words)


def absolute(path: str | Path, base: Path) -> Path:
    """The path as seen from ``base``, for processes in other folders; links are not followed."""
    return Path(os.path.abspath(base / Path(path).expanduser()))  # noqa: PTH100 (resolve() follows links)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; a RecipeError says in which line it is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reasons: dict[type, str] = {IsADirectoryError: "is a folder", PermissionError: "may not be read"}
        reasons[FileNotFoundError] = "there is no such file"
        what = reasons.get(type(error)) or getattr(error, "strerror", None) or "is not UTF-8 text"
        advice = "check the path" if isinstance(error, FileNotFoundError) else "give a YAML file"
        raise RecipeError(f"{path}: {what}: {advice}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The content of YAML text, or a RecipeError that says ``where``, the line and what was expected."""
    import yaml

    try:
        return yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"{where}{line}: not valid YAML: {reason}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not valid YAML: nested too deeply") from None


@cache
def _strict_loader() -> Any:
    """PyYAML's safe loader, but a repeated key is an error, which PyYAML would silently resolve to the last."""
    import yaml

    def wrong(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    class Loader(yaml.SafeLoader):
        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                value = super().construct_object(node, deep)
                if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
                    raise OverflowError("no number needs so many digits")
            except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
                # 2024-13-45 looks like a date, and `!!int ''` says that it is a number
                reason = "this is not a value of its kind" if isinstance(error, LookupError) else str(error)
                raise wrong(f"{reason}: in quotes it would be text", node) from None
            return value

        def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
            given = super().construct_scalar(node)
            text = whole_characters(given) if isinstance(given, str) else given  # JSON's pairs become characters
            if text is not given and text.count("\ufffd") > given.count("\ufffd"):  # names must not change
                raise wrong("half of a surrogate pair is not a character: remove it", node)
            return text

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            if not isinstance(node, yaml.MappingNode):  # a word with the tag of a mapping
                raise wrong("a mapping was expected", node)
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for number, key in enumerate(keys):
                if key.value in [other.value for other in keys[:number]]:
                    raise wrong(f"the key {key.value!r} appears twice", key)
            return super().construct_mapping(node, deep)

    return Loader


def overlaid(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later mappings over earlier ones; a mapping over a mapping, such as ``optimizer``, changes only its own keys."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = {**result[key], **value} if both else value
    return result


def parse(model: type[Any], data: Any, where: str) -> Any:
    """``data`` as a ``model``, or one RecipeError with a line for each problem and the nearest valid word."""
    if not isinstance(data, dict):
        raise RecipeError(
            f"{where}: is {kind_of(data)}, not a mapping; its keys may be {', '.join(model.model_fields)}"
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        places: dict[tuple[Any, ...], list[Any]] = {}
        for detail in error.errors():
            places.setdefault(_place(detail), []).append(detail)
        lines = [_problem(model, list(place), details) for place, details in places.items()]
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from None


def _place(detail: Any) -> tuple[Any, ...]:
    """Where a problem is, without the labels that pydantic adds for the members of a union."""
    *parents, last = detail["loc"] or ("",)
    is_key = detail["type"] == "extra_forbidden" or not (last == "" or _is_label(last))  # that somebody wrote
    return (*(part for part in parents if not _is_label(part)), *([last] if is_key else []))


def _is_label(part: Any) -> bool:
    """Whether a part of a place is a type's name: of a plain one, or of settings."""
    plain = ("float", "constrained-float", "bool", "str", "int", "constrained-int")
    return isinstance(part, str) and ("[" in part or part in plain or part in _names_of_settings())


def _names_of_settings() -> set[str]:
    kinds: list[type] = [Settings]
    for kind in kinds:  # which grows meanwhile
        kinds += kind.__subclasses__()
    return {kind.__name__ for kind in kinds}


def _problem(model: type[BaseModel], location: list[Any], details: list[Any]) -> str:
    """What is wrong at one place as ``key: what is wrong (did you mean ...?)``."""
    path = ".".join(str(part) for part in location)
    telling = [d for d in details if d["type"] in ("value_error", "missing", "extra_forbidden")]
    detail = (telling or details)[0]
    kind, given = detail["type"], short(detail["input"])
    if len(details) > 1 and not telling:  # one for each member of a union that the value does not fit
        words = " or ".join(dict.fromkeys(_wanted(other).removeprefix("be ") for other in details))
        return f"{path}: should be {words}, got {given}"
    if kind == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"{path}: there is no such key{nearest(str(location[-1]), known)}; known: {', '.join(known)}"
    if kind == "missing":
        return f"{path}: is missing, it must be given"
    if kind == "literal_error":
        choices = [word.strip().strip("'") for word in detail["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{path}: {given} is not one of {', '.join(choices)}{nearest(str(detail['input']), choices)}"
    if kind == "string_pattern_mismatch":
        wanted_of = {"name": "letters, digits, -, _ and . only", "max_shard_size": "a number and a unit, such as 5GB"}
        return f"{path}: must be {wanted_of[str(location[-1])]}, got {given}"
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path else message
    if kind == "model_type":
        return f"{path}: should be a mapping, whose keys may be {', '.join(_fields_at(model, location))}, got {given}"
    is_unquoted = kind == "string_type" and isinstance(detail["input"], (bool, int, float, date))  # as YAML reads it
    return f"{path}: should {_wanted(detail)}, got {given}{': put it in quotes' if is_unquoted else ''}"


_KINDS = {
    "string": "text",
    "path": "a path",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
"""What pydantic's types of values are in YAML."""


def _wanted(detail: Any) -> str:
    """What a value should be or have, in plain words where pydantic's own are about Python."""
    kind, limits = detail["type"], detail.get("ctx", {})
    if kind in ("too_short", "too_long"):
        word, count = ("least", limits["min_length"]) if kind == "too_short" else ("most", limits["max_length"])
        return f"have at {word} {count} {'entry' if count == 1 else 'entries'}"
    of_kind = re.fullmatch("([a-z]+)_(?:type|parsing|parsing_size|from_float)", kind)
    own = _KINDS.get(of_kind[1]) if of_kind else None
    return f"be {own}" if own else detail["msg"].removeprefix("Input should ")


def _fields_at(model: type[BaseModel], location: list[Any]) -> list[str]:
    """Names of the fields of the model at ``location``, or of the nearest one above it."""
    models = [model]
    for part in location:
        fields = [kind.model_fields[part] for kind in models if part in kind.model_fields]
        models = [kind for field in fields for kind in _models_in(field.annotation)] or models
    return [name for kind in models for name in kind.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's values are, or hold: of a union, a list or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _models_in(inner)]
