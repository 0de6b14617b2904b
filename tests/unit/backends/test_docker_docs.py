"""docs/docker.md names every option of the plug-in, with its default."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hiver_backends.docker.settings import Settings

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "docker.md"


def test_every_option_is_documented_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", DOCUMENT.read_text(), re.MULTILINE))
    defaults = {name: getattr(Settings(), name) for name in Settings.__struct_fields__}
    expected = {name: json.dumps(list(v) if isinstance(v, tuple) else v) for name, v in defaults.items()}
    assert rows == expected
