"""Archives of a sandbox's files: capture, and restore inside a sandbox's namespaces (docs/snapshots.md)."""
