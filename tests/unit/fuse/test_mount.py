"""Changing rules while requests are under way."""

from __future__ import annotations

import threading
from pathlib import Path

from hiverd.files.acl import Rules
from hiverd.fuse.judge import ServerProcess
from hiverd.fuse.mount import FuseMount


def test_an_answer_under_way_is_waited_for(tmp_path: Path) -> None:
    """It was judged by the old rules, and the kernel would keep it for an hour."""
    mount = FuseMount(tmp_path, rules=Rules([], "/m"), record=None, exempt=ServerProcess())
    mount._callers[0].turn = 1
    changing = threading.Thread(target=mount.set_rules, args=(Rules([], "/m"),))
    changing.start()
    changing.join(0.2)
    assert changing.is_alive()
    mount._callers[0].turn = 2
    changing.join(4)
    assert not changing.is_alive()
    mount.close()
