"""Every failure becomes `{"error": ..., "details"?: ...}` (PROTOCOL 2, 0.18); the log has the rest."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, ValidationException

from hiverd.contracts.errors import HiverError

log = logging.getLogger(__name__)


def error_document(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body). What is not ours to explain is a 500 with a fixed text, and is logged."""
    if isinstance(error, HiverError):
        document: dict[str, Any] = {"error": error.message or HTTPStatus(error.status).phrase}
        if error.details:
            document["details"] = error.details
        return error.status, document
    if isinstance(error, ValidationException):
        return 400, {"error": _validation_text(error)}
    if isinstance(error, HTTPException):
        text = error.detail or HTTPStatus(error.status_code).phrase
        return error.status_code, {"error": text}
    log.error("unexpected error", exc_info=error)
    return 500, {"error": "internal error; the server's log says why"}


def error_body(error: Exception) -> tuple[int, bytes]:
    status, document = error_document(error)
    return status, msgspec.json.encode(document)


def handle_error(_: Request[Any, Any, Any], error: Exception) -> Response[dict[str, Any]]:
    """Litestar's exception handler for everything, routing errors included."""
    status, document = error_document(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return Response(document, status_code=status, media_type=MediaType.JSON, headers=headers)


def _validation_text(error: ValidationException) -> str:
    items = error.extra if isinstance(error.extra, list) else ()
    parts = [f"{item.get('key', 'request')}: {item['message']}" for item in items if "message" in item]
    return "; ".join(parts) or error.detail
