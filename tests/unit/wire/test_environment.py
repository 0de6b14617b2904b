"""The operator's environment fills in what a mount does not say."""

from __future__ import annotations

import msgspec
import pytest

from hiverd.contracts.errors import InvalidError
from hiverd.wire.config import config_to_wire, decode_config, validate_config
from hiverd.wire.environment import VARIABLES, with_environment


def config(**entry):
    return decode_config(msgspec.json.encode({"fs": [{"mount": "/w", **entry}]}))


def test_the_variables_are_those_of_the_contract():
    expected = {
        "GDRIVE": "ACCESS_TOKEN REFRESH_TOKEN CLIENT_ID CLIENT_SECRET SERVICE_ACCOUNT_JSON FOLDER_ID PREFIX",
        "GCS": "BUCKET PREFIX SERVICE_ACCOUNT_JSON",
        "S3": "BUCKET REGION PREFIX ACCESS_KEY_ID SECRET_ACCESS_KEY SESSION_TOKEN ENDPOINT",
        "AZURE": "ACCOUNT CONTAINER PREFIX ACCOUNT_KEY CONNECTION_STRING SAS_TOKEN ENDPOINT",
        "ONEDRIVE": "ACCESS_TOKEN REFRESH_TOKEN CLIENT_ID CLIENT_SECRET TENANT DRIVE_ID PREFIX",
        "EXTERNAL": "HOST",
    }
    assert set(VARIABLES) == {f"HIVE_{name}_{word}" for name, words in expected.items() for word in words.split()}


def test_only_empty_members_of_the_same_backend_are_filled():
    environ = {"HIVE_S3_BUCKET": "theirs", "HIVE_S3_ACCESS_KEY_ID": "id", "HIVE_S3_SECRET_ACCESS_KEY": "key"}
    filled = with_environment(config(backend="s3", s3_bucket="mine", s3_access_key_id=""), environ)
    validate_config(filled)
    entry = filled.fs[0]
    assert (entry.s3_bucket, entry.s3_access_key_id, entry.s3_secret_access_key) == ("mine", "id", "key")
    assert with_environment(config(backend="local"), environ) == config(backend="local")


def test_what_is_missing_everywhere_is_told_by_name():
    with pytest.raises(InvalidError, match="s3_secret_access_key is required"):
        validate_config(with_environment(config(backend="s3", s3_bucket="b", s3_access_key_id="i"), {}))


@pytest.mark.parametrize(
    ("backend", "endpoint", "secret"),
    [
        ("s3", "s3_endpoint", "s3_secret_access_key"),
        ("azure", "azure_endpoint", "azure_sas_token"),
    ],
)
def test_the_operators_credentials_do_not_go_to_a_callers_endpoint(backend, endpoint, secret):
    variable = next(name for name, member in VARIABLES.items() if member == (backend, secret))
    theirs = with_environment(config(backend=backend), {variable: "hush"})
    assert getattr(theirs.fs[0], secret) == "hush"
    own = with_environment(config(backend=backend, **{endpoint: "http://attacker.example"}), {variable: "hush"})
    assert getattr(own.fs[0], secret) is None


def test_the_configuration_that_is_stored_stays_as_it_was():
    given = config(backend="external")
    with_environment(given, {"HIVE_EXTERNAL_HOST": "http://user:hush@example.org"})
    assert "hush" not in str(config_to_wire(given, family="new"))
