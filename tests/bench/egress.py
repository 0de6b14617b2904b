"""What the egress proxy costs: a client in a sandbox reaches an upstream through it, and directly a second one of the
same kind, which listens in the sandbox's own network namespace."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import trustme

from bench import mitmdump
from bench.caller import Caller
from bench.measures import pid_of, wrk_figures
from bench.report import Row, p50, p99
from hiverd.egress.rules import Policy
from hiverd.wire.model import EgressRule
from support.server import REPOSITORY, Server, free_port
from support.waiting import until

REQUESTS: Final = 2000
CONNECTIONS: Final = 100
DOWNLOAD_BYTES: Final = 1 << 30
DOWNLOAD_ROUNDS: Final = 3
RULES: Final = 1000
MB: Final = 1e6
_CLIENT: Final = REPOSITORY / "tests" / "bench" / "egress_client.py"
_UPSTREAM: Final = REPOSITORY / "tests" / "bench" / "egress_upstream.py"
_INSIDE: Final = "/tmp/egress_client.py"
_INSIDE_AUTHORITY: Final = "/tmp/authority.pem"
_MARK: Final = "86399"
"""Seconds that a process sleeps by which the sandbox's namespace is found."""
_NAME: Final = "api.test"


class Bench:
    """An upstream, a server that trusts it, and a sandbox that may reach it."""

    def __init__(self, plain_port: int, tls_port: int, authority: Path, caller: Caller, sandbox: str) -> None:
        self.tls_port = tls_port
        self._ports = {False: plain_port, True: tls_port}
        self._authority = authority
        self._caller = caller
        self._sandbox = sandbox

    def direct(self, what: str, name: str, count: int, *, tls: bool) -> list[float]:
        """Seconds of the client, past the proxy."""
        trusting = f"tls={_INSIDE_AUTHORITY}"
        return self._client(what, "127.0.0.1", str(self._ports[tls]), name, str(count), *([trusting] if tls else []))

    def through(self, what: str, name: str, count: int, *, tls: bool) -> list[float]:
        """Seconds of the client, through the proxy."""
        return self._client(what, "-", "443" if tls else "80", name, str(count), *(["tls"] if tls else []))

    def _client(self, *arguments: str) -> list[float]:
        return _numbers(self._caller.exec(self._sandbox, ["python3", _INSIDE, *arguments])["stdout"])

    def wrk(self) -> tuple[float, float]:
        """Intercepted requests per second, and their p50 in ms."""
        command = f"wrk -t1 -c16 -d5s --latency https://{_NAME}/"
        return wrk_figures(self._caller.exec(self._sandbox, command)["stdout"])

    def splice(self) -> None:
        """Turns interception off; the sandbox then has to trust the upstream itself."""
        self._caller.call("PUT", f"{self._sandbox}/config", {**_config(self._ports), "mitm": False})
        bundle = "/etc/ssl/certs/ca-certificates.crt"
        self._caller.exec(self._sandbox, f"cat >> {bundle} <<'END'\n{self._authority.read_text()}\nEND")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in json.loads(text)]


def _config(ports: dict[bool, int]) -> dict[str, object]:
    names = ("*.test",)
    rules = [
        {"access": "allow", "host": name, "ports": [port], "override": {"host": f"127.0.0.1:{ports[tls]}"}}
        for name in names
        for tls, port in ((False, 80), (True, 443))
    ]
    return {"ttl": 0, "cpu": 2, "egress": rules}


@contextlib.contextmanager
def _bench(folder: Path) -> Iterator[Bench]:
    folder.mkdir()
    authority, certificate = folder / "ca.pem", folder / "upstream.pem"
    ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
    ca.cert_pem.write_to_path(str(authority))
    ca.issue_cert(_NAME, "*.many.test").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    ports = {False: free_port(), True: free_port()}
    argv = [sys.executable, str(_UPSTREAM), str(ports[False]), str(ports[True]), str(certificate)]
    config = f'[egress]\nupstream_ca_files = ["{authority}"]\n'
    with _running(argv), Server(folder / "server", config=config) as server, Caller(server) as caller:
        key = "egress"
        _, made = caller.call("POST", f"/v1/sandboxes/{key}", _config(ports))
        sandbox = f"/sandbox/{made['id']}/v1/{key}"
        for path, source in ((_INSIDE, _CLIENT), (_INSIDE_AUTHORITY, authority)):
            caller.exec(sandbox, f"cat > {path} <<'END'\n{source.read_text()}\nEND")
        caller.exec(sandbox, f"setsid sleep {_MARK} >/dev/null 2>&1 </dev/null &")
        pid = until(lambda: pid_of(_MARK), seconds=20, what="a process in the sandbox")
        with _running(["nsenter", "--target", str(pid), "--net", *argv]):
            yield Bench(ports[False], ports[True], authority, caller, sandbox)


