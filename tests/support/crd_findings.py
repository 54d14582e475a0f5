"""What the schemas of custom resources (tests/crds) say against a manifest: unknown fields, types, rules in CEL, versions that are deprecated or not served."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from tests.support.root import ROOT

Manifest = dict[str, Any]


@functools.cache
def _crds() -> dict[tuple[str, str], dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (ROOT / "tests" / "crds").glob("*.json")]
    return {(crd["group"], crd["kind"]): crd for crd in found}


def crd_findings(document: Manifest) -> Iterator[str]:
    """One line for each fault; a kind of which there is no schema is one."""
    import jsonschema

    group, version = document["apiVersion"].split("/")
    crd = _crds().get((group, document["kind"]))
    where = f"{document['apiVersion']} {document['kind']}"
    if crd is None:
        yield f"{where}: no CRD in tests/crds"
        return
    if version not in crd["versions"]:
        yield f"{where}: {'deprecated' if version in crd['deprecated'] else 'not served'}; current: {', '.join(crd['versions'])}"
        return
    schema = crd["versions"][version]
    strict = _strict(schema)
    strict["properties"]["metadata"] = {"type": "object"}
    for error in jsonschema.Draft7Validator(strict).iter_errors(document):
        yield f"{document['kind']} {'.'.join(map(str, error.path))}: {error.message[:160]}"
    yield from _broken_rules(schema, document, document["kind"])


def _strict(schema: Any) -> Any:
    """Structural schema -> JSON schema that refuses unknown fields."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", None):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.pop("nullable", None) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    for key in ("items", "additionalProperties", "not"):
        schema |= {key: _strict(schema[key])} if isinstance(schema.get(key), dict) else {}
    if "properties" in schema:
        schema["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            schema["additionalProperties"] = False
    return schema


def _broken_rules(schema: Any, value: Any, path: str) -> Iterator[str]:
    """Rules of a schema (x-kubernetes-validations) that a value breaks; those about changes (oldSelf) are left out."""
    import cel

    if not isinstance(schema, dict) or value is None:
        return
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not _holds(cel, rule["rule"], value):
            yield f"{path}: {rule.get('message') or rule['rule']}"
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _broken_rules(schema.get("properties", {}).get(key) or schema.get("additionalProperties"), part, f"{path}.{key}")
    if isinstance(value, list):
        for index, part in enumerate(value):
            yield from _broken_rules(schema.get("items"), part, f"{path}[{index}]")


def _holds(cel: Any, rule: str, value: Any) -> bool:
    """A rule that cannot be evaluated is broken, as it is for an API server: it asks for a field that is not there."""
    try:
        return cel.evaluate(rule, {"self": value}) is True
    except (KeyError, RuntimeError, TypeError, ValueError):
        return False
