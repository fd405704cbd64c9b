"""OpenTelemetry where the application uses it: our spans, and the context that a change carries.

Does nothing unless `opentelemetry` is loaded already, so whoever does not trace pays one look into
a dict. Names no secret: attributes are names, numbers and revisions. Knows nobody of the package.
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
    """Say whether the application has loaded OpenTelemetry."""
    return "opentelemetry.trace" in sys.modules


def span(
    name: str, attributes: Attributes | None = None, *, parent: str | None = None
) -> AbstractContextManager[Any]:
    """Return a context manager that is a span while it lasts; its value is the span, or None.

    Args:
        name: what happens.
        attributes: what it happens to; no secret.
        parent: a `traceparent` (W3C Trace Context) to join; None joins what is current.
    """
    return _span(name, attributes, parent) if enabled() else contextlib.nullcontext()


def joined(
    name: str, parent: str | None, attributes: Attributes | None = None
) -> AbstractContextManager[Any]:
    """Return a span that joins the trace `parent`; nothing where there is none to join."""
    if parent is None or not enabled():
        return contextlib.nullcontext()
    return _span(name, attributes, parent)


def begin_joined(name: str, parent: str | None) -> Any:
    """Return a started span of the trace `parent`, to be ended with `end`; None: none to join."""
    if parent is None or not enabled():
        return None
    from opentelemetry import trace

    return trace.get_tracer(_NAME).start_span(name, context=_context_of(parent))


@contextlib.contextmanager
def _span(name: str, attributes: Attributes | None, parent: str | None) -> Iterator[Any]:
    from opentelemetry import trace

    tracer = trace.get_tracer(_NAME)
    # Not recorded by itself: an exception's text may hold what was being handled.
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
    """Return a started span of a call to another service; None: no tracing.

    It is nobody's current one and is ended with `end`: a stream ends elsewhere than it begins.
    """
    if not enabled():
        return None
    from opentelemetry import trace

    return trace.get_tracer(_NAME).start_span(
        name, kind=trace.SpanKind.CLIENT, attributes=dict(attributes or {})
    )


def end(current: Any, attributes: Attributes | None = None) -> None:
    """End a span that `begin` returned."""
    if current is not None:
        current.set_attributes(dict(attributes or {}))
        current.end()


def failed(current: Any, error_type: str) -> None:
    """Mark a span as failed, by the error's name alone."""
    if current is not None:
        from opentelemetry.trace import StatusCode

        current.set_attribute("error.type", error_type)
        current.set_status(StatusCode.ERROR)


def traceparent() -> str | None:
    """Return the current span's context in W3C form, or None where nothing is traced."""
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
