"""Where settings come from besides arguments: the SLM_* environment variables, cleaned up.

Knows no setting by name. Ignores what Kubernetes sets by itself for a Service named `slm`:
SLM_PORT=tcp://… would keep every server of the namespace from starting.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from slm.common.environment import is_service_link, service_variables, variable

PREFIX: Final = "SLM_"


class TidyEnvironment(PydanticBaseSettingsSource):
    """Reads each field from `SLM_` plus its name in capitals; empty variables are ignored."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the variable's text, the field's name, and that the text is not JSON."""
        return variable(PREFIX + field_name.upper()), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the fields that are set."""
        found = {}
        for name, field in self.settings_cls.model_fields.items():
            value, _, _ = self.get_field_value(field, name)
            if value is not None and not is_service_link(value):
                found[name] = value
        return found


def ignored_variables(environ: Mapping[str, str] | None = None) -> str | None:
    """Return a sentence about Kubernetes variables that the server ignores, or None."""
    names = service_variables(PREFIX, os.environ if environ is None else environ)
    if not names:
        return None
    few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"ignored {few}: Kubernetes sets them for a Service named slm, or that begins so; they are"
        " no settings of this server (enableServiceLinks: false in the pod's spec leaves them out)"
    )
