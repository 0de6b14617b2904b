"""The HTTP API: Litestar controllers, error mapping, both route families."""
