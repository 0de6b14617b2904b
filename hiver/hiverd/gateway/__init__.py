"""Forwarding of requests into sandboxes (PROTOCOL 3.13)."""

from hiverd.gateway.asgi import GatewayTarget
from hiverd.gateway.gateway import Gateway

__all__ = ["Gateway", "GatewayTarget"]
