"""No spelling of a path is a way round a rule: whatever one of the servers below would serve is judged as that."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Callable
from urllib.parse import unquote, urljoin

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hiverd.egress.rules import Policy
from hiverd.egress.targets import path_readings
from hiverd.globs import matches_glob, matches_segments
from hiverd.wire.model import EgressRule

DENY = EgressRule(access="deny", host="api.test", paths=("/admin/**",))
ALLOW = EgressRule(access="allow", host="api.test")
ONLY = EgressRule(access="allow", host="api.test", paths=("/public/**",))

PIECES = (
    *("/", "//", "\\", "%2f", "%2F", "%5c", "%252f", "%255c", ".", "..", "%2e", "%2E%2e", "%252e", "%25252e"),
    *(";", ";x", ";x=y", "%3b", "%253b", "admin", "public", "%61dmin", "adm%69n", "%2561dmin", "ok", "x"),
    *("%", "%zz", "%00", "%c0%af", "%c0%ae", "%ef%bc%8f", "%ef%bc%8e", "~", "+", ":", "@", ",", "*", "?"[:0]),
)
paths = st.lists(st.sampled_from(PIECES), max_size=10).map(lambda pieces: "/" + "".join(pieces))


def decoded(path: str) -> str:
    return unquote(path, errors="surrogateescape")


def normal(path: str) -> str:
    """As POSIX path functions do."""
    return posixpath.normpath("/" + path.lstrip("/")).replace("//", "/")


def nginx(path: str) -> str:
    return normal(decoded(path))


def tomcat(path: str) -> str:
    """Drops parameters from the raw path, then decodes, then resolves; `\\` counts as `/` where that is allowed."""
    return normal(decoded(re.sub(r";[^/]*", "", path)).replace("\\", "/"))


def jetty(path: str) -> str:
    """Decodes, then drops parameters segment by segment."""
    return normal("/".join(segment.partition(";")[0] for segment in decoded(path).split("/")))


def windows(path: str) -> str:
    return normal(decoded(path).replace("\\", "/"))


def twice(path: str) -> str:
    """A proxy that decodes, in front of a server that does."""
    return normal(decoded(nginx(path)))


def proxied_tomcat(path: str) -> str:
    return tomcat(decoded(path))


def url_library(path: str) -> str:
    """Resolves as RFC 3986 before it decodes."""
    return decoded(urljoin("http://api.test/", path).removeprefix("http://api.test"))


def c_strings(path: str) -> str:
    return normal(decoded(path).partition("\0")[0])


SERVERS: tuple[Callable[[str], str], ...] = (
    *(nginx, tomcat, jetty, windows, twice, proxied_tomcat, url_library, c_strings),
)


def below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


@given(paths)
@example("/admin;%2f..%2fok")
@example("/ok/..%253b/admin")
@example("/admin%00")
@example("/ok/..%5cadmin")
@example("/%2561dmin/\\..")
def test_no_server_serves_a_denied_folder_for_a_path_that_is_allowed(path: str) -> None:
    verdict = Policy([DENY, ALLOW]).judge_request("api.test", 80, "GET", path)
    read_as_denied = [server.__name__ for server in SERVERS if below(server(path), "/admin")]
    assert not (verdict.allowed and read_as_denied), (path, read_as_denied, path_readings(path))


@given(paths)
def test_no_server_leaves_an_allowed_folder_for_a_path_that_is_allowed(path: str) -> None:
    if Policy([ONLY]).judge_request("api.test", 80, "GET", path).allowed:
        assert {server.__name__: server(path) for server in SERVERS if not below(server(path), "/public")} == {}


@given(st.text(st.characters(codec="latin-1"), max_size=60).map(lambda text: "/" + text))
def test_the_first_reading_is_the_decoded_path_and_none_raises(path: str) -> None:
    readings = path_readings(path)
    assert readings[0] == (path if "%" not in path else readings[0])
    assert len(readings) == len(set(readings)) <= 49
    assert all(reading.startswith("/") for reading in readings)


@pytest.mark.parametrize(
    "path", ["/" + "../" * 5_000, "/" + "%2e" * 5_000, "/" + ";" * 16_000, "/" + "/" * 16_000, "/" + "%25" * 5_000]
)
def test_reading_takes_linear_time(path: str) -> None:
    began = time.process_time()
    Policy([DENY, ALLOW]).judge_request("api.test", 80, "GET", path)
    assert time.process_time() - began < 0.5


globs = st.text("ab*.", max_size=8)


@given(globs, st.text("ab.", max_size=10))
def test_globs_are_those_of_a_regular_expression(pattern: str, text: str) -> None:
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None
    assert matches_glob(pattern, text) == expected


def matches_slowly(pattern: list[str], segments: list[str]) -> bool:
    if not pattern:
        return not segments
    if pattern[0] == "**":
        return any(matches_slowly(pattern[1:], segments[start:]) for start in range(len(segments) + 1))
    return bool(segments) and matches_glob(pattern[0], segments[0]) and matches_slowly(pattern[1:], segments[1:])


@given(
    st.lists(st.sampled_from(["**", "*", "a", "b", "a*"]), max_size=6),
    st.lists(st.sampled_from(["a", "b", "ab", ""]), max_size=7),
)
def test_segments_are_matched_as_by_trying_everything(pattern: list[str], segments: list[str]) -> None:
    assert matches_segments(pattern, segments) == matches_slowly(pattern, segments)
