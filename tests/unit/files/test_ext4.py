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
    loaded = ext4.read_template(template)
    for image in images:
        loaded.copy_to(image)
        assert image.stat().st_size == SIZE
        assert image.stat().st_blocks * 512 < SIZE // 20
        assert image.stat().st_mode & 0o777 == 0o600
        checked = subprocess.run([str(FSCK), "-fn", str(image)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
    uuids = {image.read_bytes()[1024 + 0x68 : 1024 + 0x78] for image in (template, *images)}
    assert len(uuids) == 3


@needs_e2fsprogs
def test_a_copy_differs_from_its_template_in_the_superblock_only(tmp_path: Path) -> None:
    template, image = tmp_path / "template", tmp_path / "image"
    ext4.make_template(template, SIZE)
    ext4.read_template(template).copy_to(image)
    ours, theirs = image.read_bytes(), template.read_bytes()
    assert ours[:1024] == theirs[:1024]
    assert ours[2048:] == theirs[2048:]


@needs_e2fsprogs
def test_zeros_that_the_host_does_not_report_as_holes_are_left_out(tmp_path: Path) -> None:
    template, full = tmp_path / "template", tmp_path / "full"
    ext4.make_template(template, SIZE)
    full.write_bytes(template.read_bytes())
    assert full.stat().st_blocks * 512 >= SIZE
    loaded = ext4.read_template(full)
    assert loaded.size_bytes == SIZE
    assert sum(len(content) for _, content in loaded.pieces) < SIZE // 20


def test_a_file_without_a_superblock_is_no_template(tmp_path: Path) -> None:
    damaged = tmp_path / "template"
    with damaged.open("wb") as file:
        file.truncate(SIZE)
    with pytest.raises(UnavailableError, match="no file system"):
        ext4.read_template(damaged)


@needs_e2fsprogs
def test_a_template_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="mkfs"):
        ext4.make_template(tmp_path / "template", 4096)
    assert list(tmp_path.iterdir()) == []
