"""What is changed in an image so that its programs trust the sandbox's CA, and what is left alone."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12

from hiverd.egress.authority import CA_NAME, Authority
from hiverd.files.rooted import NotRegularError
from hiverd.sandboxes import keystores, nss, trust

FOREIGN = "-----BEGIN CERTIFICATE-----\nsomebody\n-----END CERTIFICATE-----\n"


class Image:
    """A folder as the root of a workload."""

    root_ids = (os.getuid(), os.getgid())

    def __init__(self, root: Path) -> None:
        self.root = root

    def open_root(self) -> int:
        return os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def add(self, path: str, content: str | bytes) -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def text(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def files(self) -> set[str]:
        return {f"/{path.relative_to(self.root)}" for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def image(tmp_path: Path) -> Image:
    root = tmp_path / "root"
    root.mkdir()
    return Image(root)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Authority.load_or_make(tmp_path_factory.mktemp("authority") / "ca").certificate_pem


@pytest.fixture(scope="module")
def certificate(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def install(image: Image, pem: bytes, environment: Mapping[str, str] | None = None) -> None:
    trust.install(image, pem, environment or {})  # type: ignore[arg-type]


def test_an_empty_image_gets_a_bundle_a_certificate_and_a_database_and_no_more(image: Image, pem: bytes) -> None:
    install(image, pem)
    nss_files = {f"/root/.pki/nssdb/{name}" for name in nss.FILES}
    assert image.files() == {trust.BUNDLE, trust.STAND_ALONE} | nss_files
    assert image.text(trust.STAND_ALONE).encode() == pem
    assert image.text(trust.BUNDLE).encode().endswith(pem)


def test_bundles_are_added_to_and_none_is_invented(image: Image, pem: bytes) -> None:
    for path in (trust.BUNDLE, trust.OTHER_BUNDLES[0]):
        image.add(path, FOREIGN)
    install(image, pem)
    for path in (trust.BUNDLE, trust.OTHER_BUNDLES[0]):
        assert image.text(path) == FOREIGN + pem.decode()
    assert not image.files() & set(trust.OTHER_BUNDLES[1:])


def test_bundles_that_are_one_file_get_one_certificate(image: Image, pem: bytes) -> None:
    image.add(trust.BUNDLE, FOREIGN)
    link = image.root / trust.OTHER_BUNDLES[2].lstrip("/")
    link.symlink_to(trust.BUNDLE)
    install(image, pem)
    assert image.text(trust.BUNDLE) == FOREIGN + pem.decode()
    assert link.is_symlink()


def test_a_bundle_that_the_image_prefers_is_added_to(image: Image, pem: bytes) -> None:
    image.add("/opt/own/ca.pem", FOREIGN)
    image.add("/opt/own/notes.txt", "no certificates")
    environment = {"SSL_CERT_FILE": "/opt/own/../own/ca.pem", "PIP_CERT": "/opt/own/notes.txt", "AWS_CA_BUNDLE": "x\0"}
    install(image, pem, environment)
    assert image.text("/opt/own/ca.pem") == FOREIGN + pem.decode()
    assert image.text("/opt/own/notes.txt") == "no certificates"


def test_links_of_a_hostile_image_do_not_lead_out(image: Image, pem: bytes, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "cert.pem").write_text(FOREIGN)
    (image.root / "etc/ssl").mkdir(parents=True)
    (image.root / "etc/ssl/certs").symlink_to(outside)
    (image.root / "etc/ssl/cert.pem").symlink_to("../../../outside/cert.pem")
    with pytest.raises(FileNotFoundError):
        install(image, pem)
    assert [path.name for path in outside.iterdir()] == ["cert.pem"]
    assert (outside / "cert.pem").read_text() == FOREIGN


def test_a_bundle_that_is_no_file_is_an_error_and_not_a_hang(image: Image, pem: bytes) -> None:
    (image.root / "etc/ssl/certs").mkdir(parents=True)
    os.mkfifo(image.root / trust.BUNDLE.lstrip("/"))
    with pytest.raises(NotRegularError):
        install(image, pem)


def test_no_temporary_file_is_left(image: Image, pem: bytes) -> None:
    image.add(trust.BUNDLE, FOREIGN)
    install(image, pem)
    assert [file for file in image.files() if "hiver-upload" in file] == []
    assert (image.root / trust.STAND_ALONE.lstrip("/")).stat().st_nlink == 1


# -- Java -----------------------------------------------------------------------------------------------------------


def jks(*entries: bytes) -> bytes:
    body = bytes.fromhex("feedfeed00000002") + len(entries).to_bytes(4) + b"".join(entries)
    return body + keystores._jks_digest(body)


def keytool_list(store: bytes, folder: Path, *options: str) -> str:
    file = folder / "cacerts"
    file.write_bytes(store)
    command = ["keytool", "-list", "-keystore", str(file), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


needs_keytool = pytest.mark.skipif(shutil.which("keytool") is None, reason="there is no Java here")


@pytest.fixture
def passwordless(certificate: x509.Certificate) -> bytes:
    """A PKCS #12 store as the JDK ships it, with one entry. That Java reads it is tested below."""
    safe = keystores._certificate_safe(certificate)
    return keystores._store_of(
        safe.replace(keystores.ALIAS.encode("utf-16-be"), "somebody-else-ca".encode("utf-16-be"))
    )


