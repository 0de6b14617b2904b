"""Forwarding of HTTP, SSE and WebSocket requests to ports inside a sandbox."""
