"""Every setting with its type, bounds, default and description. The descriptions are the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct, field

AUTO: Final = Path("auto")
"""For folders: the place that fits the user, filled in by `load_settings`."""

ContainerBackend = Literal["auto", "oci", "docker"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
Compression = Literal["zstd", "gzip"]
VolumeKind = Literal["auto", "loop", "plain"]
EgressDefault = Literal["allow", "deny"]


class ServerSettings(Struct, frozen=True, kw_only=True):
    """The HTTP server and where it keeps its state."""

    host: Annotated[
        str,
        Meta(
            description="Address to listen on. Whoever reaches this port can run code: think twice before anything but "
            "a loopback address.",
            min_length=1,
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(description="TCP port; 0 picks a free one.", ge=0, le=65535)] = 10000
    data_dir: Annotated[
        Path,
        Meta(
            description='Folder for the database, images and sandboxes. "auto" is /var/lib/hiver for root, otherwise '
            "hiver in the XDG data home (~/.local/share)."
        ),
    ] = AUTO
    run_dir: Annotated[
        Path,
        Meta(
            description='Folder for sockets and what need not survive a reboot. "auto" is /run/hiver for root, '
            "otherwise hiver in XDG_RUNTIME_DIR, otherwise run in the data folder."
        ),
    ] = AUTO
    ephemeral: Annotated[
        bool,
        Meta(
            description="Remove all sandboxes when the server stops. Otherwise they go on; the next start adopts them."
        ),
    ] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(
            description="Names and addresses that the Host header of API requests may carry besides loopback ones and "
            "the address listened on, so that no web page can reach the API by a name of its own."
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="Origins of web pages that may use the API, such as https://inspector.example; none by default."
        ),
    ] = ()
    container_backend: Annotated[
        ContainerBackend,
        Meta(
            description="Isolation plug-in for containers: oci (crun, runc or runsc, no daemon), docker, or auto: "
            "oci where it works, otherwise docker where an engine answers and can keep every guarantee. While there "
            "are sandboxes, auto stays with what made them."
        ),
    ] = "auto"
    log_level: Annotated[LogLevel, Meta(description="Least severe messages to log.")] = "info"
    log_format: Annotated[LogFormat, Meta(description="Log lines for people (text) or for machines (json).")] = "text"
    max_request_body_bytes: Annotated[
        int,
        Meta(description="Largest JSON body of a request. Uploaded files and proxied requests have no limit.", ge=1024),
    ] = 4 * 1024 * 1024
    shutdown_timeout_seconds: Annotated[
        float,
        Meta(description="How long a stopping server waits for requests that are under way.", ge=0, le=3600),
    ] = 10.0


class SandboxSettings(Struct, frozen=True, kw_only=True):
    """Defaults and limits of every sandbox."""

    default_image: Annotated[
        str,
        Meta(
            description='Image of sandboxes that name none, and what the name agent-base stands for. "host" is a '
            "read-only view of this host's /usr and needs no download.",
            min_length=1,
        ),
    ] = "host"
    ttl_seconds: Annotated[
        int,
        Meta(description="Inactivity after which a sandbox ends if its configuration has no ttl; 0 is never.", ge=0),
    ] = 1800
    cpu: Annotated[float, Meta(description="Number of CPUs where the configuration has no cpu.", gt=0, le=1024)] = 1.0
    memory_mib: Annotated[int, Meta(description="Memory where the configuration has no memory.", ge=128)] = 512
    pids_max: Annotated[int, Meta(description="Most processes and threads of one sandbox.", ge=16)] = 512
    disk_mib: Annotated[
        int,
        Meta(description="Disk space of one sandbox: changes to its root file system and its local mounts.", ge=64),
    ] = 10240
    stop_grace_seconds: Annotated[
        float, Meta(description="Time between SIGTERM and SIGKILL when a sandbox is stopped.", ge=0, le=3600)
    ] = 10.0
    create_timeout_seconds: Annotated[
        float, Meta(description="How long a sandbox may take to start, pulling its image included.", gt=0)
    ] = 120.0
    max_sandboxes: Annotated[int, Meta(description="Most sandboxes at a time; further creates answer 409.", ge=1)] = (
        1000
    )


class ExecSettings(Struct, frozen=True, kw_only=True):
    """Commands run through exec and exec-stream."""

    max_output_bytes: Annotated[
        int,
        Meta(
            description="Most output that one exec answers with, for stdout and stderr each. What exceeds it is "
            "dropped, and the answer says how much. exec-stream has no limit.",
            ge=1024,
        ),
    ] = 16 * 1024 * 1024
    keepalive_seconds: Annotated[
        float,
        Meta(
            description="How often a long answer gets a byte while it is not ready. Published clients give up after "
            "3 s of silence.",
            gt=0,
            lt=3,
        ),
    ] = 1.0


class EventsSettings(Struct, frozen=True, kw_only=True):
    """The journal of each sandbox."""

    max_count: Annotated[int, Meta(description="Events kept per sandbox; the oldest go first.", ge=500)] = 100_000
    max_bytes: Annotated[
        int, Meta(description="Bytes of events kept per sandbox; the oldest go first.", ge=1024 * 1024)
    ] = 64 * 1024 * 1024
    stdio_lines_per_second: Annotated[
        int,
        Meta(description="stdio events per second and sandbox; further lines become one event that counts them.", ge=1),
    ] = 1000
    stdio_bytes_per_second: Annotated[
        int, Meta(description="Bytes of stdio events per second and sandbox.", ge=1024)
    ] = 1024 * 1024
    resource_usage_seconds: Annotated[
        float, Meta(description="Time between two samples of a sandbox's CPU and memory use.", ge=0.1)
    ] = 5.0


class FilesSettings(Struct, frozen=True, kw_only=True):
    """File systems, local and remote."""

    origin_roots: Annotated[
        tuple[Path, ...],
        Meta(description="Folders of this host below which a local mount's origin may lie. None: origin is refused."),
    ] = ()
    volume: Annotated[
        VolumeKind,
        Meta(
            description="Disk of a sandbox: loop (an ext4 image of disk_mib each), plain (a folder without a limit), "
            "or auto for loop where this host can."
        ),
    ] = "auto"
    volume_warm: Annotated[
        int, Meta(description="Volumes formatted ahead, so that creating a sandbox need not wait.", ge=0, le=256)
    ] = 4
    host_reserve_mib: Annotated[
        int, Meta(description="Free space that sandboxes leave on the data folder's disk.", ge=0)
    ] = 2048

    remote_cache_mib: Annotated[
        int,
        Meta(description="Disk space for copies of what a remote mount shows; each mount has so much.", ge=64),
    ] = 2048
    remote_uploads: Annotated[int, Meta(description="Uploads of one remote mount at a time.", ge=1, le=256)] = 16
    drain_seconds: Annotated[
        float,
        Meta(
            description="How long the end of a sandbox waits for what its remote mounts have to upload. What is left "
            "goes on in the background, and with the next start of the server.",
            ge=0,
        ),
    ] = 5.0


class EgressSettings(Struct, frozen=True, kw_only=True):
    """Traffic that leaves sandboxes."""

    default: Annotated[
        EgressDefault,
        Meta(description="What a configuration without egress means. An empty list always denies everything."),
    ] = "allow"
    upstream_ca_files: Annotated[
        tuple[Path, ...],
        Meta(description="PEM files with further authorities that the proxy trusts when it dials out with TLS."),
    ] = ()


class ProxySettings(Struct, frozen=True, kw_only=True):
    """Requests into sandboxes."""

    dial_hold_seconds: Annotated[
        float,
        Meta(
            description="How long a proxied request waits for its port to be listened on, before it answers 502.", ge=0
        ),
    ] = 60.0


class SnapshotsSettings(Struct, frozen=True, kw_only=True):
    """What is kept of sandboxes beyond their end."""

    store: Annotated[
        str,
        Meta(
            description="Plug-in that keeps snapshots: local (a folder of this host), remote (what url names), or "
            "another that is installed.",
            min_length=1,
        ),
    ] = "local"
    path: Annotated[Path, Meta(description='Folder of the store local. "auto" is snapshots in the data folder.')] = AUTO
    url: Annotated[
        str,
        Meta(
            description="Place of the store remote, such as gs://bucket/prefix, s3://bucket/prefix or file:///folder. "
            "Holds no credentials: they come from the environment that the library for the scheme reads (gcsfs, s3fs)."
        ),
    ] = ""
    options: Annotated[
        dict[str, Any],
        Meta(
            description="Further options of the store. Those of remote go to the library for the scheme: "
            '{ endpoint_url = "https://minio.example" }.'
        ),
    ] = {}
    keep: Annotated[
        int,
        Meta(description="Versions kept of each snapshot; older ones go when a new one is complete.", ge=1, le=1000),
    ] = 3
    max_mib: Annotated[
        int, Meta(description="Largest archive that is captured, imported or restored, as it is stored.", ge=1)
    ] = 10240
    max_members: Annotated[
        int,
        Meta(description="Files and folders that an archive may have; more are not captured and not restored.", ge=1),
    ] = 1_000_000
    compression: Annotated[
        Compression, Meta(description="Of archives that are captured: zstd, or gzip for tools that know no other.")
    ] = "zstd"
    compression_level: Annotated[int, Meta(description="From 1, which is fastest, to 9.", ge=1, le=9)] = 1


class ImageAlias(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image under a short name, with defaults for what a configuration leaves out (PROTOCOL 0.19).

    In files and variables a mere string stands for `{ image = "..." }`.
    """

    image: str
    entrypoint: tuple[str, ...] | None = None
    cwd: str | None = None
    tty: bool | None = None
    env: dict[str, str] = {}


