"""Remote mounts: a folder on this host's disk that stands for a backend, kept like it both ways (docs/files.md)."""
