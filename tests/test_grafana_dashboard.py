"""docs/grafana-dashboard.json: what Grafana's import needs, and no query for a metric we lack."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tests.support.raw import Api

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "docs" / "grafana-dashboard.json").read_text()
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
_METRIC = re.compile(r"\bslm_[a-z_]+")


def test_it_has_what_an_import_needs() -> None:
    """Grafana's dashboard model: a title, a schema version, panels with ids, types and places."""
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD, "an id of one Grafana means another dashboard in the next"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "job", "instance"}
    for panel in PANELS:
        assert panel["type"] in {"timeseries", "stat"}
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(panel)))
        assert used <= variables | {"__rate_interval"}


def _fields(data: Any, path: str = "") -> dict[str, Any]:
    """Every value of a JSON document that holds no other, by its path."""
    if isinstance(data, dict) and data:
        parts = data.items()
    elif isinstance(data, list) and data:
        parts = dict(enumerate(data)).items()
    else:
        return {path: data}
    return {k: v for name, part in parts for k, v in _fields(part, f"{path}/{name}").items()}


def _misfits(model: Any, path: str = "") -> Iterator[str]:
    """Name each value in a model of Grafana's that is not of the type that it declares there."""
    if isinstance(model, list):
        for number, part in enumerate(model):
            yield from _misfits(part, f"{path}/{number}")
    elif hasattr(model, "to_json"):
        for name, declared in get_type_hints(type(model)).items():
            value, place = getattr(model, name), f"{path}/{name}"
            try:
                plain = json.dumps(value)
            except TypeError:  # a model itself, or a list of them
                yield from _misfits(value, place)
                continue
            try:
                adapter = TypeAdapter(declared, config=ConfigDict(arbitrary_types_allowed=True))
                adapter.validate_json(plain, strict=True)
            except ValidationError:
                yield f"{place} is {value!r}, not {declared}"


def test_grafana_s_own_model_knows_each_field() -> None:
    """Grafana's published types take the dashboard: no name that they lack, no value of another."""
    register_default_plugins()
    model = Dashboard.from_json(DASHBOARD)
    assert list(_misfits(model)) == []
    back = _fields(json.loads(JSONEncoder().encode(model)))
    unknown = {path for path, value in _fields(DASHBOARD).items() if back.get(path) != value}
    assert unknown == set()


def test_no_panel_lies_over_another() -> None:
    """Each panel has its own place in the grid of 24 columns."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


async def test_it_asks_for_metrics_that_there_are(admin: Api) -> None:
    """Every metric of every query is one that /metrics answers with, and all of ours are shown."""
    await admin.create("alpha")
    text = (await admin.get("/metrics")).body.decode()
    answered = {
        sample.name
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("slm_")
    }
    asked = set()
    for panel in PANELS:
        for target in panel["targets"]:
            # A query that a parser would refuse has brackets left open.
            for opened, closed in ("()", "{}", "[]"):
                assert target["expr"].count(opened) == target["expr"].count(closed)
            asked |= set(_METRIC.findall(target["expr"]))
    assert asked <= answered, asked - answered
    shown = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in asked}
    there = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in answered}
    unshown = {name.removesuffix("_total") for name in there - shown}
    assert {name.removesuffix("_total") for name in shown} >= unshown - {
        "slm_agents",
        "slm_frames",
    }
