"""What our OpenAPI document says beyond the handlers' signatures: bodies that we decode ourselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat

from hiverd.wire.answers import ErrorBody

_ERRORS: Final = {
    400: "The request is wrong; `error` names the field and the reason",
    403: "A web page's request, or a reserved port",
    404: "No such sandbox, file, command or route",
    503: "The sandbox or the server is starting or stopping",
}


def describe(outcomes: Mapping[int, str] | None = None) -> dict[int, ResponseSpec]:
    """Response documentation: the given successes, and the errors that every route can answer."""
    described = {
        status: ResponseSpec(data_container=dict[str, Any], description=text, generate_examples=False)
        for status, text in (outcomes or {}).items()
    }
    for status, text in _ERRORS.items():
        described.setdefault(status, ResponseSpec(data_container=ErrorBody, description=text, generate_examples=False))
    return described


@dataclass
class FileOperation(Operation):
    """An operation on the path of a file, which is free text and not, as Litestar has it, a URI."""

    def __post_init__(self) -> None:
        for parameter in self.parameters or ():
            schema = getattr(parameter, "schema", None)
            if isinstance(schema, Schema) and schema.format == OpenAPIFormat.URI:
                schema.format = None


def json_body(model: type[Any]) -> type[Operation]:
    """An operation whose request body is `model` as JSON; decoded by us, for messages that name the member."""
    (schema,), components = msgspec.json.schema_components([model], ref_template="#/$defs/{name}")
    document = _inlined(schema, components)

    @dataclass
    class WithBody(Operation):
        def __post_init__(self) -> None:
            media = OpenAPIMediaType(schema=_RawSchema(document))
            self.request_body = RequestBody(content={"application/json": media})

    return WithBody


def bytes_body(description: str) -> type[Operation]:
    """An operation that takes raw bytes."""

    @dataclass
    class WithBytes(FileOperation):
        def __post_init__(self) -> None:
            super().__post_init__()
            media = OpenAPIMediaType(schema=_RawSchema({"type": "string", "format": "binary"}))
            self.request_body = RequestBody(content={"application/octet-stream": media}, description=description)

    return WithBytes


class _RawSchema(Schema):
    """A schema that is a JSON document already."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__()
        self._document = document

    def to_schema(self) -> dict[str, Any]:
        return self._document


def _inlined(node: Any, components: Mapping[str, Any]) -> Any:
    """The schema without references: none of our models is recursive."""
    if isinstance(node, dict):
        if "$ref" in node:
            return _inlined(components[node["$ref"].rsplit("/", 1)[-1]], components)
        return {name: _inlined(value, components) for name, value in node.items() if name != "discriminator"}
    if isinstance(node, list):
        return [_inlined(item, components) for item in node]
    return node
