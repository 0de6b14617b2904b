"""Isolation plug-in `docker`: sandboxes as containers of a Docker Engine on this host."""

from .plugin import DockerIsolation

__all__ = ["DockerIsolation"]
