"""Turns untrusted JSON or TOML into msgspec structs, with errors that name the member and the reason.

Stricter than a plain decoder, because what comes in is policy: an unknown member is refused (a typo in `egress` must
not mean "allow all"), so is a member given twice. `null` for an optional member means that it is absent.
Every failure is an `InvalidError` whose message starts with the member's path, as in `fs[0].mount is required`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import msgspec
from msgspec import inspect

from hiverd.contracts.errors import InvalidError

T = TypeVar("T")

MAX_DEPTH: Final = 64
"""Deepest nesting accepted; far below what any encoder of ours can recurse into."""
_MIN_INT: Final = -(2**63)
_MAX_INT: Final = 2**64 - 1
"""Integers that every JSON encoder can write back."""
_MANY_DIGITS: Final = re.compile(rb"[0-9]{19}")
"""Only with so many digits in a row can a number exceed 64 bits; checking each number has its price."""
_CONTAINERS: Final = (dict, list)
_SHOWN_CHARACTERS: Final = 80
_FEW_VALUES: Final = 4
_known_types: Final[dict[type, inspect.Type]] = {}


def fail(path: str, reason: str) -> NoReturn:
    """Raises `InvalidError` with the message `<path>: <reason>`."""
    raise InvalidError(f"{path}: {reason}" if path else reason, field=path or None)


def fail_missing(path: str) -> NoReturn:
    """Raises `InvalidError` with the message `<path> is required`."""
    raise InvalidError(f"{path} is required", field=path)


def shown(text: str) -> str:
    """A caller's text, quoted, escaped and cut to a length that is fit for an error message."""
    cut = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return json.dumps(cut)


def member(path: str, name: str) -> str:
    """The path of member `name` of the object at `path`; names that are no identifiers are quoted."""
    if not name.isidentifier() or len(name) > _SHOWN_CHARACTERS:
        return f"{path}[{shown(name)}]"
    return f"{path}.{name}" if path else name


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name[:_SHOWN_CHARACTERS].lower(), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {shown(close[0])}?"
    return "known: " + ", ".join(names) if names else "none is known"


def parse_json(raw: bytes) -> Any:
    """Parses one JSON text (RFC 8259) in UTF-8. Raises `InvalidError`, whatever the input.

    Refused besides malformed text: NaN and infinities, integers beyond 64 bits, lone surrogates, duplicate members,
    nesting deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_members,
            parse_float=_finite,
            parse_int=_bounded if _MANY_DIGITS.search(raw) else None,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise InvalidError(f"the body is not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidError(f"the body is nested more than {MAX_DEPTH} levels deep") from None
    except json.JSONDecodeError as error:
        raise InvalidError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except ValueError:  # the interpreter's limit on digits
        raise InvalidError("the body holds a number that is out of range") from None
    check_tree(value)
    return value


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                fail(member("", name), "is given twice")
            seen.add(name)
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidError(f"the body is not valid JSON: {name} is not a JSON number")


def check_tree(value: Any) -> None:
    """Refuses what could be parsed but not be written back or walked safely. Needs no recursion itself."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for item in level for inner in _inner_containers(item)]
        if not level:
            break
    else:
        raise InvalidError(f"the body is nested more than {MAX_DEPTH} levels deep")
    try:
        msgspec.json.encode(value)  # far faster than looking at each string here
    except UnicodeEncodeError:
        raise InvalidError("the body holds an unpaired surrogate, which is not text") from None


def _inner_containers(item: Any) -> list[Any]:
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return [value for value in inner if isinstance(value, _CONTAINERS)]


def _bounded(digits: str) -> int:
    number = int(digits)
    if not _MIN_INT <= number <= _MAX_INT:
        raise InvalidError("the body holds a number that is out of range")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InvalidError("the body holds a number that is out of range")
    return number


def build(cls: type[T], value: Any, path: str = "") -> T:
    """Makes a struct of class `cls` out of parsed JSON or TOML. Raises `InvalidError` naming the member."""
    built = _convert(_type_of(cls), value, path)
    assert isinstance(built, cls)  # noqa: S101 -- the walk below follows the class
    return built


def _type_of(cls: type) -> inspect.Type:
    kind = _known_types.get(cls)
    if kind is None:
        kind = _known_types[cls] = inspect.type_info(cls)
    return kind


def _convert(kind: inspect.Type, value: Any, path: str) -> Any:
    if isinstance(kind, inspect.Metadata):
        return _convert(kind.type, value, path)
    handler = _HANDLERS.get(type(kind))
    if handler is None:
        raise TypeError(f"no strict decoding for {kind!r}")
    return handler(kind, value, path)


def _any(_kind: inspect.AnyType, value: Any, _path: str) -> Any:
    return value


def _string(kind: inspect.StrType, value: Any, path: str) -> str:
    if not isinstance(value, str):
        _refuse_type(path, kind, value)
    if kind.min_length is not None and len(value) < kind.min_length:
        fail(path, "must not be empty")
    return value


def _path(kind: inspect.CustomType, value: Any, path: str) -> Path:
    if kind.cls is not Path:
        raise TypeError(f"no strict decoding for {kind!r}")
    if not isinstance(value, str | Path):
        fail(path, f"expected a path, got {_name_of_json(value)}")
    if not str(value) or "\0" in str(value):
        fail(path, "must be the path of a file or folder")
    return Path(value)


