"""What can be chosen about a remote mount's folder. Defaults suit a laptop and a bucket."""

from __future__ import annotations

from msgspec import Struct


class RemoteSettings(Struct, frozen=True, kw_only=True):
    asynchronous: bool = False
    """`fs[].async` (PROTOCOL 6.4): what is here is taken as good, and nothing asks again."""
    cache_bytes: int = 10 << 30
    """Of clean content on the disk. What is open stays, so that more may be there for a while."""
    dirty_bytes: int = 10 << 30
    """Of content that waits for its upload: above that, new changes wait for room."""
    room_seconds: float = 60.0
    """How long such a change waits while nothing at all can be uploaded, before it fails with ENOSPC."""
    parallel_uploads: int = 16
    parallel_downloads: int = 16
    quiet_seconds: float = 0.75
    """Between the last close and the upload (PROTOCOL 6.4)."""
    longest_seconds: float = 3.0
    """Between the first change and the upload, if closes follow each other without a pause."""
    retry_seconds: float = 1.0
    """The first pause after a failed upload; it doubles up to `longest_retry_seconds`."""
    longest_retry_seconds: float = 60.0
    listing_seconds: float = 5.0
    """How long a listing answers for the service, in sync mode."""
    listing_factor: float = 20.0
    """A listing is good for at least this many times what it took, or a huge directory would always be listed."""
    stat_seconds: float = 1.0
    """How long an answer about one object is good for the next open of it, in sync mode."""
    block_bytes: int = 1 << 20
    """Ranges that are asked for start and end at multiples of it."""
    chunk_bytes: int = 4 << 20
    """What a first read asks for; a sequential reader's share doubles from there up to `read_ahead_bytes`."""
    read_ahead_bytes: int = 32 << 20
    part_bytes: int = 16 << 20
    """Larger gaps are fetched in several requests at once."""
