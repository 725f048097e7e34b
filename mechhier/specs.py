"""Settings that are described by their fields: checked wherever they come from, refused in a line that names the field.

`Described` is what every model of settings is made of (a grammar, a corpus, an experiment, a manifest): calls, YAML, JSON
and changed copies are validated alike, and say the same of what is wrong.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import operator
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mechhier.reading import MOST_SPEC_BYTES, ReadError, decoded, read_text, read_yaml

Spec = TypeVar("Spec", bound=BaseModel)
ADescribed = TypeVar("ADescribed", bound="Described")

MOST_CONTEXT = 2**20
"""Most tokens of a row: with labels, one row takes 100 MB."""

_MOST_CHARACTERS = 450  # of the problems that a message lists
_MOST_LEVELS = 64
_LONGEST_NAME = 1_000  # of a file, with its folders
_MOST_VALUES = 2 * 10**6
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Problem(NamedTuple):
    """What is wrong with one field."""

    where: tuple[str | int, ...]
    """The names and indices that lead to it."""
    what: str

    def __str__(self) -> str:
        path = ".".join(map(_name, self.where))
        line = f"{path}: {self.what}" if path else self.what
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _name(part: str | int) -> str:
    text = str(part)
    return text if len(text) <= 40 and text.isprintable() else shown(text)


class SpecError(ValueError):
    """Settings that are not accepted; the message names each field, its value, and what is accepted."""

    problems: Sequence[Problem] = ()

    @classmethod
    def of(cls, head: str, problems: Sequence[Problem]) -> SpecError:
        """The error that lists problems, one line each, under a head (without one if it is empty)."""
        listed: list[str] = []
        for problem in problems:
            line = str(problem)
            if listed and sum(map(len, listed)) + len(line) > _MOST_CHARACTERS:
                listed.append(f"and {len(problems) - len(listed)} more")
                break
            listed.append(line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 3] + "...")
        if not head:
            error = cls("\n".join(listed))
        else:
            error = cls(f"{head}: {listed[0]}" if len(listed) == 1 else "\n  ".join([f"{head}:", *listed]))
        error.problems = tuple(problems)
        return error


# -- fields ----------------------------------------------------------------------------------------------------------


def _whole(value: Any) -> int:
    number: Any = value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if isinstance(value, numbers.Integral):
            return int(number)
        if math.isfinite(value) and value == math.floor(value):
            return math.floor(value)
    raise PydanticCustomError("field", "must be a whole number")


def _number(value: Any) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    raise PydanticCustomError("field", "must be a number")


def _flag(value: Any) -> bool:
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):  # NumPy's
        return bool(value)
    raise PydanticCustomError("field", "must be true or false")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    raise PydanticCustomError("field", "must be text")


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number: NumPy's and `1e6` are, `True` and `"1"` are not."""
Size = Annotated[Whole, Field(ge=1)]
"""A whole number of at least 1."""
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
"""A finite number."""
Flag = Annotated[bool, BeforeValidator(_flag)]
"""True or false, and nothing that stands for it."""
Text = Annotated[str, BeforeValidator(_text)]
"""Text, and no bytes."""
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
"""Of what is drawn by a generator of our own."""
MOST_DRAWN = 2**20
Drawn = Annotated[Size, Field(le=MOST_DRAWN)]
"""How many of something are drawn for a measurement."""
DrawnOrNone = Annotated[Whole, Field(ge=0, le=MOST_DRAWN)]
Probability = Annotated[Number, Field(ge=0, le=1)]


def whole(name: str, value: Any, *, least: int, most: int | None = None, why: str = "") -> int:
    """An argument as a whole number in a range.

    Raises:
        SpecError: It is none; the message has the name, the value, and `why`.
    """
    try:
        number = _whole(value)
    except PydanticCustomError as error:
        raise SpecError(f"{name} {error.message()}, got {shown(value)}") from None
    if number < least or (most is not None and number > most):
        limit = f"at least {least:,}" if number < least else f"at most {most:,}"
        raise SpecError(f"{name} must be {limit}, got {shown(number)}" + (f": {why}" if why else ""))
    return number


