"""Control groups that Docker makes and names; ours is only to know them."""

from __future__ import annotations

from hiver_backends.linux.cgroups import Cgroups, groups_of


class ContainerCgroups(Cgroups):
    """Sandboxes' groups by what process 1 is in. Registered ones only."""

    def __init__(self, instance: str) -> None:
        super().__init__(instance)
        self._paths: dict[str, str] = {}

    def register(self, sandbox_id: str, pid: int) -> None:
        """Looks up the groups of a container's process 1, which is alive. Raises `ProcessLookupError`."""
        paths = [path for path in groups_of(pid) if path != "/"]
        if not paths:
            raise ProcessLookupError(pid)
        # Docker names them alike in every hierarchy.
        self._paths[sandbox_id] = max(paths, key=len)

    def forget(self, sandbox_id: str) -> None:
        """Once the sandbox is gone."""
        self._paths.pop(sandbox_id, None)

    def path(self, sandbox_id: str) -> str:
        return self._paths.get(sandbox_id) or super().path(sandbox_id)

    def contains_any(self, pid: int) -> bool:
        known = set(self._paths.values())
        return any(path.removesuffix(" (deleted)") in known for path in groups_of(pid))
