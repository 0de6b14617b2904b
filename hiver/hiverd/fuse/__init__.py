"""Governed mounts: FUSE in a process of its own, with rules, events and, for remote ones, a backend (docs/files.md)."""
