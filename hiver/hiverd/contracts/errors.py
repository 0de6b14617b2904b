"""One tree of typed errors. Each carries the HTTP status and a text that is safe to show to a client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class HiverError(Exception):
    """Base of every error with a meaning for the caller.

    `message` is shown to clients as the `error` member (PROTOCOL 2) and must never hold a secret or a traceback;
    `details` becomes the optional `details` object. What only the operator should read goes to the log.
    """

    status: ClassVar[int] = 500

    def __init__(self, message: str, *, details: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details) if details else None


class InvalidError(HiverError):
    """The request is wrong; `field` names the offending member (PROTOCOL 4.4), as in `fs[0].mount`."""

    status = 400

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message, details={"field": field} if field else None)
        self.field = field


class UnsupportedError(InvalidError):
    """The request is well-formed and asks for something this server cannot do (yet, or here)."""


class ForbiddenError(HiverError):
    """The caller may not do this: a foreign browser origin, a reserved port."""

    status = 403


class NotFoundError(HiverError):
    """The named sandbox, file, exec session or route does not exist."""

    status = 404


class ConflictError(HiverError):
    """The request collides with one that is under way."""

    status = 409


class UnavailableError(HiverError):
    """A temporary state: starting, stopping, an engine that does not answer, a full host."""

    status = 503


class BackendError(HiverError):
    """A plug-in failed in a way that the caller cannot mend; the message says what failed."""

    status = 500


class SandboxGoneError(HiverError):
    """An isolation plug-in is certain that the sandbox's workload does not exist any more.

    Every other failure means "unknown", which is never treated as dead.
    """

    status = 404
