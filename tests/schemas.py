"""Strict readings of the schemas, for tests: what is written must be described, though a reader must ignore what is not."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from jsonschema import Draft7Validator, Draft202012Validator

from tacfast.schemas import load

_OASIS = Path(__file__).parent / "official" / "sarif-schema-2.1.0.json"


@lru_cache
def strict(name: str) -> Draft202012Validator:
    """A published schema that allows no key which it does not name."""
    return Draft202012Validator(_closed(load(name)), format_checker=Draft202012Validator.FORMAT_CHECKER)


@lru_cache
def sarif() -> Draft7Validator:
    """The official schema of SARIF 2.1.0, which is strict as it is."""
    return Draft7Validator(json.loads(_OASIS.read_text(encoding="utf-8")), format_checker=Draft7Validator.FORMAT_CHECKER)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _closed(value) for key, value in schema.items()}
    return (
        {**inner, "additionalProperties": inner.get("additionalProperties", False)} if isinstance(schema.get("properties"), dict) else inner
    )
