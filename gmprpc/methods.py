"""Method names and the callables behind them: registration and what can be told about a callable; no greenlets.

Only names that were registered can be called. Nothing is ever looked up with ``getattr`` by a name from the network.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, partialmethod, singledispatchmethod
from types import MappingProxyType, ModuleType
from typing import Any, NoReturn

from .exceptions import ErrorResponse, no_such_method

Handler = Callable[..., Any]
#: Gives the callable to call in place of the one that is registered.
Wrapper = Callable[[Handler], Handler]

#: Names that begin so are gmprpc's own.
RESERVED_PREFIX = "$/"
#: The methods that are there without being registered; see :mod:`gmprpc.builtin`.
HEALTH = "$/health"
LIST = "$/list"
DESCRIBE = "$/describe"
CANCEL = "$/cancel"
DRAINING = "$/draining"


class UnknownMethod(ErrorResponse):
    """What the entry for names that nobody registered raises."""


class MethodTable(dict[str, Handler]):
    """What a connection calls: a live view of a :class:`Methods`, in which each callable has been wrapped once.

    It has an entry for every name: the one for unknown methods answers with the error of AnyEvent::MPRPC.
    """

    __slots__ = ("__weakref__", "_wrappers")

    def __init__(self, *wrappers: Wrapper) -> None:
        super().__init__()
        self._wrappers = wrappers

    def __setitem__(self, name: str, function: Handler) -> None:
        super().__setitem__(name, self._wrapped(function))

    def __missing__(self, name: str) -> Handler:
        return self._wrapped(partial(_raise_unknown, name))

    def _wrapped(self, function: Handler) -> Handler:
        for wrap in self._wrappers:
            function = wrap(function)
        return function


class Methods(Mapping[str, Handler]):
    """The registered methods, by name, and every live table that shows them."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        # By identity: a dict isn't hashable.
        self._tables: weakref.WeakValueDictionary[int, MethodTable] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> Handler:
        return self._handlers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handlers)

    def __len__(self) -> int:
        return len(self._handlers)

    def add(self, function: Handler, name: str | None = None) -> str:
        """Register ``function`` under ``name``, by default its own; returns the name. A name's last function counts.

        Raises:
            TypeError: ``function`` isn't callable, or has no name and none is given.
            ValueError: the name is empty, reserved, or can't be sent.
        """
        if not callable(function):
            raise TypeError(f"a method has to be callable, and {function!r} isn't")
        if name is None:
            name = getattr(function, "__name__", None)
            if name is None:
                raise TypeError(f"{function!r} has no name of its own: give one")
        _check_name(name)
        self._handlers[name] = function
        for table in self._tables.values():
            table[name] = function
        return name

    def add_object(self, obj: object, prefix: str = "") -> list[str]:
        """Register the public methods of ``obj``'s own class as ``prefix`` + name; returns the names.

        They are listed once, now. What the class inherits, what begins with an underscore and what isn't a method (a
        property, a nested class, an attribute of the object) is left out.

        Raises:
            TypeError: there are none; a class or a module is no such object. Or an attribute of the object took the
                place of one. Then nothing has been registered.
        """
        if isinstance(obj, (type, ModuleType)):
            raise TypeError(f"{obj!r} has no methods of its own: give an object, of which the class has them")
        own = {prefix + name: getattr(obj, name) for name, value in vars(type(obj)).items() if _is_public(name, value)}
        if not own:
            raise TypeError(f"the class {type(obj).__name__!r} has no public methods of its own")
        for name, function in own.items():
            if not callable(function):
                raise TypeError(f"{name!r} is a method of the class, but no more of the object")
        return [self.add(function, name) for name, function in own.items()]

    def remove(self, name: str) -> None:
        """Forget the method ``name``; raises KeyError if there is none."""
        del self._handlers[name]
        for table in self._tables.values():
            del table[name]

    def table(self, *wrappers: Wrapper, builtins: Mapping[str, Handler] = MappingProxyType({})) -> MethodTable:
        """A live table of these methods; each wrapper gives what is called in place of each, unknown ones included.

        The first one comes closest to the method. ``builtins`` are in this table only, for good: their names begin with
        the prefix under which nothing can be registered.
        """
        table = MethodTable(*wrappers)
        for name, function in {**builtins, **self._handlers}.items():
            table[name] = function
        self._tables[id(table)] = table
        return table


def params_mismatch(
    method: str, function: Handler, params: Sequence[Any], raised: BaseException | None = None
) -> str | None:
    """Why ``function`` can't be called with ``params``, for the caller to read; None if it can.

    It is asked only after a call has ``raised`` a TypeError, to tell a wrong number of params from a fault of the
    handler.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # Some functions that are written in C don't tell.
    try:
        signature.bind(*params)
    except TypeError as exc:
        if _was_entered(inspect.unwrap(function), raised):
            return None  # A decorator gave it other params, and they were right.
        return f"wrong params for {method}{_shown(signature)}: {exc}"
    return None


def signature_of(function: Handler) -> str:
    """What ``function`` takes, for a caller to read: ``(a, b=...)``; ``(...)`` if that can't be told."""
    try:
        return _shown(inspect.signature(function))
    except (TypeError, ValueError):
        return "(...)"


def summary_of(function: Handler) -> str:
    """The first line of ``function``'s docstring; "" if it has none."""
    while isinstance(function, partial):
        function = function.func  # Its own docstring tells what a `partial` is.
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _was_entered(function: Handler, raised: BaseException | None) -> bool:
    """Whether ``raised`` came out of ``function``, and not out of the attempt to call it."""
    code = getattr(function, "__code__", None)
    traceback = raised.__traceback__ if raised is not None else None
    while traceback is not None:
        if traceback.tb_frame.f_code is code:
            return True
        traceback = traceback.tb_next
    return False


class _Default:
    """Stands for a default, which may be a secret, or an object that says nothing to a caller in another language."""

    def __repr__(self) -> str:
        return "..."


def _shown(signature: inspect.Signature) -> str:
    """The names of the params in ``signature``, without annotations, and which of them may be left out."""
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.default if parameter.default is parameter.empty else _Default(),
        )
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def _is_public(name: str, value: Any) -> bool:
    """Whether what stands in a class under ``name`` is a public method: of any kind, but nothing that computes one."""
    is_method = isinstance(value, (staticmethod, classmethod, partialmethod, singledispatchmethod)) or (
        # Functions, and what is made of them, like one with a cache; nested classes are callable, too.
        callable(value) and hasattr(value, "__get__") and not isinstance(value, type)
    )
    return is_method and not name.startswith("_")


def _raise_unknown(name: str, /, *_params: Any) -> NoReturn:
    raise UnknownMethod(no_such_method(name))


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a method's name has to be a string of one character or more, not {name!r}")
    if name.startswith(RESERVED_PREFIX):
        raise ValueError(f"{name!r}: names that begin with {RESERVED_PREFIX!r} are reserved")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} can't be sent: it is not valid Unicode") from None
