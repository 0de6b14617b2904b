"""The Lua of a script: what it has, what it has not, and that nothing leads out of it."""

from __future__ import annotations

import base64
import os
from urllib.parse import quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiverd.egress.script_frames import MAX_BODY_BYTES, MAX_HEADERS, Answer, Call
from hiverd.egress.script_vm import Machine

HEADERS = [(b"Content-Type", b"text/plain"), (b"X-Bytes", b"\xff\x80")]


def run(script: str, body: bytes = b"body", headers: list[tuple[bytes, bytes]] | None = None) -> Answer:
    given = HEADERS if headers is None else headers
    return Machine().run(Call(script.encode(), body, given, b"POST", b"h.test", b"/a%20b", b"q=1&r"))


def evaluated(expression: str, body: bytes = b"body") -> bytes:
    """As text."""
    answer = run(f"body = tostring({expression})", body)
    assert answer.failure is None, answer
    assert answer.body is not None
    return answer.body


def test_the_globals_of_a_request() -> None:
    assert evaluated('table.concat({method, host, path, query, body}, " ")') == b"POST h.test /a%20b q=1&r body"
    assert evaluated('headers["Content-Type"] .. #headers["X-Bytes"]') == b"text/plain2"
    assert evaluated('headers["content-type"]') == b"nil"


def test_what_is_left_alone_comes_back() -> None:
    answer = run("local x = 1")
    assert answer.body == b"body"
    assert sorted(answer.headers) == sorted(HEADERS)


def test_body_and_headers_are_taken_over() -> None:
    answer = run('body = body .. "!" headers["Content-Type"] = nil headers["X-New"] = "1"')
    assert answer.body == b"body!"
    assert sorted(answer.headers) == [(b"X-Bytes", b"\xff\x80"), (b"X-New", b"1")]


@pytest.mark.parametrize("script", ["body = nil", "body = {}", "body = 7", "body = print"])
def test_a_body_that_is_no_text_is_none(script: str) -> None:
    assert run(script).body is None


@pytest.mark.parametrize(
    ("value", "text"), [("#body", b"4"), ("10 / 2", b"5"), ("0.5", b"0.5"), ("2^53", b"9.007199254741e+15")]
)
def test_numbers_in_headers_are_written_as_lua_5_1_does(value: str, text: bytes) -> None:
    assert (b"N", text) in run(f'headers["N"] = {value}').headers


@pytest.mark.parametrize(
    "script",
    [
        "headers = nil",
        'headers = "x"',
        'headers["X"] = {}',
        'headers["X"] = true',
        'headers[1] = "x"',
        f'for i = 1, {MAX_HEADERS + 1} do headers["X" .. i] = "x" end',
        'headers["X"] = ("x"):rep(65536)',
    ],
)
def test_headers_that_are_none_fail(script: str) -> None:
    assert run(script).failure == "headers"


def test_bodies_are_bounded() -> None:
    size = MAX_BODY_BYTES
    assert run(f'body = ("x"):rep({size})').failure is None
    assert run(f'body = ("x"):rep({size} + 1)').failure == "body"


@given(st.binary(max_size=200))
def test_bytes_pass_as_they_are(data: bytes) -> None:
    assert run('body = ("%s"):format(body:reverse():reverse())', data.replace(b"\0", b"")).body == data.replace(
        b"\0", b""
    )
    answer = run("body = b64decode(b64encode(body)) headers.X = urldecode(urlencode(body))", data)
    assert answer.body == data
    assert (b"X", data) in answer.headers


@given(st.binary(max_size=100))
def test_helpers_agree_with_the_standard_library(data: bytes) -> None:
    assert evaluated("b64encode(body)", data) == base64.b64encode(data)
    assert evaluated("urlencode(body)", data) == quote_plus(data).encode()


@pytest.mark.parametrize(
    ("text", "decoded"),
    [(b"a+b%20c", b"a b c"), (b"%e4%F6", b"\xe4\xf6"), (b"100%", b"100%"), (b"a+%zz", b"a+%zz"), (b"", b"")],
)
def test_urldecode(text: bytes, decoded: bytes) -> None:
    assert evaluated("urldecode(body)", text) == decoded


@pytest.mark.parametrize(
    ("text", "decoded"),
    [(b"aGk=", b"hi"), (b"aG\r\nk=", b"hi"), (b"aGk", b"aGk"), (b"aGk=x", b"aGk=x"), (b"!!!!", b"!!!!"), (b"", b"")],
)
def test_b64decode(text: bytes, decoded: bytes) -> None:
    assert evaluated("b64decode(body)", text) == decoded


@pytest.mark.parametrize("helper", ["urldecode", "urlencode", "b64decode", "b64encode"])
def test_helpers_want_texts(helper: str) -> None:
    assert run(f"{helper}({{}})") == Answer(failure="error", line=1, hint="bad argument #1")
    assert run(f"{helper}()").failure == "error"
    assert evaluated(f"type({helper}(12))") == b"string"


def test_what_scripts_for_lua_5_1_use() -> None:
    assert evaluated("select('#', unpack({1, 2, 3}))") == b"3"
    assert evaluated("table.getn({1, 2})") == b"2"
    assert evaluated("math.pow(2, 3) == 8 and math.mod(7, 4) == 3") == b"true"
    assert evaluated('string.gfind("ab", ".")()') == b"a"
    assert run('print("no output anywhere")').failure is None


@pytest.mark.parametrize(
    "name",
    [
        *("dofile", "loadfile", "load", "loadstring", "collectgarbage", "require", "package", "io", "os", "debug"),
        *("module", "coroutine", "python", "utf8", "warn", "getfenv", "setfenv", "newproxy", "string.dump"),
    ],
)
def test_what_a_script_has_not(name: str) -> None:
    assert evaluated(f"type({name})") == b"nil"
    assert evaluated(f"type(_G.{name})") == b"nil"
    assert run(f"{name}()").failure == "error"


