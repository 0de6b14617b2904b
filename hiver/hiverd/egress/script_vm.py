"""The Lua in which an `override_script` runs (PROTOCOL 5.5): a fresh one for each call, without a way out of it.

A script sees a table of its own as its globals, with a choice of functions in it. No Python object is ever in its
reach: the helpers are Lua functions, and without `debug` nobody looks into what they refer to. What the script leaves
is read with raw accesses by functions that it cannot replace.
"""

from __future__ import annotations

import binascii
import os
import re
from base64 import b64encode
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from lupa import lua54

from hiverd.egress.script_frames import HINT, MAX_BODY_BYTES, MAX_HEADER_BYTES, MAX_HEADERS, MEMORY_BYTES, Answer, Call

_MEMORY_ERROR: Final = b"not enough memory"
_MESSAGE: Final = re.compile(rb"script:([0-9]{1,9}): (.*)", re.DOTALL)
_HINT: Final = re.compile(HINT.encode())

_SETUP: Final = (
    rb"""
local MAX_HEADERS, MAX_HEADER_BYTES, MAX_BODY_BYTES = """
    + f"{MAX_HEADERS}, {MAX_HEADER_BYTES}, {MAX_BODY_BYTES}".encode()
    + rb"""
local seed_high, seed_low, converters = ...
local error, ipairs, load, next, pcall = error, ipairs, load, next, pcall
local rawget, setmetatable, tostring, type = rawget, setmetatable, tostring, type
local format, math_type = string.format, math.type

math.randomseed(seed_high, seed_low)
string.dump = nil
getmetatable("").__metatable = false

local env = {_VERSION = _VERSION, string = string, table = table, math = math}
env._G = env
for _, name in ipairs {
  "assert", "error", "getmetatable", "ipairs", "next", "pairs", "pcall", "rawequal", "rawget", "rawlen", "rawset",
  "select", "tonumber", "tostring", "type", "xpcall",
} do
  env[name] = _G[name]
end

-- Nothing of a script runs behind our back, as a finalizer would.
function env.setmetatable(subject, metatable)
  if type(metatable) == "table" and rawget(metatable, "__gc") ~= nil then
    error("__gc is not available", 2)
  end
  return setmetatable(subject, metatable)
end

function env.print() end

-- Names that scripts written for Lua 5.1 use.
env.unpack = table.unpack
table.getn = function(list) return #list end
math.pow = function(base, exponent) return base ^ exponent end
math.mod = math.fmod
string.gfind = string.gmatch

local function add_helper(name, convert)
  env[name] = function(value)
    if type(value) == "number" then value = tostring(value) end
    if type(value) ~= "string" then error("bad argument #1", 2) end
    local result = convert(value)
    if result == nil then error("not enough memory", 0) end
    return result
  end
end
add_helper("urldecode", converters.urldecode)
add_helper("urlencode", converters.urlencode)
add_helper("b64decode", converters.b64decode)
add_helper("b64encode", converters.b64encode)

local function text_of(value)
  if type(value) ~= "number" then return value end
  return math_type(value) == "integer" and tostring(value) or format("%.14g", value)
end

local function left_headers()
  local headers = rawget(env, "headers")
  if type(headers) ~= "table" then return nil end
  local flat, count, size = {}, 0, 0
  for name, value in next, headers do
    value = text_of(value)
    if type(name) ~= "string" or type(value) ~= "string" then return nil end
    count, size = count + 1, size + #name + #value
    if count > MAX_HEADERS or size > MAX_HEADER_BYTES then return nil end
    flat[2 * count - 1], flat[2 * count] = name, value
  end
  return flat, 2 * count
end

local function left()
  local body = rawget(env, "body")
  if type(body) ~= "string" then body = nil end
  if body and #body > MAX_BODY_BYTES then return "body" end
  local flat, count = left_headers()
  if not flat then return "headers" end
  return "done", body, flat, count
end

local function run(source, globals)
  for name, value in next, globals do env[name] = value end
  local chunk, problem = load(source, "=script", "t", env)
  if not chunk then return "syntax", problem end
  local done
  done, problem = pcall(chunk)
  if not done then return "error", type(problem) == "string" and problem or "" end
  return left()
end

return function(source, globals)
  local done, kind, first, second, third = pcall(run, source, globals)
  if done then return kind, first, second, third end
  return "error", type(kind) == "string" and kind or ""
end
"""
)


class Machine:
    """Use once: made before its call is known, as that takes a moment."""

    def __init__(self) -> None:
        runtime = lua54.LuaRuntime(encoding=None, register_eval=False, register_builtins=False, max_memory=MEMORY_BYTES)
        seed = os.urandom(16)
        self._runtime = runtime
        self._run: Callable[..., tuple[Any, ...]] = runtime.execute(
            _SETUP, _lua_integer(seed[:8]), _lua_integer(seed[8:]), runtime.table_from(_CONVERTERS)
        )

    def run(self, call: Call) -> Answer:
        """Never raises for what a script does; may raise `MemoryError`."""
        try:
            variables = {
                b"body": call.body,
                b"headers": self._runtime.table_from(dict(call.headers)),
                b"method": call.method,
                b"host": call.host,
                b"path": call.path,
                b"query": call.query,
            }
            kind, *rest = self._run(call.script, self._runtime.table_from(variables))
        except (lua54.LuaMemoryError, MemoryError):
            return Answer(failure="memory")
        if kind == b"done":
            body, flat, count = rest
            return Answer(body=body, headers=[(flat[i], flat[i + 1]) for i in range(1, count, 2)])
        if kind == b"headers":
            return Answer(failure="headers")
        if kind == b"body":
            return Answer(failure="body")
        return _failed(kind, rest[0])


def _failed(kind: bytes, message: bytes) -> Answer:
    """Line and kind of an error, without its text."""
    if message.endswith(_MEMORY_ERROR):
        return Answer(failure="memory")
    parts = _MESSAGE.match(message)
    line = 0 if parts is None else int(parts[1])
    if kind == b"syntax":
        return Answer(failure="syntax", line=line)
    hint = _HINT.match(message if parts is None else parts[2])
    return Answer(failure="error", line=line, hint="" if hint is None else hint[0].decode())


def _lua_integer(data: bytes) -> int:
    return int.from_bytes(data, signed=True)


def _url_decode(text: bytes) -> bytes:
    """Query style. A `%` that begins no escape makes it no such text (as Go's `url.QueryUnescape` has it)."""
    if _BAD_ESCAPE.search(text):
        return text
    return unquote_to_bytes(text.replace(b"+", b" "))


def _url_encode(data: bytes) -> bytes:
    return quote_from_bytes(data, safe=" ").replace(" ", "+").encode()


def _b64_decode(text: bytes) -> bytes:
    """The standard alphabet with its padding; line breaks do not count (as Go's `base64.StdEncoding` has it)."""
    try:
        return binascii.a2b_base64(text.translate(None, b"\r\n"), strict_mode=True)
    except binascii.Error:
        return text


_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def _guarded(convert: Callable[[bytes], bytes]) -> Callable[[bytes], bytes | None]:
    """None instead of an exception, which would be an object of Python's in the hands of the script."""

    def guarded(value: bytes) -> bytes | None:
        try:
            return convert(value)
        except BaseException:  # noqa: BLE001 -- see above
            return None

    return guarded


_CONVERTERS: Final = {
    b"urldecode": _guarded(_url_decode),
    b"urlencode": _guarded(_url_encode),
    b"b64decode": _guarded(_b64_decode),
    b"b64encode": _guarded(b64encode),
}
