"""The sandbox configuration (PROTOCOL 4) as frozen structs.

Absent and empty differ: None means that the member was absent (or null), `()` that it was given and empty. So
`egress is None` allows everything by default while `egress == ()` denies everything. Absent members are never written.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta, Struct, field

Isolation = Literal["container", "microvm"]
AclAccess = Literal["rw", "ro", "deny"]
EgressAccess = Literal["allow", "deny"]
BodyStrategy = Literal["merge", "replace"]

Secret = Annotated[str, Meta(extra={"secret": True})]
"""A credential: shown to the sandbox's owner, redacted in logs and events (PROTOCOL 0.9)."""

DEFAULT_MOUNT: Final = "/workspace"
"""The one local mount that an absent `fs` stands for (PROTOCOL 0.3)."""

HTTP_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
"""Methods that a rule can name (PROTOCOL 4.4)."""


class AclRule(Struct, frozen=True, omit_defaults=True):
    """Access to the paths of a mount that `path` (a path or a glob) covers (PROTOCOL 6.1)."""

    path: str
    access: AclAccess


class FileSystem(Struct, frozen=True, omit_defaults=True, kw_only=True, tag_field="backend"):
    """What all entries of `fs` have in common (PROTOCOL 4.2). The subclass is chosen by the member `backend`."""

    backend: ClassVar[str]
    required: ClassVar[tuple[str, ...]] = ()
    """Members without which the backend cannot work."""

    mount: str
    acls: tuple[AclRule, ...] | None = None
    internal: bool | None = None
    async_: bool | None = field(default=None, name="async")


class LocalFileSystem(FileSystem, frozen=True, omit_defaults=True, kw_only=True, tag="local"):
    """Storage on this host; `origin` binds a folder of the host that the operator allows."""

    backend: ClassVar[str] = "local"

    origin: str | None = None


class GdriveFileSystem(FileSystem, frozen=True, omit_defaults=True, kw_only=True, tag="gdrive"):
    """A folder on Google Drive; needs an access token or a service account."""

    backend: ClassVar[str] = "gdrive"

    gdrive_access_token: Secret | None = None
    gdrive_refresh_token: Secret | None = None
    gdrive_client_id: str | None = None
    gdrive_client_secret: Secret | None = None
    gdrive_service_account_json: Secret | None = None
    gdrive_folder_id: str | None = None
    gdrive_prefix: str | None = None


class GcsFileSystem(FileSystem, frozen=True, omit_defaults=True, kw_only=True, tag="gcs"):
    """A Google Cloud Storage bucket. The service account is required: the server's own identity is never lent."""

    backend: ClassVar[str] = "gcs"
    required: ClassVar[tuple[str, ...]] = ("gcs_bucket", "gcs_service_account_json")

    gcs_bucket: str | None = None
    gcs_prefix: str | None = None
    gcs_service_account_json: Secret | None = None


class S3FileSystem(FileSystem, frozen=True, omit_defaults=True, kw_only=True, tag="s3"):
    """A bucket of Amazon S3 or of a compatible service."""

    backend: ClassVar[str] = "s3"
    required: ClassVar[tuple[str, ...]] = ("s3_bucket", "s3_access_key_id", "s3_secret_access_key")

    s3_bucket: str | None = None
    s3_region: str | None = None
    s3_prefix: str | None = None
    s3_access_key_id: str | None = None
    s3_secret_access_key: Secret | None = None
    s3_session_token: Secret | None = None
    s3_endpoint: str | None = None
    s3_use_path_style: bool | None = None


class AzureFileSystem(FileSystem, frozen=True, omit_defaults=True, kw_only=True, tag="azure"):
    """A container of Azure Blob Storage; a connection string wins over the other credentials."""

    backend: ClassVar[str] = "azure"
    required: ClassVar[tuple[str, ...]] = ("azure_container",)

    azure_container: str | None = None
    azure_account: str | None = None
    azure_prefix: str | None = None
    azure_account_key: Secret | None = None
    azure_connection_string: Secret | None = None
    azure_sas_token: Secret | None = None
    azure_endpoint: str | None = None