@contextlib.contextmanager
def _running(argv: list[str]) -> Iterator[None]:
    """An upstream that listens."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as upstream:
        try:
            assert upstream.stdout is not None
            assert upstream.stdout.readline() == b"listening\n"
            yield
        finally:
            upstream.kill()


def measure(folder: Path) -> list[Row]:
    """All rows, from one upstream and one sandbox."""
    rows = _policy()
    with _bench(folder / "egress") as bench:
        rows += _keep_alive(bench) + _rate(bench, folder) + _connections(bench)
        direct = _speed(bench.direct("download", _NAME, DOWNLOAD_BYTES, tls=True) for _ in range(DOWNLOAD_ROUNDS))
        inner = _speed(bench.through("download", _NAME, DOWNLOAD_BYTES, tls=True) for _ in range(DOWNLOAD_ROUNDS))
        bench.splice()
        spliced = _speed(bench.through("download", _NAME, DOWNLOAD_BYTES, tls=True) for _ in range(DOWNLOAD_ROUNDS))
    against = "direct TLS"
    return [
        *rows,
        Row("1 GiB download, intercepted", against, "MB/s", inner, direct, ">= 0.33x", inner >= direct / 3),
        Row("1 GiB download, spliced", against, "MB/s", spliced, direct, ">= 0.8x", spliced >= 0.8 * direct),
    ]


def _speed(rounds: Iterator[list[float]]) -> float:
    return DOWNLOAD_BYTES / MB / p50([seconds for (seconds,) in rounds])


def _keep_alive(bench: Bench) -> list[Row]:
    rows = []
    for tls, what, reach in ((False, "plain", 0.5), (True, "intercepted TLS", 1.0)):
        direct = bench.direct("keep-alive", _NAME, REQUESTS, tls=tls)
        through = bench.through("keep-alive", _NAME, REQUESTS, tls=tls)
        added, worst = 1e3 * (p50(through) - p50(direct)), 1e3 * p99(through)
        rows += [
            Row(f"keep-alive request, {what}, added p50", "direct", "ms", added, 1e3 * p50(direct), f"<= {reach} ms",
                added <= reach),
            Row(f"keep-alive request, {what}, p99", "direct", "ms", worst, 1e3 * p99(direct), "<= 10 ms", worst <= 10),
        ]  # fmt: skip
    return rows


def _rate(bench: Bench, folder: Path) -> list[Row]:
    ours, _ = bench.wrk()
    with mitmdump.running(bench.tls_port, folder) as port:
        argv = ["wrk", "-t1", "-c16", "-d5s", "--latency", f"https://127.0.0.1:{port}/"]
        theirs, _ = wrk_figures(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    what = "intercepted requests, 16 connections"
    return [Row(what, "mitmdump", "requests/s", ours, theirs, ">= 5x", ours >= 5 * theirs)]


def _connections(bench: Bench) -> list[Row]:
    rows = []
    fresh = ",".join(f"n{number}.many.test" for number in range(CONNECTIONS))
    direct = bench.direct("connect", _NAME, CONNECTIONS, tls=True)
    for what, names, reach in (("", _NAME, 6), (" to a host never seen", fresh, 12)):
        added = 1e3 * (p50(bench.through("connect", names, CONNECTIONS, tls=True)) - p50(direct))
        text = f"new intercepted TLS connection{what}, added p50"
        rows.append(Row(text, "direct", "ms", added, 1e3 * p50(direct), f"<= {reach} ms", added <= reach))
    return rows


def _policy() -> list[Row]:
    rules = [
        EgressRule(access="allow", host=f"h{number % 50}.test", methods=("GET",), paths=(f"/v1/p{number}/**", "/x/*"))
        for number in range(RULES - 1)
    ]
    policy = Policy([*rules, EgressRule(access="allow", host="*.test", paths=("/last/**",))])
    microseconds = []
    for number in range(20_000):
        host = f"h{number % 50}.test"
        began = time.perf_counter()
        policy.judge_request(host, 443, "GET", "/last/one")
        microseconds.append(1e6 * (time.perf_counter() - began))
    middle = p50(microseconds)
    return [Row(f"policy decision with {RULES:,} rules, p50", "-", "us", middle, None, "<= 50 us", middle <= 50)]