@needs_keytool
def test_java_reads_a_jks_store_with_the_certificate(tmp_path: Path, certificate: x509.Certificate) -> None:
    once = keystores.with_certificate(jks(), certificate)
    assert once is not None
    twice = keystores.with_certificate(once.replace(b"hiver-sandbox-ca", b"somebody-else-ca"), certificate)
    assert twice is None, "the digest does not fit any more"
    listed = keytool_list(once, tmp_path, "-storepass", "changeit")
    assert "contains 1 entry" in listed
    assert keystores.ALIAS in listed


@needs_keytool
def test_java_reads_a_store_without_password_with_the_certificate(
    tmp_path: Path, certificate: x509.Certificate, passwordless: bytes
) -> None:
    store = keystores.with_certificate(passwordless, certificate)
    assert store is not None
    listed = keytool_list(store, tmp_path, "-storepass", "")
    assert "contains 2 entries" in listed
    assert keystores.ALIAS in listed
    assert "somebody" in listed


def test_stores_that_cannot_be_read_stay(certificate: x509.Certificate, passwordless: bytes) -> None:
    encrypted = BestAvailableEncryption(b"secret")
    secret = pkcs12.serialize_key_and_certificates(b"somebody", None, None, [certificate], encrypted)
    foreign = jks()[:-20] + bytes(20)
    cut = [passwordless[:size] for size in range(64)]
    for store in (b"", b"text", secret, foreign, jks()[:-1], *cut):
        assert keystores.with_certificate(store, certificate) is None


def test_each_java_of_the_image_gets_it_once(image: Image, pem: bytes) -> None:
    shared = image.add("/etc/ssl/certs/java/cacerts", jks())
    own = image.add("/usr/lib/jvm/jdk-21/lib/security/cacerts", jks())
    named = image.add("/srv/jdk/jre/lib/security/cacerts", jks())
    linked = image.root / "usr/lib/jvm/jdk-17/lib/security/cacerts"
    linked.parent.mkdir(parents=True)
    linked.symlink_to("/etc/ssl/certs/java/cacerts")
    install(image, pem, {"JAVA_HOME": "/srv/jdk/"})
    for store in (shared, own, named):
        assert store.read_bytes().count(keystores.ALIAS.encode()) == 1
    assert linked.is_symlink()


# -- NSS ------------------------------------------------------------------------------------------------------------


def test_an_nss_database_of_the_image_stays(image: Image, pem: bytes) -> None:
    image.add("/home/me/.pki/nssdb/cert9.db", "somebody's")
    install(image, pem, {"HOME": "/home/me"})
    assert image.text("/home/me/.pki/nssdb/cert9.db") == "somebody's"
    assert not [file for file in image.files() if file.endswith("key4.db")]


def test_the_nss_database_names_the_authority(certificate: x509.Certificate) -> None:
    database = sqlite3.connect(":memory:")
    database.deserialize(nss.databases(certificate)["cert9.db"])
    rows = database.execute("SELECT a3 FROM nssPublic ORDER BY id").fetchall()
    database.close()
    assert rows == [(CA_NAME.encode(),), (b"\xa5\x00\x5a",)]


@pytest.mark.skipif(shutil.which("certutil") is None, reason="there is no certutil here")
def test_nss_takes_certificates_of_the_authority_for_servers(tmp_path: Path) -> None:
    authority = Authority.load_or_make(tmp_path / "ca")
    certificate = x509.load_pem_x509_certificate(authority.certificate_pem)
    for name, content in nss.databases(certificate).items():
        (tmp_path / name).write_bytes(content)
    leaf = tmp_path / "leaf.pem"
    leaf.write_bytes(authority.leaf("api.test").partition(b"-----BEGIN PRIVATE")[0])

    def certutil(*arguments: str) -> str:
        command = ["certutil", *arguments, "-d", f"sql:{tmp_path}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    listed = certutil("-L")
    assert CA_NAME in listed
    assert "C,," in listed
    certutil("-A", "-n", "leaf", "-t", ",,", "-i", str(leaf))
    assert "certificate is valid" in certutil("-V", "-n", "leaf", "-u", "V")
