"""JSON text to MessagePack values and back, without loss; no I/O.

What JSON has no word for is an object with a single key, the same one in both directions:

* ``{"$bytes": "<base64>"}``: bytes. A string from a peer that isn't UTF-8 is shown so too.
* ``{"$timestamp": "2025-01-31T12:00:00.5Z"}``: a timestamp, in ISO 8601, to the nanosecond.
* ``{"$ext": [<code>, "<base64>"]}``: any other ext type.
* ``{"$float": "NaN"}``, ``"Infinity"`` or ``"-Infinity"``.
* ``{"$map": [[<key>, <value>], ...]}``: a map in which a key isn't a string, or that would read as one of these forms.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn

from msgpack import ExtType, Timestamp

#: How a client has to unpack answers for :func:`to_json` to lose nothing: `datetime` has no nanoseconds and few years,
#: an array can be a map's key only as a tuple, and old peers send any bytes as a string.
UNPACKER_OPTIONS: Final[Mapping[str, Any]] = {"timestamp": 0, "use_list": False, "unicode_errors": "surrogateescape"}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
_TIMESTAMP_CODE = -1
_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class InvalidValue(Exception):
    """The text is JSON, but the value that it stands for can't be had; the message says why."""


def from_json(text: str) -> Any:
    """The value that ``text`` stands for.

    Raises:
        ValueError: it isn't JSON. ``NaN`` and ``Infinity`` aren't, whatever Python's own parser thinks.
        InvalidValue: it is, but one of the forms above is filled in wrongly, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_hook=_value_of, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidValue("it is nested too deeply") from None


def from_argument(text: str) -> Any:
    """The value of a word on the command line: that of :func:`from_json`, and the word itself where it isn't JSON."""
    try:
        return from_json(text)
    except ValueError:
        return text


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text for ``value``, unpacked with :data:`UNPACKER_OPTIONS`; on one line unless ``indent`` is given.

    Raises:
        InvalidValue: it is nested too deeply.
    """
    try:
        return json.dumps(_form_of(value), ensure_ascii=False, allow_nan=False, indent=indent)
    except RecursionError:
        raise InvalidValue("it is nested too deeply") from None


# From JSON.


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} isn't JSON")


def _value_of(obj: dict[str, Any]) -> Any:
    """What the JSON object ``obj`` stands for; those within it have had their turn."""
    if len(obj) != 1:
        return obj
    ((name, content),) = obj.items()
    if name not in _FORMS:
        return obj
    try:
        return _FORMS[name](content)
    except (TypeError, ValueError, KeyError, OverflowError) as exc:
        reason = "no such value" if isinstance(exc, KeyError) else str(exc)
        raise InvalidValue(f"{name}: {reason}") from None


def _bytes(content: Any) -> bytes:
    if not isinstance(content, str):
        raise TypeError("give a string of base64")
    try:
        return b64decode(content, validate=True)
    except binascii.Error as exc:
        raise ValueError(f"not base64: {exc}") from None


def _timestamp(content: Any) -> Timestamp:
    if not isinstance(content, str):
        raise TypeError("give a string in ISO 8601")
    moment = datetime.fromisoformat(content)
    if moment.tzinfo is None:
        raise ValueError("say of which time zone: put a Z behind it for UTC, or +HH:MM")
    # A datetime holds microseconds; what follows the seconds is read again.
    fraction = re.search(r"\d[.,](\d+)", content)
    nanoseconds = int(fraction[1][:9].ljust(9, "0")) if fraction else 0
    return Timestamp((moment.replace(microsecond=0) - _EPOCH) // _SECOND, nanoseconds)


def _ext(content: Any) -> ExtType | Timestamp:
    if not isinstance(content, list) or len(content) != 2:
        raise TypeError("give an array of the code and a string of base64")
    code, data = content
    if code == _TIMESTAMP_CODE:
        return Timestamp.from_bytes(_bytes(data))
    return ExtType(code, _bytes(data))


def _float(content: Any) -> float:
    return _FLOATS[content]


def _map(content: Any) -> dict[Any, Any]:
    if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise TypeError("give an array of pairs, each an array of a key and a value")
    return {_hashable(key): value for key, value in content}


def _hashable(key: Any) -> Any:
    if isinstance(key, dict):
        raise TypeError("a map can't be a key")
    return tuple(map(_hashable, key)) if isinstance(key, list) else key


_FORMS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "$bytes": _bytes,
    "$timestamp": _timestamp,
    "$ext": _ext,
    "$float": _float,
    "$map": _map,
}


# To JSON.


def _form_of(value: Any) -> Any:
    """What stands for ``value`` in JSON."""
    match value:
        case str():
            return value if value.isascii() or _is_unicode(value) else _form_of_bytes(_raw(value))
        case float() if not math.isfinite(value):
            return {"$float": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
        case bytes():
            return _form_of_bytes(value)
        case Timestamp():
            return _form_of_timestamp(value)
        case ExtType():  # Before the tuple that it is.
            return {"$ext": [value.code, _base64(value.data)]}
        case tuple() | list():
            return [_form_of(item) for item in value]
        case dict():
            return _form_of_map(value)
        case _:
            return value


def _form_of_bytes(data: bytes) -> dict[str, str]:
    return {"$bytes": _base64(data)}


def _form_of_timestamp(timestamp: Timestamp) -> dict[str, Any]:
    seconds, nanoseconds = divmod(timestamp.to_unix_nano(), 10**9)
    try:
        moment = _EPOCH + seconds * _SECOND
    except OverflowError:  # Later than the year 9999, or before our era: as raw as it came.
        return {"$ext": [_TIMESTAMP_CODE, _base64(timestamp.to_bytes())]}
    fraction = f".{nanoseconds:09}".rstrip("0").rstrip(".")
    return {"$timestamp": f"{moment.replace(tzinfo=None).isoformat()}{fraction}Z"}


def _form_of_map(value: Mapping[Any, Any]) -> dict[str, Any]:
    keys = list(value)
    if all(isinstance(key, str) and _is_unicode(key) for key in keys) and not (len(keys) == 1 and keys[0] in _FORMS):
        return {key: _form_of(item) for key, item in value.items()}
    return {"$map": [[_form_of(key), _form_of(item)] for key, item in value.items()]}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _raw(text: str) -> bytes:
    """The bytes that a peer sent as the string ``text``."""
    return text.encode(errors="surrogateescape")


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
