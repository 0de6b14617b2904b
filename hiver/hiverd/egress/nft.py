"""Loading packet filter rules through libnftables: in this process, in one transaction, in the calling thread's
network namespace.

The C library is what `nft` itself is a thin program around; a process for each sandbox would cost ten times as much.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import threading

from hiverd.contracts.errors import UnavailableError

_lock = threading.Lock()
"""libnftables keeps some of its parser's state in globals."""


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnftables.so.1")
    except OSError as error:
        raise UnavailableError(
            "libnftables is missing, and no sandbox runs without its packet filter; install the package libnftables1"
            " (Debian, Ubuntu), nftables-libs or libnftables (others)"
        ) from error
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library


def load(rules: str) -> None:
    """Runs the commands, all or none. Blocking. Raises `UnavailableError` with what the library or kernel said."""
    library = _library()
    with _lock:
        context = library.nft_ctx_new(0)
        try:
            library.nft_ctx_buffer_error(context)
            if library.nft_run_cmd_from_buffer(context, rules.encode("ascii")):
                said = (library.nft_ctx_get_error_buffer(context) or b"").decode("utf-8", "replace").strip()
                raise UnavailableError(f"the kernel does not take the sandbox's packet filter: {said}")
        finally:
            library.nft_ctx_free(context)
