"""Isolation plug-in `oci`: any OCI runtime on the PATH (crun, runc, runsc), with conmon, and no daemon."""

from .plugin import OciIsolation

__all__ = ["OciIsolation"]
