"""A bound on memory that all connections of one sandbox share."""

from __future__ import annotations


class Budget:
    """Counts bytes that are held somewhere; nobody waits."""

    def __init__(self, left_bytes: int) -> None:
        self.left_bytes = left_bytes

    def take(self, wanted: int) -> int:
        """How many of so many bytes there is room for; they count as held from now on."""
        taken = min(wanted, self.left_bytes)
        self.left_bytes -= taken
        return taken

    def give(self, taken: int) -> None:
        """They are not held any more."""
        self.left_bytes += taken