def _boolean(kind: inspect.BoolType, value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        _refuse_type(path, kind, value)
    return value


def _integer(kind: inspect.IntType, value: Any, path: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON has one kind of number: 512.0 is 512
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse_type(path, kind, value)
    _check_bounds(kind, value, path)
    return value


def _float(kind: inspect.FloatType, value: Any, path: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        _refuse_type(path, kind, value)
    _check_bounds(kind, value, path)
    return float(value)


def _check_bounds(kind: inspect.IntType | inspect.FloatType, value: float, path: str) -> None:
    if not math.isfinite(value):
        fail(path, "must be a finite number")
    if kind.gt is not None and value <= kind.gt:
        fail(path, f"must be > {kind.gt}")
    if kind.ge is not None and value < kind.ge:
        fail(path, f"must be >= {kind.ge}")
    if kind.lt is not None and value >= kind.lt:
        fail(path, f"must be < {kind.lt}")
    if kind.le is not None and value > kind.le:
        fail(path, f"must be <= {kind.le}")


def _literal(kind: inspect.LiteralType, value: Any, path: str) -> Any:
    if isinstance(value, str) and value in kind.values:
        return value
    got = shown(value) if isinstance(value, str) else _name_of_json(value)
    if len(kind.values) > _FEW_VALUES:
        fail(path, f"unknown value {got}")
    *first, last = (shown(str(choice)) for choice in kind.values)
    fail(path, f"must be {', '.join(first)} or {last}, got {got}" if first else f"must be {last}, got {got}")


def _list(kind: inspect.VarTupleType, value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        _refuse_type(path, kind, value)
    return tuple(_convert(kind.item_type, item, f"{path}[{index}]") for index, item in enumerate(value))


def _dict(kind: inspect.DictType, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse_type(path, kind, value)
    return {name: _convert(kind.value_type, item, member(path, name)) for name, item in value.items()}


def _union(kind: inspect.UnionType, value: Any, path: str) -> Any:
    choices = [choice for choice in kind.types if not isinstance(choice, inspect.NoneType)]
    if value is None and len(choices) < len(kind.types):
        return None
    if len(choices) == 1:
        return _convert(choices[0], value, path)
    structs = [choice for choice in choices if isinstance(choice, inspect.StructType)]
    if structs:
        return _tagged(structs, value, path)
    for choice in choices:
        if isinstance(value, _PYTHON_TYPES[type(choice)]):
            return _convert(choice, value, path)
    fail(path, f"expected {' or '.join(_name_of_type(choice) for choice in choices)}, got {_name_of_json(value)}")


def _tagged(structs: list[inspect.StructType], value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        _refuse_type(path, structs[0], value)
    tag_field = str(structs[0].tag_field)
    tag = value.get(tag_field)
    where = member(path, tag_field)
    if tag is None:
        fail_missing(where)
    for choice in structs:
        if choice.tag == tag and isinstance(tag, str):
            return _struct(choice, value, path)
    fail(where, f"unknown value {shown(tag) if isinstance(tag, str) else _name_of_json(tag)}")


def _struct(kind: inspect.StructType, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        _refuse_type(path, kind, value)
    fields = {field.encode_name: field for field in kind.fields}
    arguments: dict[str, Any] = {}
    for name, item in value.items():
        if name == kind.tag_field:
            continue
        field = fields.get(name)
        if field is None:
            fail(member(path, name), f"unknown member, {nearest(name, fields)}")
        if item is not None:
            arguments[field.name] = _convert(field.type, item, member(path, name))
    for field in kind.fields:
        if field.required and field.name not in arguments:
            fail_missing(member(path, field.encode_name))
    return kind.cls(**arguments)


_HANDLERS: Final[dict[type[inspect.Type], Callable[[Any, Any, str], Any]]] = {
    inspect.AnyType: _any,
    inspect.StrType: _string,
    inspect.CustomType: _path,
    inspect.BoolType: _boolean,
    inspect.IntType: _integer,
    inspect.FloatType: _float,
    inspect.LiteralType: _literal,
    inspect.VarTupleType: _list,
    inspect.DictType: _dict,
    inspect.UnionType: _union,
    inspect.StructType: _struct,
}
_PYTHON_TYPES: Final[dict[type[inspect.Type], type | tuple[type, ...]]] = {
    inspect.StrType: str,
    inspect.VarTupleType: (list, tuple),
    inspect.DictType: dict,
}
_TYPE_NAMES: Final[dict[type[inspect.Type], str]] = {
    inspect.StrType: "a string",
    inspect.BoolType: "true or false",
    inspect.IntType: "an integer",
    inspect.FloatType: "a number",
    inspect.DictType: "an object",
    inspect.StructType: "an object",
}


def _name_of_type(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.VarTupleType):
        return "a list of strings" if isinstance(kind.item_type, inspect.StrType) else "a list"
    return _TYPE_NAMES[type(kind)]


def _name_of_json(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = ((str, "a string"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}")


def _refuse_type(path: str, kind: inspect.Type, value: object) -> NoReturn:
    got = f"{value}" if isinstance(value, float) else _name_of_json(value)
    fail(path, f"{'' if path else 'the body: '}expected {_name_of_type(kind)}, got {got}")


def to_builtins(value: Any) -> Any:
    """A struct as the plain JSON document that `build` would read: lists for tuples, absent members left out."""
    return msgspec.json.decode(msgspec.json.encode(value))
