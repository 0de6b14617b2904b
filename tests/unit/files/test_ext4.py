from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hiverd.contracts.errors import UnavailableError
from hiverd.files import ext4

SIZE = 256 << 20
FSCK = shutil.which("e2fsck", path="/usr/sbin:/sbin:/usr/bin")
needs_e2fsprogs = pytest.mark.skipif(ext4.mkfs_program() is None or FSCK is None, reason="needs e2fsprogs")


def test_crc32c_matches_the_published_check_value() -> None:
    """RFC 3720, B.4 and the catalogue's check for "123456789", before the final inversion that ext4 leaves out."""
    assert ext4.crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert ext4.crc32c(bytes(32)) ^ 0xFFFFFFFF == 0x8A9136AA


@needs_e2fsprogs
def test_copies_are_sound_sparse_and_distinct(tmp_path: Path) -> None:
    template = tmp_path / "template"
    ext4.make_template(template, SIZE)
    images = [tmp_path / "a", tmp_path / "b"]
    for image in images:
        ext4.copy_template(template, image)
        assert image.stat().st_size == SIZE
        assert image.stat().st_blocks * 512 < SIZE // 20
        assert image.stat().st_mode & 0o777 == 0o600
        checked = subprocess.run([str(FSCK), "-fn", str(image)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    uuids = {image.read_bytes()[1024 + 0x68 : 1024 + 0x78] for image in (template, *images)}
    assert len(uuids) == 3


@needs_e2fsprogs
def test_a_template_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="mkfs"):
        ext4.make_template(tmp_path / "template", 4096)
    assert list(tmp_path.iterdir()) == []