class Settings(Struct, frozen=True, kw_only=True):
    """All settings. Tables of plug-ins are passed on as they are: the plug-in checks them."""

    server: ServerSettings = ServerSettings()
    sandbox: SandboxSettings = SandboxSettings()
    exec: ExecSettings = ExecSettings()
    events: EventsSettings = EventsSettings()
    files: FilesSettings = FilesSettings()
    egress: EgressSettings = EgressSettings()
    proxy: ProxySettings = ProxySettings()
    snapshots: SnapshotsSettings = SnapshotsSettings()
    images: Annotated[
        dict[str, ImageAlias],
        Meta(
            description="Short names for images. A name of the client documentation such as hiversh/python:3.13-alpine "
            'is pulled from its registry unless it is given here: "hiversh/python:3.13-alpine" = "host" runs it where '
            "nothing can be pulled. agent-base is default_image of [sandbox] unless it is given here. "
            "An entry may carry defaults for what a configuration leaves out: "
            'python = { image = "host", entrypoint = ["python3"], cwd = "/workspace", tty = true, env = { A = "b" } }.'
        ),
    ] = field(default_factory=lambda: {name: ImageAlias(image="host") for name in ("python", "node")})
    oci: Annotated[dict[str, Any], Meta(description="Options of the isolation plug-in oci.")] = {}
    docker: Annotated[dict[str, Any], Meta(description="Options of the isolation plug-in docker.")] = {}
    microvm: Annotated[dict[str, Any], Meta(description="Options of the isolation plug-in microvm.")] = {}

    @property
    def image_aliases(self) -> dict[str, str]:
        """All short names of images, `agent-base` (what clients ask for by default) included."""
        return {"agent-base": self.sandbox.default_image} | {name: alias.image for name, alias in self.images.items()}

    def options_of(self, plugin: str) -> dict[str, Any]:
        """The table of an isolation plug-in; empty for one that has none here."""
        tables: dict[str, dict[str, Any]] = {"oci": self.oci, "docker": self.docker, "microvm": self.microvm}
        return dict(tables.get(plugin, {}))
