"""The operator's settings: a TOML file, the environment and the command line become frozen structs.

    settings = load_settings(Path("hiver.toml"), environ=os.environ, overrides={"server.port": 10001})

Precedence: command line, environment, file, default. Unknown keys are refused, naming the nearest known one.
`docs/settings.md` and `config.example.toml` are written by `hiverd.settings.reference` from the descriptions here.
"""

from hiverd.settings.load import SettingsError, load_settings
from hiverd.settings.model import (
    EgressSettings,
    EventsSettings,
    ExecSettings,
    FilesSettings,
    ProxySettings,
    SandboxSettings,
    ServerSettings,
    Settings,
    SnapshotsSettings,
)

__all__ = [
    "EgressSettings",
    "EventsSettings",
    "ExecSettings",
    "FilesSettings",
    "ProxySettings",
    "SandboxSettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "SnapshotsSettings",
    "load_settings",
]
