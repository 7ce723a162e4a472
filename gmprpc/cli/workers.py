"""``serve --workers``: several processes, which gunicorn starts, watches, replaces and ends."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import click
from gunicorn import glogging, systemd
from gunicorn.app.base import Application
from gunicorn.arbiter import Arbiter
from gunicorn.errors import AppImportError, HaltServer

from gmprpc.gunicorn import KILL_MARGIN, Worker
from gmprpc.server import Server
from gmprpc.transport import FD_PREFIX, file_identity, format_address, makes_file, open_listener

from . import limits, logs, metrics
from .exits import ExitCode
from .running import listening_errors


def serve_in_workers(
    number: int,
    load: Callable[[], Server],
    binds: Sequence[Any],
    settings: Mapping[str, Any],
    *,
    default_bind: Any,
    patches: bool,
    on_listening: Callable[[Any], None],
) -> NoReturn:
    """Have gunicorn run ``number`` processes, each of which serves what ``load()`` gives there; never returns.

    ``settings`` are the options of ``serve``. Without ``binds`` it listens where systemd does for it, or else at
    ``default_bind``. ``on_listening(address)`` is called for each place when it listens there.
    """
    program = _Program(
        load,
        {
            "logger_class": _logger_of(settings),
            "loglevel": settings["log_level"],
            "accesslog": None,
            "worker_class": Worker if patches else _UnpatchedWorker,
            "workers": number,
            "worker_connections": settings["max_connections"],
            # When gunicorn kills: a worker has ended by itself before that. It takes whole seconds only.
            "graceful_timeout": math.ceil(settings["drain_delay"] + settings["graceful_timeout"] + KILL_MARGIN),
        },
        on_listening,
        on_worker=partial(logs.watch, settings),
    )
    master = os.getpid()
    try:
        theirs = _listeners_of_systemd()
        program.listen([bind for bind in binds or ([] if theirs else [default_bind]) if bind not in theirs], settings)
        metrics.prepare_for_workers(settings)
        program.run()
        sys.exit(ExitCode.OK)
    except SystemExit as exc:
        # The workers come here, too, at their end.
        if os.getpid() == master and exc.code in (Arbiter.APP_LOAD_ERROR, Arbiter.WORKER_BOOT_ERROR):
            sys.exit(ExitCode.UNREACHABLE)
        raise
    except HaltServer:  # A second worker couldn't begin either: gunicorn has let go of everything by now.
        sys.exit(ExitCode.UNREACHABLE)
    finally:
        if os.getpid() == master:
            program.clean_up()


def _listeners_of_systemd() -> set[str]:
    """The sockets that systemd has opened for this process, as ``--bind`` has them: gunicorn takes them by itself."""
    first = systemd.SD_LISTEN_FDS_START
    return {f"{FD_PREFIX}{first + number}" for number in range(systemd.listen_fds(unset_environment=False))}


class _UnpatchedWorker(Worker):
    patches = False


def _logger_of(settings: Mapping[str, Any]) -> type[glogging.Logger]:
    """Gunicorn's logger, whose lines have the form of all others."""

    class Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn has no type hints
        def setup(self, cfg: Any) -> None:
            super().setup(cfg)
            for handler in self.error_log.handlers:
                handler.setFormatter(logs.formatter(settings))

    return Logger


class _Program(Application):  # type: ignore[misc]  # gunicorn has no type hints
    """What gunicorn runs: configured by the options of ``serve``, and for the rest by GUNICORN_CMD_ARGS."""

    def __init__(
        self,
        load: Callable[[], Server],
        settings: Mapping[str, Any],
        on_listening: Callable[[Any], None],
        *,
        on_worker: Callable[[], None],
    ) -> None:
        self._load = load
        self._settings = {**settings, "default_proc_name": "gmprpc"}
        self._on_listening = on_listening
        self._on_worker = on_worker
        self._binds: list[str] = []
        self._files: list[tuple[str, tuple[int, int] | None]] = []  # What tells each from one that comes after it.
        super().__init__(prog="GUNICORN_CMD_ARGS")

    def load_config(self) -> None:
        """Configure gunicorn; it does that again for every SIGHUP."""
        given = vars(self.cfg.parser().parse_args(self.cfg.get_cmd_args_from_env()))
        # By default all programs of a user would have it at the same place.
        self.cfg.set("control_socket_disable", given["control_socket"] is None)
        if given["config"] is not None:
            self.load_config_from_file(given["config"])
        for name, value in given.items():
            if name in self.cfg.settings and value is not None:
                self.cfg.set(name, value)
        when_ready, post_worker_init = self.cfg.when_ready, self.cfg.post_worker_init
        # What `serve` has options for is theirs.
        for name, value in self._settings.items():
            self.cfg.set(name, value)
        self.cfg.set("bind", self._binds)

        def on_ready(arbiter: Any) -> None:
            self._take_over(arbiter)
            when_ready(arbiter)

        def on_worker(worker: Any) -> None:
            self._on_worker()
            post_worker_init(worker)

        self.cfg.set("when_ready", on_ready)
        self.cfg.set("post_worker_init", on_worker)

    def load(self) -> Server:
        """What a worker serves; called by gunicorn, there."""
        try:
            return self._load()
        except click.ClickException as exc:
            if self.cfg.reload and isinstance(exc.__cause__, SyntaxError):
                raise exc.__cause__  # noqa: B904  # That a worker can wait until it is put right.
            raise AppImportError(f"Error: {exc.format_message()}") from exc

    def listen(self, binds: Sequence[Any], settings: Mapping[str, Any]) -> None:
        """Open what to listen at, for gunicorn to take over.

        It would do so by itself, but try five times, replace the file of a unix socket even where another server
        listens on it, and know nothing of its owner.
        """
        self._binds = [format_address(bind) for bind in binds]
        # Where each worker opens its own, or a master before us has, gunicorn knows better.
        if not self.cfg.reuse_port and "GUNICORN_FD" not in os.environ:
            file = limits.socket_file(settings)
            self._binds = [self._open(bind, file) for bind in binds]
        self.cfg.set("bind", self._binds)

    def _open(self, bind: Any, file: Any) -> str:
        with listening_errors(bind):
            descriptor = open_listener(bind, file).detach()
        if makes_file(bind):
            path = bind.removeprefix("unix:")
            self._files.append((path, file_identity(path)))
        return f"{FD_PREFIX}{descriptor}"

    def _take_over(self, arbiter: Any) -> None:
        self._files.clear()  # From now on gunicorn looks after them.
        arbiter.START_CTX["args"] = sys.orig_argv  # To SIGUSR2 it would run the file __main__.py, and not the module.
        names = [listener.getsockname() for listener in arbiter.LISTENERS]
        # Without them each worker listens by itself.
        for place in [f"unix:{name}" if isinstance(name, str) else name for name in names] or self._binds:
            self._on_listening(place)

    def clean_up(self) -> None:
        """Remove what gunicorn hasn't got as far as taking over."""
        for path, identity in self._files:
            if file_identity(path) == identity:
                with suppress(OSError):
                    os.unlink(path)
