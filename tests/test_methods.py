"""Names and the callables behind them: only what was registered can be called, and it can be told what it takes."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from gmprpc.exceptions import ErrorResponse
from gmprpc.methods import Methods, MethodTable, UnknownMethod, params_mismatch

from .helpers import collected


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def double(a: int) -> int:
    """Double."""
    return 2 * a


# Registration.


def test_a_function_is_registered_under_its_own_name_or_another() -> None:
    methods = Methods()
    assert methods.add(add) == "add"
    assert methods.add(add, "math.add") == "math.add"
    assert methods.add(functools.partial(add, 1), "increment") == "increment"
    assert methods.add(int) == "int"
    assert dict(methods) == {"add": add, "math.add": add, "increment": methods["increment"], "int": int}
    assert len(methods) == 4
    assert isinstance(methods, Mapping)
    assert "add" in methods
    assert "sub" not in methods


def test_the_last_function_of_a_name_counts() -> None:
    methods = Methods()
    table = methods.table()
    methods.add(add, "f")
    methods.add(double, "f")
    assert methods["f"] is table["f"] is double
    assert list(methods) == list(table) == ["f"]


@pytest.mark.parametrize(
    "name", ["_private", "__dunder__", "a b", "€", "\0", ".", "$", "$x/", "x$/", " $/x", "x" * 1000]
)
def test_a_name_may_be_any_text_that_is_given(name: str) -> None:
    methods = Methods()
    assert methods.add(add, name) == name
    assert methods.table()[name] is add


@pytest.mark.parametrize("name", ["", "$/", "$/ping", "\ud800", 5, b"add", ("add",), False])
def test_a_name_that_can_not_be_used_is_refused(name: Any) -> None:
    methods = Methods()
    table = methods.table()
    with pytest.raises(ValueError):
        methods.add(add, name)
    with pytest.raises(ValueError):
        methods.add_object(Greeter(), "$/")
    assert not methods
    assert not table


@pytest.mark.parametrize("function", [None, 5, "add", [add]])
def test_what_can_not_be_called_can_not_be_registered(function: Any) -> None:
    with pytest.raises(TypeError, match="has to be callable"):
        Methods().add(function, "f")


def test_what_has_no_name_needs_one() -> None:
    with pytest.raises(TypeError, match="has no name of its own: give one"):
        Methods().add(functools.partial(add, 1))


def test_a_method_can_be_forgotten() -> None:
    methods = Methods()
    table = methods.table()
    methods.add(add)
    methods.remove("add")
    assert "add" not in methods
    assert "add" not in table
    with pytest.raises(UnknownMethod):
        table["add"](1, 2)
    with pytest.raises(KeyError):
        methods.remove("add")
    with pytest.raises(KeyError):
        methods["add"]


# Objects.


class Base:
    """What a service inherits."""

    def inherited(self) -> None: ...

    def overridden(self) -> str:
        return "base"


class Greeter(Base):
    """Of everything that a class may have."""

    constant = 5
    function_of_another_class = len

    def __init__(self) -> None:
        self.attribute = "secret"
        self.callback = lambda: "secret"

    def greet(self, name: str) -> str:
        return f"{self.attribute} {name}"

    def overridden(self) -> str:
        return "own"

    @staticmethod
    def static(a: int) -> int:
        return a

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    @property
    def prop(self) -> str:
        raise AssertionError("nobody may look")

    @functools.cached_property
    def cached(self) -> str:
        raise AssertionError("nobody may look")

    def _private(self) -> None: ...

    def __mangled(self) -> None: ...

    def __call__(self) -> None: ...

    def __dunder__(self) -> None: ...

    class Nested:
        """Not a method."""

    async def asynchronous(self) -> None: ...

    def generator(self) -> Any:
        yield 1


def test_the_public_methods_of_an_objects_own_class_are_registered() -> None:
    methods = Methods()
    greeter = Greeter()
    names = methods.add_object(greeter)
    assert names == list(methods) == ["greet", "overridden", "static", "of_class", "asynchronous", "generator"]
    greeter.attribute = "hello"
    assert methods["greet"]("you") == "hello you"
    assert methods["overridden"]() == "own"
    assert methods["static"](1) == 1
    assert methods["of_class"]() == "Greeter"


def test_an_objects_methods_may_have_a_prefix() -> None:
    methods = Methods()
    assert methods.add_object(Base(), "base.") == ["base.inherited", "base.overridden"]
    assert methods.add_object(Base(), "_") == ["_inherited", "_overridden"]


def test_what_an_object_gets_later_is_not_registered() -> None:
    class Growing:
        def first(self) -> None: ...

    methods = Methods()
    growing = Growing()
    methods.add_object(growing)
    growing.second = lambda: None  # type: ignore[attr-defined]
    Growing.third = lambda self: None  # type: ignore[attr-defined]
    assert list(methods) == ["first"]


def test_a_decorated_method_is_a_method() -> None:
    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return [function(*args)]

        return call

    class Decorated:
        @decorated
        def plain(self) -> int:
            return 1

    methods = Methods()
    methods.add_object(Decorated())
    assert methods["plain"]() == [1]


def test_a_method_with_a_cache_is_a_method() -> None:
    class Cached:
        @functools.lru_cache  # noqa: B019
        def cached(self) -> int:
            return 1

        @functools.singledispatchmethod
        def dispatched(self, value: Any) -> Any:
            return value

        partial = functools.partialmethod(lambda self, a, b: (a, b), 1)

    methods = Methods()
    assert methods.add_object(Cached()) == ["cached", "dispatched", "partial"]
    assert methods["partial"](2) == (1, 2)


class lazy:  # noqa: N801
    """A property as many libraries have it: only read, and computed when it is asked for."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __get__(self, obj: Any, cls: Any = None) -> Any:
        return self if obj is None else self.function(obj)


