"""OpenTelemetry, if the application uses it: our spans, and the trace context of changes.

Does nothing unless `opentelemetry` is already loaded, so without tracing it costs one dict lookup.
Records no secrets: attributes are names, numbers and revisions. Knows no other module.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

Attributes = Mapping[str, str | int | float | bool | tuple[str, ...]]

_NAME: Final = "autobot-slm"
_TRACEPARENT: Final = "traceparent"


def enabled() -> bool:
    """Return whether the application has loaded OpenTelemetry."""
    return "opentelemetry.trace" in sys.modules


def span(
    name: str, attributes: Attributes | None = None, *, parent: str | None = None
) -> AbstractContextManager[Any]:
    """Return a context manager for a span; its value is the span, or None.

    Args:
        name: the span's name.
        attributes: the span's attributes; no secrets.
        parent: a `traceparent` (W3C Trace Context) to join; None for the current span.
    """
    return _span(name, attributes, parent) if enabled() else contextlib.nullcontext()


def joined(
    name: str, parent: str | None, attributes: Attributes | None = None
) -> AbstractContextManager[Any]:
    """Return a span that joins the trace `parent`, or no span without one."""
    if parent is None or not enabled():
        return contextlib.nullcontext()
    return _span(name, attributes, parent)


def begin_joined(name: str, parent: str | None) -> Any:
    """Return a started span in the trace `parent`, ended with `end`; None without a parent."""
    if parent is None or not enabled():
        return None
    from opentelemetry import trace

    return trace.get_tracer(_NAME).start_span(name, context=_context_of(parent))


@contextlib.contextmanager
def _span(name: str, attributes: Attributes | None, parent: str | None) -> Iterator[Any]:
    from opentelemetry import trace

    tracer = trace.get_tracer(_NAME)
    # Exceptions are not recorded automatically: their text may contain the data being handled.
    with tracer.start_as_current_span(
        name,
        context=_context_of(parent),
        attributes=dict(attributes or {}),
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except Exception as error:
            failed(current, type(error).__name__)
            raise


def begin(name: str, attributes: Attributes | None = None) -> Any:
    """Return a started span for a call to another service; None without tracing.

    It does not become the current span and is ended with `end`, because a stream may end elsewhere.
    """
    if not enabled():
        return None
    from opentelemetry import trace

    return trace.get_tracer(_NAME).start_span(
        name, kind=trace.SpanKind.CLIENT, attributes=dict(attributes or {})
    )


def end(current: Any, attributes: Attributes | None = None) -> None:
    """End a span returned by `begin`."""
    if current is not None:
        current.set_attributes(dict(attributes or {}))
        current.end()


def failed(current: Any, error_type: str) -> None:
    """Mark a span as failed, with only the error's name."""
    if current is not None:
        from opentelemetry.trace import StatusCode

        current.set_attribute("error.type", error_type)
        current.set_status(StatusCode.ERROR)


def traceparent() -> str | None:
    """Return the current span's context in W3C format, or None without tracing."""
    if not enabled():
        return None
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _context_of(parent: str | None) -> Any:
    if parent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({_TRACEPARENT: parent})
