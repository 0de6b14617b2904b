"""`make test-container`: builds the container image and uses the server in it, beside an Engine of its own.

A sandbox through the published client, a command, a denied request told as an event; then nothing is left. The base
image is made with mmdebstrap, for which no image registry is needed. It takes minutes, so `make test` leaves it out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.clients import ALL_VERSIONS, install  # noqa: E402 -- the folder is on the path only now
from support.docker import Engine  # noqa: E402
from support.leaks import wait_until_clean  # noqa: E402
from support.server import clean_environment, free_port  # noqa: E402
from support.waiting import until  # noqa: E402

BASE_TAR: Final = REPOSITORY / ".build" / "container-base.tar"
BASE: Final = "hiver-test/base:latest"
PACKAGES: Final = "ca-certificates,python3,python3-venv,runc,conmon,catatonit,iproute2,nftables,e2fsprogs"
TAKEN_ALONG: Final = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
"""Whom this host trusts, and where it installs from: a build behind a proxy needs the same."""
START_SECONDS: Final = 60.0

USE: Final = """
import asyncio
import hiver

GET = "import urllib.request as u; u.urlopen('http://example.com/', timeout=5)"


async def main():
    config = hiver.SandboxConfig(egress=[hiver.EgressRule(access="deny", host="*")])
    sandbox = await hiver.get_or_create_sandbox("try", config)
    await sandbox.write_file("/workspace/hello.py", "print('hello from', __file__)")
    result = await sandbox.exec("python3 /workspace/hello.py")
    assert result["stdout"] == "hello from /workspace/hello.py\\n", result
    result = await sandbox.exec(["python3", "-c", GET])
    assert "403" in result["stderr"], result
    async for event in sandbox.get_events_stream():
        if event.type == "egress.request":
            assert (event.host, event.access) == ("example.com", "denied"), event
            break
    await sandbox.shutdown()


asyncio.run(main())
"""
"""What a user would write; the file is seen under the path that it has, and the denial is on record."""

PRIVILEGES: Final = """
    --cap-add ALL --cap-drop SYS_RESOURCE --device-cgroup-rule 'c *:* rwm' --device-cgroup-rule 'b *:* rwm'
    --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined
"""
"""`--privileged` in words, without the one capability that some virtual machines do not have."""


def main() -> int:
    _make_base()
    engine = Engine(f"image-{os.getpid()}")
    engine.start()
    try:
        _try_out(engine)
    finally:
        engine.stop()
    wait_until_clean([engine.name])
    print("All of it works, and nothing is left.")
    return 0


def _make_base() -> None:
    """A Debian root with what the image installs; kept for the next time."""
    if BASE_TAR.exists():
        return
    if shutil.which("mmdebstrap") is None:
        raise SystemExit("mmdebstrap is not installed: apt-get install mmdebstrap")
    hooks = [f"--customize-hook=copy-in {path} {Path(path).parent}" for path in TAKEN_ALONG if Path(path).exists()]
    part = BASE_TAR.with_suffix(".part.tar")
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", *hooks, "bookworm", str(part)]
    subprocess.run(argv, check=True)
    part.rename(BASE_TAR)


def _try_out(engine: Engine) -> None:
    port = free_port()
    environment = clean_environment(
        {
            "DOCKER_HOST": engine.host,
            "DOCKER_BUILDKIT": "0",
            "BASE": BASE,
            "NAME": "hiver-try",
            "PORT": str(port),
            "DATA": str(engine.data_dir / "hiver"),
            "PRIVILEGES": " ".join(PRIVILEGES.split("\n")),
            "ENGINE_SOCKET": str(engine.socket),
            "ENGINE_STATE": str(engine.run_dir / "exec"),
            "CONTAINERD_STATE": str(engine.run_dir / "containerd"),
            # This Engine has no bridge.
            "BUILD_OPTIONS": "--network host --build-arg EXTRAS=docker",
            "RUN_OPTIONS": "--network host",
        }
    )
    subprocess.run(["docker", "import", str(BASE_TAR), BASE], check=True, env=environment)
    subprocess.run([str(REPOSITORY / "build/container/run.sh")], check=True, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: _answers(url), seconds=START_SECONDS, what="the server answers")
        _use(url)
    finally:
        subprocess.run(["docker", "logs", "hiver-try"], check=False, env=environment)
        engine.call("POST", "/containers/hiver-try/stop?t=30", seconds=60)
    left = [container["Names"] for container in engine.containers() if "/hiver-try" not in container["Names"]]
    if left:
        raise AssertionError(f"left behind: {left}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/controller/v1/sandboxes", timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def _use(url: str) -> None:
    """The newest published client in a process of its own."""
    variables = {"PYTHONPATH": str(install(ALL_VERSIONS[-1])), "HIVER_GATEWAY_URL": url}
    subprocess.run([sys.executable, "-c", USE], check=True, env=clean_environment(variables), timeout=120)


if __name__ == "__main__":
    sys.exit(main())