def test_globals_are_a_table_of_its_own() -> None:
    names = run('local n = {} for name in pairs(_G) do n[#n + 1] = name end table.sort(n) body = table.concat(n, " ")')
    assert names.body is not None
    assert names.body.decode().split() == [
        *("_G", "_VERSION", "assert", "b64decode", "b64encode", "body", "error", "getmetatable", "headers", "host"),
        *("ipairs", "math", "method", "next", "pairs", "path", "pcall", "print", "query", "rawequal", "rawget"),
        *("rawlen", "rawset", "select", "setmetatable", "string", "table", "tonumber", "tostring", "type", "unpack"),
        *("urldecode", "urlencode", "xpcall"),
    ]


def test_the_metatable_of_strings_is_closed() -> None:
    assert evaluated('getmetatable("")') == b"false"
    assert run('getmetatable("").__index = function() end').failure == "error"
    assert run('setmetatable("", {})').failure == "error"
    assert evaluated('("x").dump') == b"nil"


def test_bytecode_is_no_script() -> None:
    assert run("\x1bLua").failure == "syntax"


@pytest.mark.parametrize(
    "attempt",
    [
        "b64encode.__globals__",
        "b64encode.__class__",
        "b64encode['func_globals']",
        "getmetatable(b64encode).__index",
        "b64encode[1]",
        "#b64encode",
        "b64encode < b64encode",
    ],
)
def test_helpers_are_nothing_but_functions(attempt: str) -> None:
    assert evaluated("type(b64encode)") == b"function"
    assert run(f"local x = {attempt}").failure == "error"


def test_no_object_of_python_is_ever_seen() -> None:
    """Neither as a value, nor as the error of a helper."""
    walk = """
    local seen, found = {}, {}
    local function visit(value)
      if seen[value] then return end
      seen[value] = true
      found[type(value)] = true
      if type(value) == "table" then for k, v in next, value do visit(k) visit(v) end end
    end
    visit(_G)
    for _, helper in ipairs {urldecode, urlencode, b64decode, b64encode} do
      for _, argument in ipairs {{}, print, true} do
        visit(select(2, pcall(helper, argument)))
        visit(select(2, pcall(helper, argument, argument)))
      end
      visit(select(2, xpcall(helper, function(e) visit(e) return e end)))
    end
    body = tostring(found.userdata) .. tostring(found.thread)
    """
    assert run(walk).body == b"nilnil"


def test_a_script_cannot_replace_what_reads_its_results() -> None:
    answer = run("""
    for _, library in ipairs {string, table, math} do for name in pairs(library) do library[name] = nil end end
    for _, name in ipairs {"next", "type", "rawget", "pcall", "tostring"} do _G[name] = function() error("!") end end
    setmetatable(_G, {__index = function() error("!") end, __newindex = function() error("!") end})
    setmetatable(headers, {__index = error, __pairs = error, __len = error})
    body = "done"
    """)
    assert answer.failure is None
    assert answer.body == b"done"


def test_finalizers_are_refused() -> None:
    assert run("setmetatable({}, {__gc = function() end})").failure == "error"


def test_error_objects_are_not_looked_into() -> None:
    assert run("error(setmetatable({}, {__tostring = function() error('again') end}))") == Answer(failure="error")
    assert run("error()").failure == "error"
    assert run("error(nil)").failure == "error"


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("x =", Answer(failure="syntax", line=1)),
        (
            "\n\nlocal secret_name = nil .. 's3cret'",
            Answer(failure="error", line=3, hint="attempt to concatenate a nil value"),
        ),
        ("local token = {}\ntoken.s3cret.x = 1", Answer(failure="error", line=2, hint="attempt to index a nil value")),
        ("s3cret()", Answer(failure="error", line=1, hint="attempt to call a nil value")),
        ("error('s3cret')", Answer(failure="error", line=1)),
        ("error('s3cret', 0)", Answer(failure="error")),
        ("error('script:1: attempt to index a s3cret value')", Answer(failure="error", line=1)),
        ("string.rep()", Answer(failure="error", line=1, hint="bad argument #1")),
        ("local x = 1 < {}", Answer(failure="error", line=1, hint="attempt to compare number with table")),
        ("assert(false)", Answer(failure="error", line=1)),
        ("error('script:1: attempt to index a secret value')", Answer(failure="error", line=1)),
    ],
)
def test_failures_tell_line_and_kind_and_no_word_of_the_script(script: str, answer: Answer) -> None:
    assert run(script) == answer


@pytest.mark.parametrize(
    "script",
    [
        "body = ('x'):rep(1e9)",
        "local t = {} for i = 1, 1e9 do t[i] = i end",
        "local s = 'x' while true do s = s .. s end",
        "local t = {} while true do t = {t, t, t} end",
        "pcall(string.rep, 'x', 1e9) local s = ('x'):rep(6e7)",
    ],
)
def test_memory_is_bounded(script: str) -> None:
    assert run(script).failure == "memory"


def test_a_caught_shortage_of_memory_is_the_scripts_own_affair() -> None:
    assert evaluated("pcall(string.rep, 'x', 1e9)") == b"false"


def test_random_numbers_differ_from_fork_to_fork() -> None:
    """A fork inherits all that a seed is usually made of."""
    drawn = set()
    for _ in range(3):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, run("body = tostring(math.random(1, 2^53))").body or b"")
            os._exit(0)
        os.waitpid(pid, 0)
        drawn.add(os.read(reader, 100))
        os.close(reader)
        os.close(writer)
    assert len(drawn) == 3
