"""What a configuration, an image and an image's short name make together."""

from __future__ import annotations

from typing import Any

from hiverd.contracts.isolation import WorkloadSpec
from hiverd.sandboxes.specs import SpecBuilder
from hiverd.settings.model import ImageAlias
from hiverd.wire.config import SandboxConfig

ALIAS = ImageAlias(image="host", entrypoint=("sleep", "9"), cwd="/alias", tty=True, env={"A": "alias", "B": "alias"})


async def spec_of(open_core: Any, config: SandboxConfig) -> WorkloadSpec:
    async with open_core() as core:
        builder = core.manager._specs
        builder._image_defaults = {"python": ALIAS}
        assert isinstance(builder, SpecBuilder)
        sandbox, _ = await core.obtain("k", lambda: config)
        assert sandbox.spec is not None
        return sandbox.spec


async def test_an_alias_gives_what_the_configuration_leaves_out(open_core):
    spec = await spec_of(open_core, SandboxConfig(image="python", env={"B": "own"}))
    assert (spec.argv, spec.cwd, spec.tty, spec.env["A"], spec.env["B"]) == (
        ("sleep", "9"),
        "/alias",
        True,
        "alias",
        "own",
    )


async def test_the_configuration_has_the_last_word(open_core):
    spec = await spec_of(open_core, SandboxConfig(image="python", entrypoint="a b", cwd="/own", tty=False))
    assert (spec.argv, spec.cwd, spec.tty) == (("a", "b"), "/own", False)


async def test_other_names_get_nothing(open_core):
    spec = await spec_of(open_core, SandboxConfig(image="host"))
    assert (spec.argv, spec.tty, "A" in spec.env) == ((), False, False)


async def test_a_sandbox_is_told_where_the_gateway_is_and_whom_to_trust(open_core):
    spec = await spec_of(open_core, SandboxConfig(image="host"))
    assert spec.env["HIVER_GATEWAY_URL"] == "http://gateway:10000"
    assert spec.env["SSL_CERT_FILE"] == spec.env["PIP_CERT"] == "/etc/ssl/certs/ca-certificates.crt"


async def test_own_values_win_except_for_what_node_trusts(open_core):
    own = {"HIVER_GATEWAY_URL": "http://elsewhere", "SSL_CERT_FILE": "/own.pem", "NODE_EXTRA_CA_CERTS": "/own.pem"}
    spec = await spec_of(open_core, SandboxConfig(image="host", env=own))
    assert (spec.env["HIVER_GATEWAY_URL"], spec.env["SSL_CERT_FILE"]) == ("http://elsewhere", "/own.pem")
    assert spec.env["NODE_EXTRA_CA_CERTS"] == "/etc/ssl/certs/sandbox-ca.crt"
