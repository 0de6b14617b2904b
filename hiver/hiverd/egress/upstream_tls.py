"""TLS toward upstreams: who is trusted, and why a handshake failed."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from hiverd.contracts.errors import UnavailableError

_CAUSES: Final = {
    10: "its certificate has expired",
    9: "its certificate is not valid yet",
    18: "its certificate is self-signed",
    19: "its certificate's issuer is not trusted",
    20: "its certificate's issuer is not trusted",
    21: "its certificate's issuer is not trusted",
    62: "its certificate is for another host",
    64: "its certificate is for another address",
}
"""By X509_V_ERR_* (openssl-verification-options(1))."""


def client_context(ca_files: Iterable[Path], protocols: list[str]) -> ssl.SSLContext:
    """Trusts this host's store and the files. Raises `UnavailableError` naming a file that cannot be used."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in ca_files:
        try:
            context.load_verify_locations(path)
        except (OSError, ssl.SSLError) as error:
            raise UnavailableError(f"egress.upstream_ca_files: {path} holds no certificates: {error}") from error
    context.set_alpn_protocols(protocols)
    return context


def tls_cause(error: ssl.SSLError) -> str:
    """Why a handshake failed, as a short phrase about the upstream."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _CAUSES.get(error.verify_code, "its certificate is not trusted")
    if error.reason == "TLSV1_ALERT_NO_APPLICATION_PROTOCOL":  # RFC 7301 3.2
        return "it does not speak the version of HTTP that is needed"
    return "it does not speak TLS as we do"
