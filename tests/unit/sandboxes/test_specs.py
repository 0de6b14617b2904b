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