class OnedriveFileSystem(FileSystem, frozen=True, omit_defaults=True, kw_only=True, tag="onedrive"):
    """A folder on Microsoft OneDrive or in a SharePoint library."""

    backend: ClassVar[str] = "onedrive"
    required: ClassVar[tuple[str, ...]] = ("onedrive_access_token",)

    onedrive_access_token: Secret | None = None
    onedrive_refresh_token: Secret | None = None
    onedrive_client_id: str | None = None
    onedrive_client_secret: Secret | None = None
    onedrive_tenant: str | None = None
    onedrive_drive_id: str | None = None
    onedrive_prefix: str | None = None


class ExternalFileSystem(FileSystem, frozen=True, omit_defaults=True, kw_only=True, tag="external"):
    """Files behind an HTTP service of the user's own (PROTOCOL 6.4); `host` is its base URL."""

    backend: ClassVar[str] = "external"
    required: ClassVar[tuple[str, ...]] = ("host",)

    host: str | None = None


AnyFileSystem = (
    LocalFileSystem
    | GdriveFileSystem
    | GcsFileSystem
    | S3FileSystem
    | AzureFileSystem
    | OnedriveFileSystem
    | ExternalFileSystem
)


class EgressOverride(Struct, frozen=True, omit_defaults=True):
    """What the proxy changes in a request that the rule allows (PROTOCOL 5.5). Often holds secrets."""

    host: str | None = None
    prefix_path: str | None = None
    query: dict[str, str] | None = None
    headers: dict[str, str] | None = None
    body: str | dict[str, Any] | None = None
    body_strategy: BodyStrategy | None = None


class EgressRule(Struct, frozen=True, omit_defaults=True):
    """One rule; the first that matches a request decides (PROTOCOL 5.1). Empty lists match anything."""

    access: EgressAccess
    host: str
    ports: tuple[int, ...] | None = None
    methods: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None
    override: EgressOverride | None = None
    override_script: str | None = None


class SnapshotVm(Struct, frozen=True, omit_defaults=True):
    key: str


class SnapshotFiles(Struct, frozen=True, omit_defaults=True):
    key: str
    write_on_shutdown: bool | None = None
    include: tuple[str, ...] | None = None
    mount: str | None = None


class Snapshot(Struct, frozen=True, omit_defaults=True):
    """Both historical forms (PROTOCOL 4.3): `vm` and `files`, or `restore_key`, `write_key` and `include`."""

    vm: SnapshotVm | None = None
    files: SnapshotFiles | None = None
    restore_key: str | None = None
    write_key: str | None = None
    include: tuple[str, ...] | None = None

    @property
    def is_old_form(self) -> bool:
        """True for the form of clients 0.1.15 to 0.1.18."""
        return self.restore_key is not None or self.write_key is not None or self.include is not None


class SandboxConfig(Struct, frozen=True, omit_defaults=True):
    """What a caller asks of a sandbox (PROTOCOL 4.1). `memory` is in MiB, `ttl` and `egress_deny_wait` in seconds."""

    image: str | None = None
    isolation: Isolation | None = None
    cpu: float | None = None
    request_cpu: float | None = None
    memory: int | None = None
    entrypoint: str | tuple[str, ...] | None = None
    cwd: str | None = None
    tty: bool | None = None
    env: dict[str, str] | None = None
    extra_hosts: tuple[str, ...] | None = None
    ttl: int | None = None
    fs: tuple[AnyFileSystem, ...] | None = None
    egress: tuple[EgressRule, ...] | None = None
    egress_deny_wait: int | None = None
    mitm: bool | None = None
    events: tuple[str, ...] | None = None
    snapshot: Snapshot | None = None


FILE_SYSTEM_CLASSES: Final[tuple[type[AnyFileSystem], ...]] = (
    LocalFileSystem,
    GdriveFileSystem,
    GcsFileSystem,
    S3FileSystem,
    AzureFileSystem,
    OnedriveFileSystem,
    ExternalFileSystem,
)
