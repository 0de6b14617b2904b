"""Each name of a listing once, without remembering them all."""

from __future__ import annotations


class Once:
    """Keys arrive in their order. Those that stand for the same name begin alike (`a`, `a.symlink`, `a/`), so only the
    names that the present key begins with need to be remembered; all between two of them begin with it as well."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def admits(self, key: str, name: str) -> bool:
        """False for a name that has been admitted for an earlier key."""
        while self._names and not key.startswith(self._names[-1]):
            self._names.pop()
        if name in self._names:
            return False
        self._names.append(name)
        return True
