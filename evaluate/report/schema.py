"""Check a report against its documented schema, `report_schema.json` (JSON Schema, a subset)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SCHEMA_FILE = Path(__file__).with_name("report_schema.json")
SCHEMA: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def require_valid(report: dict[str, Any]) -> None:
    """Raises: ValueError naming the first fields that are missing, unknown or of a wrong type."""
    found = problems(report)
    if found:
        raise ValueError("report does not fit its schema: " + "; ".join(found[:5]))


def problems(report: Any) -> list[str]:
    """What is wrong with a report, one line a field; empty when nothing is."""
    return list(_check(report, SCHEMA, SCHEMA.get("$defs", {}), "report"))


def _check(value: Any, schema: dict[str, Any], defs: dict[str, Any], path: str) -> list[str]:
    if "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        results = [_check(value, option, defs, path) for option in schema["anyOf"]]
        return [] if any(not r for r in results) else min(results, key=len)
    wanted = schema.get("type")
    names = [wanted] if isinstance(wanted, str) else wanted or []
    if names and not any(_is(value, name) for name in names):
        return [f"{path} is {type(value).__name__}, not {' or '.join(names)}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path} is {value!r}, not one of {schema['enum']}")
    if "minimum" in schema and not isinstance(value, bool) and isinstance(value, (int, float)):
        if value < schema["minimum"]:
            found.append(f"{path} is {value}, below {schema['minimum']}")
    if isinstance(value, dict):
        found += _check_object(value, schema, defs, path)
    if isinstance(value, list) and "items" in schema:
        for place, item in enumerate(value):
            found += _check(item, schema["items"], defs, f"{path}.{place}")
    return found


def _check_object(
    value: dict[str, Any], schema: dict[str, Any], defs: dict[str, Any], path: str
) -> list[str]:
    properties = schema.get("properties", {})
    found = [
        f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value
    ]
    others = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in properties:
            found += _check(item, properties[name], defs, f"{path}.{name}")
        elif others is False:
            found.append(f"{path}.{name} is not in the schema")
        elif isinstance(others, dict):
            found += _check(item, others, defs, f"{path}.{name}")
    return found


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, TYPES[name])