def shown(value: Any) -> str:
    """A value for a message: at most some 60 characters, nothing that a terminal would act on."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, int):
        return str(int(value)) if abs(value) < 10**40 else f"a number of {int(value.bit_length() * 0.30103)} digits"
    if isinstance(value, numbers.Real):
        return f"{float(value):g}"
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)}"
    if isinstance(value, list | tuple):
        small = len(value) <= 6 and all(isinstance(each, int | float | str) for each in value)
        within = f"[{', '.join(map(shown, value))}]" if small else ""
        return within if 0 < len(within) <= 60 else f"a list of {len(value)}"
    return f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"


# -- models ----------------------------------------------------------------------------------------------------------


class Described(BaseModel):
    """Settings by their fields: immutable, every field known, and whatever is wrong with them a `SpecError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError.of(type(self).__name__, _problems(type(self), error, fields)) from None

    # A model that is a field of another is validated as such, by the wrapping validator below, not made by a call.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls: type[ADescribed], obj: Any, **options: Any) -> ADescribed:
        """The settings that a mapping describes.

        Raises:
            SpecError: They are not accepted.
        """
        return cls._translated(super().model_validate, obj, options)

    @classmethod
    def model_validate_json(cls: type[ADescribed], json_data: str | bytes | bytearray, **options: Any) -> ADescribed:
        """The settings that a JSON text describes.

        Raises:
            SpecError: They are not accepted, or it is not JSON.
        """
        return cls._translated(super().model_validate_json, json_data, options)

    @classmethod
    def _translated(cls, validate: Callable[..., Any], given: Any, options: dict[str, Any]) -> Any:
        try:
            return validate(given, **options)
        except ValidationError as error:
            raise SpecError.of(cls.__name__, _problems(cls, error, given)) from None

    def model_copy(self: ADescribed, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> ADescribed:
        """A validated copy with some fields changed; nothing cached for the old fields goes with it.

        Raises:
            SpecError: The changes are not accepted.
        """
        kept = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return type(self).model_validate(kept | dict(update or {}))

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, given: Any, validate: Callable[[Any], Any]) -> Any:
        """Say what is wrong at every level of nested settings, where it is known which fields there are."""
        if problem := unreadable(given):
            raise SpecError.of(cls.__name__, [problem])
        try:
            return validate(given)
        except ValidationError as error:
            raise SpecError.of(cls.__name__, _problems(cls, error, given)) from None


def unreadable(given: Any) -> Problem | None:
    """What settings cannot consist of: half a surrogate pair, control characters, sets, endless nesting."""
    looked_at = (str, Mapping, list, tuple, set, frozenset)
    todo: list[tuple[Any, tuple[str | int, ...]]] = [(given, ())]
    n_values = 0
    while todo:
        value, path = todo.pop()
        n_values += len(value) if isinstance(value, Mapping | list | tuple) else 0
        if len(path) > _MOST_LEVELS or n_values > _MOST_VALUES:
            return Problem(
                path[:3], f"is nested more than {_MOST_LEVELS} levels deep, or has over {_MOST_VALUES:,} values"
            )
        if isinstance(value, str):
            if found := _NOT_TEXT.search(value):
                kind = "half a surrogate pair" if "\ud800" <= found[0] <= "\udfff" else "a control character"
                return Problem(path, f"holds {kind}, {shown(found[0])}, which text cannot; got {shown(value)}")
        elif isinstance(value, Mapping):
            todo += [(part, path) for part in value if isinstance(part, str)]
            todo += [(part, (*path, key if isinstance(key, str) else shown(key))) for key, part in value.items()]
        elif isinstance(value, list | tuple):
            todo += [(part, (*path, i)) for i, part in enumerate(value) if isinstance(part, looked_at)]
        elif isinstance(value, set | frozenset):
            return Problem(path, "is a set, which has no order; give a list")
    return None


_WORDS: dict[str, str] = {
    "missing": "is missing",
    "string_type": "must be text",
    "string_sub_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "greater_than_equal": "must be at least {ge:,}",
    "greater_than": "must be above {gt:,}",
    "less_than_equal": "must be at most {le:,}",
    "less_than": "must be below {lt:,}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "json_invalid": "is not JSON: {error}",
}
"""What pydantic's types of errors are called here."""


def _problems(cls: type[BaseModel], error: ValidationError, given: Any) -> list[Problem]:
    """The problems of a validation error, with the fields that were given: no names of a union's branches."""
    found: dict[tuple[str | int, ...], list[str]] = {}
    values: dict[tuple[str | int, ...], Any] = {}
    problems: list[Problem] = []
    for each in error.errors(include_url=False):
        where = _fields(each["loc"], given)
        cause = each.get("ctx", {}).get("error")
        if isinstance(cause, SpecError) and cause.problems:
            problems += [Problem((*where, *problem.where), problem.what) for problem in cause.problems]
            continue
        if each["type"] in ("value_error", "assertion_error"):
            problems.append(Problem(where, str(cause)))
            continue
        if each["type"] == "missing":
            where = (*where, each["loc"][-1])
        found.setdefault(where, []).append(_said(cls, each))
        values[where] = each["input"]
    for where, said in found.items():
        if any(other[: len(where)] == where and len(other) > len(where) for other in found):
            continue  # one branch of a union wants something else, another is wrong further inside
        words = ", or ".join(dict.fromkeys(said))
        words = words.replace(", or must be ", ", or ")
        problems.append(
            Problem(where, words if not words.startswith("must") else f"{words}, got {shown(values[where])}")
        )
    return problems


def _fields(loc: Iterable[str | int], given: Any) -> tuple[str | int, ...]:
    """The part of a location that names fields and items of what was given."""
    where: list[str | int] = []
    for part in loc:
        if isinstance(given, Mapping) and part in given:  # noqa: SIM114
            given = given[part]
        elif isinstance(given, list | tuple) and isinstance(part, int) and 0 <= part < len(given):
            given = given[part]
        elif isinstance(given, BaseModel) and isinstance(part, str) and part in type(given).model_fields:
            given = getattr(given, part)
        else:
            continue
        where.append(part)
    return tuple(where)


def _said(cls: type[BaseModel], each: Any) -> str:
    kind, context = each["type"], each.get("ctx", {})
    if kind == "field":
        return each["msg"]
    if kind == "extra_forbidden":
        return no_such_field(str(each["loc"][-1]), cls.model_fields)
    if kind == "invalid_key":
        return "the names of fields are text"
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        return f"must be a mapping with the fields {', '.join(cls.model_fields)}"
    if kind in ("too_short", "too_long"):
        limit = f"at least {context['min_length']:,}" if kind == "too_short" else f"at most {context['max_length']:,}"
        return f"must have {limit} items"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return (
            f"{context['discriminator']} must be one of {context.get('expected_tags', 'the kinds there are')}".replace(
                "'", ""
            )
        )
    if kind in _WORDS:
        return _WORDS[kind].format(**context)
    return each["msg"][0].lower() + each["msg"][1:]


def no_such_field(name: str, fields: Iterable[str], *, what: str = "field") -> str:
    """What to say of a name that is none of the fields: the nearest one, or all."""
    fields = list(fields)
    near = difflib.get_close_matches(name[:100], fields, n=1)
    if near:
        return f"no such {what}; did you mean {near[0]}?"
    return f"no such {what}; there are {', '.join(fields)}" if fields else f"no such {what}; there are none"


# -- arguments -------------------------------------------------------------------------------------------------------


def check_arguments(
    function: Callable[..., Any], given: Mapping[str, Any], *, where: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Arguments by name, checked against the annotations of a function, without calling it.

    An annotation of numbers, text, true or false, literals and sequences of these is checked like a field of `Described`,
    its `Annotated` bounds included; of another type (arrays, models) any value is let through.

    Args:
        function: What the arguments are for.
        given: The arguments, by name.
        where: Names that lead to the arguments, for the message.

    Returns:
        The arguments, NumPy's numbers as Python's.

    Raises:
        SpecError: There is no such argument, or its value is not accepted.
    """
    accepted = argument_types(function)
    problems, checked = [], {}
    for name, value in given.items():
        if name not in accepted:
            problems.append(Problem((*where, str(name)), no_such_field(str(name), accepted, what="option")))
        elif (adapter := accepted[name]) is None:
            checked[name] = value
        elif problem := unreadable(value):
            problems.append(Problem((*where, name, *problem.where), problem.what))
        else:
            try:
                checked[name] = adapter.validate_python(value)
            except ValidationError as error:
                within = _problems(Described, error, value)
                problems += [Problem((*where, name, *each.where), each.what) for each in within]
    if problems:
        raise SpecError.of("", problems)
    return checked


@functools.lru_cache
def argument_types(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any] | None]:
    """What checks each named argument of a function; None where its annotation is of another kind."""
    hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    types_ = {name: _strict(hints[name]) for name in named}
    return {name: None if hint is None else TypeAdapter(hint) for name, hint in types_.items()}


def _strict(hint: Any) -> Any:
    """An annotation with the types of fields in place of Python's; None if it has parts that no file can hold."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is None:
        return {int: Whole, float: Number, bool: Flag, str: Text, type(None): hint}.get(hint)
    if origin is Literal:
        return hint
    if origin is Annotated:
        of = _strict(inner[0])
        return None if of is None else Annotated[(of, *inner[1:])]
    parts = [part if part is ... else _strict(part) for part in inner]
    if None in parts:
        return None
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, parts)
    of_items: dict[Any, Any] = {tuple: tuple, list: list, Sequence: Sequence}
    return of_items[origin][tuple(parts)] if origin in of_items else None


# -- files -----------------------------------------------------------------------------------------------------------


def read_spec(model: type[Spec], source: str | os.PathLike[str], *, package: str) -> Spec:
    """Read a spec from a YAML file, or one that comes with the package by its name.

    Args:
        model: What the YAML describes.
        source: A file, or the name of a packaged spec.
        package: Where the packaged ones are.

    Raises:
        SpecError: No such file, one that is too large or not UTF-8, not YAML, or a field that is wrong or unknown.
    """
    what = model.__name__.removesuffix("Spec").lower()
    if not isinstance(source, str | os.PathLike):
        raise SpecError(f"a spec is read from a file, not from {shown(source)}; {model.__name__}(...) takes fields")
    try:
        text = _spec_text(str(source), what, package)
        described = read_yaml(text, str(source))
    except ReadError as error:
        raise SpecError(str(error)) from error
    if not isinstance(described, dict):
        raise SpecError(f"{source} must hold the fields {', '.join(model.model_fields)}, not {shown(described)}")
    try:
        return model.model_validate(described)
    except SpecError as error:
        raise SpecError.of(f"{source} is not a valid {what}", error.problems) from None


def _spec_text(source: str, what: str, package: str) -> str:
    if len(source) > _LONGEST_NAME or not source.isprintable():
        raise ReadError(f"{shown(source)} is no file's name")
    path = Path(source).expanduser()
    if path.exists():
        return read_text(path, most_bytes=MOST_SPEC_BYTES)
    entries = resources.files(package).iterdir()
    packaged = {Path(entry.name).stem: entry for entry in entries if entry.name.endswith(".yaml")}
    if source not in packaged:
        raise ReadError(f"no file {source}, and no packaged {what} of that name ({', '.join(sorted(packaged))})")
    return decoded(packaged[source].read_bytes(), source)
