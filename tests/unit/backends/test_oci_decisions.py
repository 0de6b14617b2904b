"""What the plug-in decides without doing: settings, names, configurations, verdicts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hiver_backends.linux import bundle, host_image, inside, network, pids, references, runtime, seccomp
from hiver_backends.linux.cgroups import Cgroups
from hiver_backends.linux.livemounts import check_target
from hiver_backends.oci import settings
from hiverd.contracts.errors import InvalidError
from hiverd.contracts.isolation import ExecSpec, Image, WorkloadSpec

RUNC = "exec failed: unable to start container process"


def spec(**changes: Any) -> WorkloadSpec:
    values: dict[str, Any] = {
        "sandbox_id": "id", "key": "key", "slot": 0, "image": Image("i", "h", env={"A": "image", "B": "image"}),
        "volume": Path("/volume"), "hostname": "box", "cpu": 0.25, "memory_bytes": 1 << 28, "pids_max": 100,
        "argv": (), "tty": False, "cwd": "", "env": {"A": "config"},
    }  # fmt: skip
    return WorkloadSpec(**(values | changes))


def layout(**changes: Any) -> bundle.Layout:
    values: dict[str, Any] = {
        "rootfs": "/r", "init": "/init", "cgroups_path": "/g", "host_id": 0x70000000, "unified_cgroups": False,
        "swap_limit": True, "seccomp": {"defaultAction": "x"}, "tty_session": False,
    }  # fmt: skip
    return bundle.Layout(**(values | changes))


class TestSettings:
    def test_defaults(self) -> None:
        assert settings.parse({}) == settings.Settings()

    def test_unknown_key_names_the_nearest(self) -> None:
        with pytest.raises(InvalidError, match=r"'runtme'.*'runtime'") as caught:
            settings.parse({"runtme": "runc"})
        assert caught.value.field == "oci.runtme"

    @pytest.mark.parametrize(
        "options",
        [{"userns": "sometimes"}, {"userns_base": 1}, {"userns_base": 0x7FFFFFFF}, {"log_max_bytes": 1},
         {"seccomp": "relative"}, {"image_roots": ["relative"]}, {"parallelism": -1}, {"runtime": 7}],
    )  # fmt: skip
    def test_bad_values(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidError):
            settings.parse(options)

    def test_ranges_of_slots_do_not_overlap_and_end(self) -> None:
        one = settings.Settings()
        assert settings.host_id(one, 1) - settings.host_id(one, 0) == 65536
        last = (settings.LAST_HOST_ID - settings.FIRST_HOST_ID) // 65536
        assert settings.host_id(one, last) + 65535 == settings.LAST_HOST_ID
        for slot in (last + 1, -1):
            with pytest.raises(InvalidError):
                settings.host_id(one, slot)


class TestReferences:
    @pytest.mark.parametrize(
        ("name", "location", "registry"),
        [
            ("python", "docker://python", ""),
            ("python:3.13-alpine", "docker://python:3.13-alpine", ""),
            ("team/app", "docker://team/app", ""),
            ("localhost/app", "docker://localhost/app", "localhost"),
            ("reg.example:5000/team/app:v1", "docker://reg.example:5000/team/app:v1", "reg.example:5000"),
            ("docker://reg.example/app", "docker://reg.example/app", "reg.example"),
            (f"app@sha256:{'a' * 64}", f"docker://app@sha256:{'a' * 64}", ""),
            ("[::1]:5000/app", "docker://[::1]:5000/app", "[::1]:5000"),
        ],
    )
    def test_registry_names(self, name: str, location: str, registry: str) -> None:
        source = references.parse(name)
        assert (source.location, source.registry, source.path) == (location, registry, None)

    @pytest.mark.parametrize(
        ("name", "location", "path"),
        [
            ("oci:/a/b:tag", "oci:/a/b:tag", "/a/b"),
            ("oci:/a/b", "oci:/a/b", "/a/b"),
            ("oci-archive:/a/b.tar", "oci-archive:/a/b.tar", "/a/b.tar"),
            ("docker-archive:/a/b.tar:x", "docker-archive:/a/b.tar:x", "/a/b.tar"),
            ("oci:/with:colon/dir", "oci:/with:colon/dir", "/with:colon/dir"),
        ],
    )
    def test_local_names(self, name: str, location: str, path: str) -> None:
        source = references.parse(name)
        assert (source.location, source.path) == (location, path)

    @pytest.mark.parametrize(
        "name",
        ["", "Upper", "a b", "--help", "-v", "../up", "/abs", "a//b", "a:b:c", "oci:relative", "oci:/a:b c", "http://x/y",
         "x\n--flag", "a@sha256:short", "x" * 600],
    )  # fmt: skip
    def test_what_is_no_name(self, name: str) -> None:
        with pytest.raises(InvalidError):
            references.parse(name)

    @pytest.mark.parametrize(
        ("registry", "loopback"),
        [("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True), ("127.8.8.8", True),
         ("[::1]:5000", True),
         ("", False), ("localhost.example", False), ("10.0.0.1:5000", False), ("127.0.0.1.example:1", False)],
    )  # fmt: skip
    def test_loopback(self, registry: str, loopback: bool) -> None:
        assert references.is_loopback(registry) is loopback

    def test_configuration(self) -> None:
        document: dict[str, Any] = {"config": {"Entrypoint": ["/a"], "Cmd": None, "Env": ["A=1=2", "B=", "=x"],
                               "WorkingDir": "",
                               "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "443": {}, "x/tcp": {}}}}  # fmt: skip
        image = references.image_from_config("r", "h", document)
        assert (image.entrypoint, image.cmd, image.cwd, image.exposed_ports) == (("/a",), (), "/", (80, 443))
        assert image.env == {"A": "1=2", "B": ""}
        assert references.image_from_config("r", "h", {"config": "odd"}) == Image("r", "h")


class TestStartFailure:
    @pytest.mark.parametrize(
        ("message", "argv", "cwd", "code"),
        [
            (f'{RUNC}: exec: "nope": executable file not found in $PATH', "nope", "/", 127),
            (f'{RUNC}: exec: "/n": stat /n: no such file or directory', "/n", "/", 127),
            (f'{RUNC}: exec: "/etc/passwd": permission denied', "/etc/passwd", "/", 126),
            (
                f'{RUNC}: chdir to cwd ("/nope") set in config.json failed: no such file or directory',
                "true",
                "/nope",
                126,
            ),
            (f'{RUNC}: chdir to cwd ("/bin/sh") set in config.json failed: not a directory', "true", "/bin/sh", 126),
            (f"{RUNC}: current working directory is outside of container mount namespace root", "true", "/fd/7", 126),
            ("exec /x: argument list too long", "/x", "/", 126),
            ("executable file `nope` not found in $PATH: No such file or directory", "nope", "/", 127),
            ("open executable: Permission denied: `/etc/passwd`", "/etc/passwd", "/", 126),
            ("cannot chdir to `/nope`: No such file or directory", "true", "/nope", 126),
            ("creating process: failed to load /nope: no such file or directory", "/nope", "/", 127),
        ],
    )
    def test_the_callers_mistakes(self, message: str, argv: str, cwd: str, code: int) -> None:
        verdict = runtime.start_failure(message, [argv], cwd)
        assert verdict is not None
        assert verdict[0] == code
        assert (argv if cwd == "/" else cwd) in verdict[1]

    @pytest.mark.parametrize(
        "message", ["cannot exec in a stopped container", "container does not exist", "", "OCI oops"]
    )
    def test_our_own(self, message: str) -> None:
        assert runtime.start_failure(message, ["true"], "/") is None

    def test_last_error(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        assert runtime.last_error(log) == ""
        log.write_text(
            '{"level":"error","msg":"first"}\nnot json\n{"level":"error","msg":"last"}\n{"level":"warning","msg":"w"}\n'
        )
        assert runtime.last_error(log) == "last"


class TestBundle:
    def test_process_one_waits_or_supervises(self) -> None:
        assert bundle.entry_arguments((), tty_session=False) == [bundle.INIT_PATH, "-P"]
        assert bundle.entry_arguments(("a", "-b"), tty_session=False) == [bundle.INIT_PATH, "--", "a", "-b"]
        assert bundle.entry_arguments(("a",), tty_session=True) == [bundle.INIT_PATH, "-P"]

    def test_environment_layers(self) -> None:
        assert bundle.environment(spec()) == {
            "PATH": bundle.DEFAULT_PATH, "HOME": "/root", "HOSTNAME": "box", "A": "config", "B": "image",
        }  # fmt: skip
        assert bundle.environment(spec(tty=True, argv=("sh",)))["TERM"] == "xterm-256color"
        process = bundle.exec_process(
            ExecSpec(exec_id="e", argv=("x",), env={"A": "exec", "TERM": "dumb"}, tty=True), spec()
        )
        assert {"A=exec", "B=image", "TERM=dumb", "COLORTERM=truecolor"} <= set(process["env"])
        assert process["cwd"] == "/"

    def test_limits(self) -> None:
        resources = bundle.configuration(spec(), layout())["linux"]["resources"]
        assert resources["cpu"] == {"shares": 256, "quota": 25000, "period": 100000}
        assert resources["memory"] == {"limit": 1 << 28, "swap": 1 << 28}
        assert resources["pids"] == {"limit": 100}
        assert bundle.configuration(spec(), layout(swap_limit=False))["linux"]["resources"]["memory"] == {
            "limit": 1 << 28
        }

    def test_namespaces(self) -> None:
        linux = bundle.configuration(spec(), layout())["linux"]
        assert {entry["type"] for entry in linux["namespaces"]} == {
            "pid",
            "ipc",
            "uts",
            "mount",
            "network",
            "cgroup",
            "user",
        }
        assert all("path" not in entry for entry in linux["namespaces"])
        assert linux["uidMappings"] == linux["gidMappings"] == [{"containerID": 0, "hostID": 0x70000000, "size": 65536}]
        without = bundle.configuration(spec(), layout(host_id=None))["linux"]
        assert "user" not in {entry["type"] for entry in without["namespaces"]}
        assert "uidMappings" not in without

    def test_privileges(self) -> None:
        process = bundle.configuration(spec(), layout())["process"]
        assert process["noNewPrivileges"] is True
        assert process["oomScoreAdj"] > 0
        assert set(process["capabilities"]) == {"bounding", "effective", "permitted"}
        assert not {"CAP_NET_RAW", "CAP_MKNOD", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"} & set(
            process["capabilities"]["bounding"]
        )


class TestSeccomp:
    def test_nothing_dangerous_is_allowed(self) -> None:
        profile = seccomp.default_profile()
        if profile is None:
            pytest.skip("no profile for this architecture")
        assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
        assert len(profile["architectures"]) == 1
        free = {name for rule in profile["syscalls"] if "args" not in rule and rule["action"] == "SCMP_ACT_ALLOW"
                for name in rule["names"]}  # fmt: skip
        assert not free & {
            "mount", "umount2", "pivot_root", "unshare", "setns", "clone", "clone3", "bpf", "perf_event_open",
            "userfaultfd",
            "io_uring_setup", "keyctl", "add_key", "request_key", "socket", "personality", "init_module", "kexec_load",
            "open_by_handle_at", "open_tree", "move_mount", "fsopen", "mount_setattr", "reboot", "settimeofday",
            "clock_settime", "swapon", "acct", "quotactl", "iopl", "ioperm", "fanotify_init", "lookup_dcookie",
            "sethostname",
        }  # fmt: skip
        assert {"read", "execve", "openat2", "futex", "statx", "getrandom", "rseq", "epoll_pwait2"} <= free

    def test_a_profile_of_ones_own(self, tmp_path: Path) -> None:
        file = tmp_path / "profile.json"
        file.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
        assert seccomp.load(str(file), "oci") == {"defaultAction": "SCMP_ACT_ALLOW"}
        for content in ("[]", "{}", "nonsense"):
            file.write_text(content)
            with pytest.raises(InvalidError):
                seccomp.load(str(file), "oci")
        with pytest.raises(InvalidError):
            seccomp.load(str(tmp_path / "none"), "oci")


class TestCgroups:
    def test_version_2(self, tmp_path: Path) -> None:
        (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
        folder = tmp_path / "hiver-abc" / "one"
        folder.mkdir(parents=True)
        for name, content in {
            "cgroup.procs": "12\n0\n34\n", "cpu.stat": "usage_usec 2500000\nuser_usec 1\n", "memory.current": "5000\n",
            "memory.stat": "anon 1\ninactive_file 1000\n", "memory.events": "low 0\noom 1\noom_kill 2\n",
        }.items():  # fmt: skip
            (folder / name).write_text(content)
        cgroups = Cgroups("abc", tmp_path)
        assert cgroups.unified
        assert cgroups.owned() == {"one"}
        assert cgroups.members("one") == {12, 34}
        assert cgroups.members("two") == set()
        assert cgroups.usage("one").cpu_seconds == 2.5
        assert cgroups.usage("one").memory_bytes == 4000
        assert cgroups.oom_kills("one") == 2
        assert cgroups.oom_kills("two") == 0

    def test_version_1_with_shared_hierarchies(self, tmp_path: Path) -> None:
        for name in ("cpu,cpuacct", "memory", "pids"):
            folder = tmp_path / name / "hiver-abc" / "one"
            folder.mkdir(parents=True)
            (tmp_path / name / "cgroup.procs").write_text("")
            (folder / "cgroup.procs").write_text("7\n")
        (tmp_path / "cpu").symlink_to("cpu,cpuacct")
        (tmp_path / "cpuacct").symlink_to("cpu,cpuacct")
        (tmp_path / "cpu" / "hiver-abc" / "one" / "cpuacct.usage").write_text("1500000000\n")
        (tmp_path / "memory" / "hiver-abc" / "one" / "memory.usage_in_bytes").write_text("900\n")
        (tmp_path / "memory" / "hiver-abc" / "one" / "memory.stat").write_text("total_inactive_file 100\n")
        cgroups = Cgroups("abc", tmp_path)
        assert not cgroups.unified
        assert len(cgroups.hierarchies) == 3
        usage = cgroups.usage("one")
        assert (usage.cpu_seconds, usage.memory_bytes) == (1.5, 800)
        assert not cgroups.has_swap_limit()


class TestSmallThings:
    def test_hosts_file(self) -> None:
        text = inside.hosts("box", (("db", "10.0.0.1"),))
        assert text.splitlines()[-2:] == ["127.0.0.1\tbox", "10.0.0.1\tdb"]

    def test_listeners(self) -> None:
        table = "  sl  local_address rem_address   st\n"
        table += "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n"
        table += "   1: 0100007F:1F91 0100007F:1F90 01 00000000:00000000\n"
        table += "   2: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 0:0\n"
        assert network.parse_listeners(table) == {8080, 80}

    def test_exit_codes(self) -> None:
        class Status:
            si_code = os.CLD_KILLED
            si_status = signal.SIGKILL

        assert pids.exit_code(Status()) == 137  # type: ignore[arg-type]

    def test_descendants(self) -> None:
        def stat(parent: int, session: int) -> pids.ProcessStat:
            return pids.ProcessStat("x", "S", parent, session, 1)

        processes = {
            1: stat(0, 1), 10: stat(1, 10), 11: stat(10, 10), 12: stat(11, 12), 13: stat(12, 12), 14: stat(1, 10),
            20: stat(1, 20), 21: stat(20, 20),
        }  # fmt: skip
        assert pids.descendants(10, processes) == {10, 11, 12, 13, 14}
        assert pids.descendants(99, processes) == set()

    def test_a_process_name_may_hold_anything(self) -> None:
        stat = pids.read_stat(os.getpid())
        assert stat is not None
        assert stat.parent == os.getppid()
        assert stat.start_ticks > 0
        assert pids.read_stat(2**22 + 1) is None

    @pytest.mark.parametrize(
        "target", ["/", "", "relative", "/proc", "/proc/x", "/dev", "/sys/fs", "/a/../proc", "//proc"]
    )
    def test_forbidden_mount_targets(self, target: str) -> None:
        with pytest.raises(InvalidError):
            check_target(target)

    def test_allowed_mount_targets(self) -> None:
        for target in ("/workspace", "/process", "/devices", "/system", "/a/proc"):
            check_target(target)

    def test_no_private_key_comes_into_the_host_image(self, tmp_path: Path) -> None:
        etc = tmp_path / "etc"
        etc.mkdir()
        for name, content, mode in (
            ("cert.pem", "-----BEGIN CERTIFICATE-----", 0o644), ("both.pem", "-----BEGIN RSA PRIVATE KEY-----", 0o644),
            ("server.key", "x", 0o644), ("closed.conf", "x", 0o600), ("open.conf", "x", 0o644),
        ):  # fmt: skip
            (etc / name).write_text(content)
            (etc / name).chmod(mode)
        host_image._copy(etc, tmp_path / "copy")
        assert {path.name for path in (tmp_path / "copy").iterdir()} == {"cert.pem", "open.conf"}
