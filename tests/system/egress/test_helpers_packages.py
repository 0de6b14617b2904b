"""The rules of `allowed_python_packages` and `allowed_npm_packages` let real pip and npm install what they name, and
nothing else. The names of index and registry are in the rules; only where they lead to is the tests' own."""

from __future__ import annotations

from typing import Any

import pytest

from support.clients import helper_rules, install_inside
from support.registries import AnsweringUpstream, npm_registry, python_index
from support.upstreams import Authority

pytestmark = pytest.mark.system

PIP = "python3 -m pip install --quiet --disable-pip-version-check --no-cache-dir --target /tmp/site"
NPM = "cd /tmp && npm install --no-fund --loglevel=error"


def led(rules: list[dict[str, Any]], upstream: AnsweringUpstream) -> list[dict[str, Any]]:
    return [{**rule, "override": {"host": upstream.address}} for rule in rules]


async def paths(sandbox: Any, access: str) -> list[str]:
    return [event["path"] for event in await sandbox.events("egress.request") if event["access"] == access]


async def test_pip_installs_the_named_package_and_no_other(sandboxes: Any, authority: Authority) -> None:
    rules = helper_rules('allowed_python_packages("tinypkg")')
    index_host, files_host = (rule["host"] for rule in rules)
    packages = {"tinypkg": "print('tiny')", "otherpkg": "print('other')"}
    with python_index(files_host, packages, authority.context(index_host, files_host)) as index:
        mounts = [{"backend": "local", "mount": "/tools", "origin": str(install_inside())}]
        environment = {"PYTHONPATH": "/tools:/tmp/site", "PYTHONDONTWRITEBYTECODE": "1"}
        sandbox = await sandboxes(egress=led(rules, index), fs=mounts, env=environment)
        output = await sandbox.run(f"{PIP} tinypkg && python3 -c 'import tinypkg'")
        assert (output.exit_code, output.stdout) == (0, "tiny\n"), output
        assert await paths(sandbox, "allowed") == ["/simple/tinypkg/", "/packages/tinypkg-1.0-py3-none-any.whl"]
        other = await sandbox.run(f"{PIP} --retries 0 otherpkg")
        assert other.exit_code != 0, other
        assert set(await paths(sandbox, "denied")) == {"/simple/otherpkg/"}
        assert not [seen.path for seen in index.seen if "otherpkg" in seen.path]


@pytest.mark.parametrize("package", ["tiny-package", "@scope/tiny"])
async def test_npm_installs_the_named_package_and_no_other(sandboxes: Any, authority: Authority, package: str) -> None:
    rules = helper_rules(f"allowed_npm_packages({package!r})")
    host = rules[0]["host"]
    packages = {package: "console.log('tiny')", "other": "", "@scope/other": ""}
    with npm_registry(host, packages, authority.context(host)) as registry:
        sandbox = await sandboxes(egress=led(rules, registry))
        output = await sandbox.run(f"{NPM} {package} && node -e 'require(\"{package}\")'")
        assert (output.exit_code, output.stdout.splitlines()[-1]) == (0, "tiny"), output
        allowed = await paths(sandbox, "allowed")
        assert allowed[0] in (f"/{package}", f"/{package.replace('/', '%2f')}")
        assert allowed[1:] == [f"/{package}/-/{package.rpartition('/')[2]}-1.0.0.tgz"]
        for name in ("other", "@scope/other"):
            other = await sandbox.run(f"{NPM} {name}")
            assert other.exit_code != 0, other
            assert "403" in other.stderr
        direct = await sandbox.run(f"curl -sS -w '%{{http_code}}' https://{host}/other/-/other-1.0.0.tgz")
        assert direct.stdout == "403"
        assert not [seen.path for seen in registry.seen if "other" in seen.path]