def test_what_is_computed_is_no_method_whoever_made_it() -> None:
    looked: list[str] = []

    class Service:
        @lazy
        def secret(self) -> Any:
            looked.append("secret")
            return lambda: "secret"

        @lazy
        def value(self) -> Any:
            looked.append("value")
            return 5

        def ping(self) -> None: ...

    assert Methods().add_object(Service()) == ["ping"]
    assert looked == []


class Heir(Base):
    """Adds nothing that is public."""

    attribute = 5

    def _private(self) -> None: ...


@pytest.mark.parametrize("obj", [Greeter, functools, object(), Heir()], ids=["class", "module", "object", "heir"])
def test_an_object_without_methods_is_an_error(obj: Any) -> None:
    with pytest.raises(TypeError):
        Methods().add_object(obj)


def test_an_attribute_does_not_take_the_place_of_a_method() -> None:
    class Shadowed:
        def first(self) -> int:
            return 1

        def second(self) -> int:
            return 2

    obj = Shadowed()
    obj.second = 5  # type: ignore[assignment, method-assign]
    methods = Methods()
    with pytest.raises(TypeError):
        methods.add_object(obj)
    assert not methods


# Tables.


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """What says that it is wrapped."""

    def call(*params: Any) -> Any:
        try:
            return "wrapped", function(*params)
        except UnknownMethod as exc:
            return "wrapped", exc.error

    return call


def test_a_table_shows_what_is_registered_now_and_later() -> None:
    methods = Methods()
    methods.add(add)
    tables = [methods.table(), methods.table(), methods.table(wrapped)]
    methods.add(double)
    assert [sorted(table) for table in tables] == [["add", "double"]] * 3
    assert [table["add"](1, 2) for table in tables] == [3, 3, ("wrapped", 3)]
    assert [table["double"](2) for table in tables] == [4, 4, ("wrapped", 4)]
    methods.add(add, "double")
    methods.remove("add")
    assert [table["double"](1, 2) for table in tables] == [3, 3, ("wrapped", 3)]
    assert [sorted(table) for table in tables] == [["double"]] * 3


def test_a_callable_is_wrapped_once_as_it_enters_and_not_for_each_call() -> None:
    entered: list[Callable[..., Any]] = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        entered.append(function)
        return function

    methods = Methods()
    methods.add(add)
    table = methods.table(wrap)
    methods.add(double)
    for _ in range(3):
        table["add"](1, 2)
        table["double"](1)
    assert entered == [add, double]
    assert methods["add"] is add


def test_an_unknown_method_raises_the_words_of_the_ancestor() -> None:
    table = Methods().table()
    for params in ((), (1,), (1, 2, 3)):
        with pytest.raises(UnknownMethod) as caught:
            table["no such"](*params)
        assert caught.value.error == 'No such method "no such" found'
        assert isinstance(caught.value, ErrorResponse)


def test_an_unknown_method_is_wrapped_too() -> None:
    table = Methods().table(wrapped)
    assert table["nosuch"](1) == ("wrapped", 'No such method "nosuch" found')


@pytest.mark.parametrize("name", ["__class__", "__init__", "_wrap", "_private", "keys", "__missing__", "add.__call__"])
def test_nothing_but_what_was_registered_is_found(name: str) -> None:
    methods = Methods()
    methods.add(add)
    methods.add_object(Greeter())
    for table in (methods.table(), methods.table(wrapped)):
        assert name not in table
        with pytest.raises(UnknownMethod):
            methods.table()[name]()
        # Asking doesn't fill the table with what strangers ask for.
        table[name]
        assert len(table) == len(methods)


def test_a_table_that_is_dropped_is_forgotten() -> None:
    methods = Methods()
    wrapped_functions: list[Any] = []

    def wrap(function: Any) -> Any:
        wrapped_functions.append(function)
        return function

    table = methods.table(wrap)
    methods.add(add)
    del table
    collected()
    methods.add(double)
    methods.remove("add")
    assert wrapped_functions == [add]
    assert not [obj for obj in gc.get_objects() if type(obj) is MethodTable and wrap in getattr(obj, "_wrappers", ())]


# What a callable takes.


