"""MODULE:ATTR to the service that it names."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from gmprpc.server import Server
from gmprpc.service import Service

from .exits import Misuse, Unreachable


def load_service(target: str, *, app_dir: str, factory: bool) -> Service | Server:
    """The service that ``target``, a MODULE:ATTR, names, or the server that has it; ATTR may have dots.

    The module is looked for in ``app_dir`` first. With ``factory`` the attribute is called for the service.

    Raises:
        Misuse: ``target`` isn't MODULE:ATTR.
        Unreachable: there is no such module or attribute, it fails, or it is no service.
    """
    module_name, attribute = split(target)
    sys.path.insert(0, os.path.abspath(app_dir))
    try:
        found = _attribute_of(_import(module_name, app_dir), attribute)
        if factory:
            if not callable(found):
                raise Unreachable(f"{target} can't be called: leave --factory out.")
            found = found()
    except (Exception, SystemExit) as exc:  # An application that exits while it is imported has failed, too.
        if isinstance(exc, Unreachable):
            raise
        _report(exc, target, app_dir)
    if isinstance(found, (Service, Server)):
        return found
    hint = "" if factory or not callable(found) else "; if it makes one, add --factory"
    raise Unreachable(f"{target} is no gmprpc.Service or gmprpc.Server, but of type {type(found).__name__}{hint}.")


def split(target: str) -> tuple[str, str]:
    """The module and the attribute that ``target`` names; raises Misuse if it isn't MODULE:ATTR."""
    module_name, _, attribute = target.partition(":")
    if module_name.endswith(".py"):
        module_name = module_name.removesuffix(".py").replace(os.sep, ".")
        raise Misuse(f"{target!r} names a file: name the module, {module_name}:{attribute or 'service'}.")
    if not all(name.isidentifier() for name in [*module_name.split("."), *attribute.split(".")]):
        raise Misuse(f"{target!r} is not MODULE:ATTR, as in app:service. (An address goes with --bind.)")
    return module_name, attribute


def _import(name: str, app_dir: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{name}.".startswith(f"{exc.name}."):
            raise  # It is there, and looks for another one in vain.
        directory = os.path.abspath(app_dir)
        raise Unreachable(f"no module {exc.name!r} in {directory}: say with --app-dir where it is.") from exc


def _attribute_of(module: ModuleType, path: str) -> Any:
    found: Any = module
    try:
        for name in path.split("."):
            found = getattr(found, name)
    except AttributeError as exc:
        services = [name for name, value in vars(module).items() if isinstance(value, (Service, Server))]
        has = f"what can be served there: {', '.join(services)}" if services else "it has no Service and no Server"
        raise Unreachable(f"no {path!r} in module {module.__name__!r}; {has}.") from exc
    return found


def _report(exc: BaseException, target: str, app_dir: str) -> NoReturn:
    """Raise what tells, in one line, that the application itself has failed with ``exc``, and where."""
    # The last line of a message is enough: a SyntaxError, say, brings its own place.
    message = exc.msg if isinstance(exc, SyntaxError) else str(exc)
    what = f"{type(exc).__name__}: {message}" if message else type(exc).__name__
    place = _place_of(exc, os.path.abspath(app_dir))
    raise Unreachable(f"{target} can't be loaded: {' '.join(what.split())}{place}") from exc


def _place_of(exc: BaseException, app_dir: str) -> str:
    """`` (file:line)`` of the innermost line of the application that led to ``exc``."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f" ({exc.filename}:{exc.lineno})"
    place, traceback = "", exc.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        # What is installed below the directory, in an environment of its own, isn't the application.
        if file.startswith(os.path.join(app_dir, "")) and "site-packages" not in file:
            place = f" ({file}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place
