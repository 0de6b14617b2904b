"""Takes secrets out of text on its way into events (PROTOCOL 0.9). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hiverd.wire.redaction import REDACTED

_PROBE_CHARACTERS: Final = 8


class Redactor:
    """For one text that comes in pieces, and for any number of whole ones."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """`secrets`: the longest first."""
        self.secrets = secrets
        self._held = ""

    def whole(self, text: str) -> str:
        """A text that stands for itself."""
        for secret in self.secrets:
            text = text.replace(secret, REDACTED)
        return text

    def piece(self, text: str) -> str:
        """The next piece. What could be the beginning of a secret is held back until more of it has come."""
        text = self.whole(self._held + text)
        kept = len(text) - max((_begun(secret, text) for secret in self.secrets), default=0)
        self._held = text[kept:]
        return text[:kept]

    def end(self) -> str:
        """What was held back."""
        text, self._held = self._held, ""
        return text


def _begun(secret: str, text: str) -> int:
    """How many characters at the end of the text are the beginning of the secret."""
    probe = secret[:_PROBE_CHARACTERS]
    position = text.find(probe, max(0, len(text) - len(secret) + 1))
    while position >= 0:
        if secret.startswith(text[position:]):
            return len(text) - position
        position = text.find(probe, position + 1)
    for size in range(min(len(probe), len(secret), len(text) + 1) - 1, 0, -1):
        if text.endswith(secret[:size]):
            return size
    return 0