def with_default(a: Any, b: Any = 5) -> None: ...
def with_varargs(a: Any, *rest: Any) -> None: ...
def with_anything(*rest: Any, **options: Any) -> None: ...
def with_keyword_only(a: Any, *, key: Any) -> None: ...
def with_optional_keyword(a: Any, *, key: Any = None) -> None: ...
def positional_only(a: Any, /) -> None: ...
def annotated(a: int, b: str | None = None) -> list[int]:
    return []


class Callables:
    """Things to call that aren't plain functions."""

    def method(self, a: Any) -> None: ...

    @classmethod
    def of_class(cls, a: Any) -> None: ...

    @staticmethod
    def static(a: Any) -> None: ...

    def __call__(self, a: Any) -> None: ...


class Constructed:
    """A class is a callable too."""

    def __init__(self, a: Any) -> None: ...


@functools.wraps(add)
def decorated(*args: Any) -> Any:
    """Takes what `add` takes."""
    return add(*args)


@pytest.mark.parametrize(
    "function, fitting, too_few, too_many, signature",
    [
        (add, [1, 2], [1], [1, 2, 3], "(a, b)"),
        (double, [1], [], [1, 2], "(a)"),
        (with_default, [1], [], [1, 2, 3], "(a, b=...)"),
        (with_default, [1, 2], [], None, "(a, b=...)"),
        (with_varargs, [1, 2, 3, 4], [], None, "(a, *rest)"),
        (with_anything, [], None, None, ""),
        (with_optional_keyword, [1], [], [1, 2], "(a, *, key=...)"),
        (positional_only, [1], [], [1, 2], "(a, /)"),
        (annotated, [1], [], [1, 2, 3], "(a, b=...)"),
        (lambda: None, [], None, [1], "()"),
        (Callables().method, [1], [], [1, 2], "(a)"),
        (Callables().of_class, [1], [], [1, 2], "(a)"),
        (Callables().static, [1], [], [1, 2], "(a)"),
        (Callables(), [1], [], [1, 2], "(a)"),
        (Constructed, [1], [], [1, 2], "(a)"),
        (functools.partial(add, 1), [2], [], [2, 3], "(b)"),
        (functools.partial(with_default, b=1), [2], [], [2, 3], "(a, *, b=...)"),
        (decorated, [1, 2], [1], [1, 2, 3], "(a, b)"),
        (len, [1], [], [1, 2], "(obj, /)"),
        (pow, [1, 2], [1], [1, 2, 3, 4], "(base, exp, mod=...)"),
    ],
)
def test_a_wrong_number_of_params_is_told_with_the_signature(
    function: Callable[..., Any],
    fitting: list[Any],
    too_few: list[Any] | None,
    too_many: list[Any] | None,
    signature: str,
) -> None:
    assert params_mismatch("math.f", function, fitting) is None
    assert params_mismatch("math.f", function, tuple(fitting)) is None
    if too_few is not None:
        text = params_mismatch("math.f", function, too_few)
        assert text is not None
        assert text.startswith(f"wrong params for math.f{signature}: missing a required ")
    if too_many is not None:
        assert (
            params_mismatch("math.f", function, too_many)
            == f"wrong params for math.f{signature}: too many positional arguments"
        )


def test_a_function_that_needs_keywords_can_not_be_called() -> None:
    for params in ([], [1], [1, 2]):
        text = params_mismatch("f", with_keyword_only, params)
        assert text is not None
        assert text.startswith("wrong params for f(a, *, key): ")


class Untold:
    """Its signature is nonsense."""

    __signature__ = 5

    def __call__(self) -> None: ...


@pytest.mark.parametrize("function", [dict, int, print, max, Untold()])
def test_a_callable_that_does_not_tell_has_no_mismatch(function: Any) -> None:
    assert params_mismatch("f", function, [1, 2, 3, 4, 5]) is None


def with_secret_default(a: Any, token: str = "s3cret") -> None: ...


def test_a_default_is_nobodys_business() -> None:
    text = params_mismatch("f", with_secret_default, [])
    assert text == "wrong params for f(a, token=...): missing a required argument: 'a'"


def with_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds a param of its own."""

    @functools.wraps(function)
    def call(*params: Any) -> Any:
        return function("context", *params)

    return call


@with_context
def in_context(context: Any, value: Any) -> Any:
    """Not seen by the caller: ``context``."""
    return value + 1


def test_a_decorator_that_adds_a_param_does_not_make_the_callers_wrong() -> None:
    with pytest.raises(TypeError) as caught:
        in_context("a text")
    assert params_mismatch("in_context", in_context, ["a text"], caught.value) is None


def test_a_decorated_function_that_was_not_reached_had_wrong_params() -> None:
    with pytest.raises(TypeError) as caught:
        decorated(1)
    text = params_mismatch("add", decorated, [1], caught.value)
    assert text == "wrong params for add(a, b): missing a required argument: 'b'"


def test_what_a_handler_calls_wrongly_is_its_own_fault() -> None:
    def handler(a: Any) -> None:
        add(a)  # type: ignore[call-arg]

    with pytest.raises(TypeError) as caught:
        handler(1)
    assert params_mismatch("handler", handler, [1], caught.value) is None
