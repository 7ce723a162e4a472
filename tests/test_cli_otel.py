"""``gmprpc serve --otel``: spans go to whatever providers there are."""

from __future__ import annotations

from pathlib import Path

from .commands import ANY_PORT, GMPRPC, assert_fails, result_of, run, serving
from .programs import Program

TRACED_APP = """
import gmprpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

exporter = ConsoleSpanExporter(formatter=lambda span: f"span {span.name} {span.kind.name}\\n")
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

service = gmprpc.Service()

@service.method
def echo(value):
    return value
"""


def test_calls_of_a_traced_application_make_spans(tmp_path: Path) -> None:
    (tmp_path / "traced_app.py").write_text(TRACED_APP)
    with serving("--otel", "--app-dir", tmp_path, "traced_app:service") as served:
        assert result_of(served.addresses[0], "echo", "5") == 5
        assert served.expect("^span") == "span echo SERVER"


def test_option_is_in_the_environment_too(tmp_path: Path) -> None:
    (tmp_path / "traced_app.py").write_text(TRACED_APP)
    with serving("--app-dir", tmp_path, "traced_app:service", env={"GMPRPC_OTEL": "1"}) as served:
        assert result_of(served.addresses[0], "echo", "5") == 5
        assert served.expect("^span") == "span echo SERVER"


def test_spans_that_go_nowhere_are_warned_of_once() -> None:
    with Program(*GMPRPC, "serve", "--otel", "-b", ANY_PORT, "-b", ANY_PORT) as program:
        assert "WARNING gmprpc.cli: --otel makes no spans" in program.line()
        address = program.line().removeprefix("listening on ")
        assert result_of(address, "sum", "1", "2") == 3
        program.terminate()
        assert "WARNING" not in "".join(program.lines())


def test_without_opentelemetry_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ModuleNotFoundError('there is none')")
    (tmp_path / "app.py").write_text("import gmprpc\nservice = gmprpc.Service()")
    process = run("serve", "--otel", "-b", ANY_PORT, "--app-dir", tmp_path, "app:service")
    assert_fails(process, 3, "--otel", "pip install 'gmprpc[otel]'")
