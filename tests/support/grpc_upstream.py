"""A gRPC server on this host's loopback, without generated code: messages are bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any, Self

import grpc

from support.upstreams import Authority

SERVICE = "test.Echo"


class GrpcUpstream:
    """`Unary` echoes; `Both` echoes each message as it comes; `Fail` ends with FAILED_PRECONDITION and a trailer of its
    own; `Count` streams as many messages as its request has bytes; `Wait` is silent until the client has left."""

    def __init__(self, authority: Authority, *names: str, **options: Any) -> None:
        """`options`: of the server, as in `grpc.max_connection_age_ms`."""
        self.left = threading.Event()
        """A client of `Wait` has left."""
        self.metadata: list[dict[str, str | bytes]] = []
        self.peers: set[str] = set()
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0), *options.items()])
        self._server.add_generic_rpc_handlers((self._handlers(),))
        key, chain = authority.pem(*names)
        credentials = grpc.ssl_server_credentials([(key, chain)])
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)

    @property
    def address(self) -> str:
        """For `override.host`."""
        return f"127.0.0.1:{self.port}"

    def _handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Unary": grpc.unary_unary_rpc_method_handler(self._unary),
                "Both": grpc.stream_stream_rpc_method_handler(self._both),
                "Fail": grpc.unary_unary_rpc_method_handler(self._fail),
                "Count": grpc.unary_stream_rpc_method_handler(self._count),
                "Wait": grpc.unary_unary_rpc_method_handler(self._wait),
            },
        )

    def _note(self, context: grpc.ServicerContext) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.add(context.peer())

    def _unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note(context)
        context.set_trailing_metadata((("x-trailer", "here"),))
        return request

    def _both(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._note(context)
        yield from requests

    def _fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note(context)
        context.set_trailing_metadata((("x-why", "just so"),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")
        raise AssertionError

    def _count(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self._note(context)
        for number in range(len(request)):
            yield b"%d" % number

    def _wait(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note(context)
        context.add_callback(self.left.set)
        self.left.wait(30)
        return request

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()
        self._server.stop(None).wait()
