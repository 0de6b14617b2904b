"""Whether another program wrote in the moment between our look at a file's version and our write."""

from __future__ import annotations

import logging
from typing import Any, Final

from googleapiclient.http import MediaInMemoryUpload

from .entries import Entry
from .service import Service
from .tree import SHARED
from .upload import CHUNK_BYTES

log: Final = logging.getLogger(__name__)


async def undo_if_another_wrote(service: Service, ours: Entry, before: Entry, md5: str) -> bool:
    """True if there is a revision between `before` and ours. Theirs is then the current one again.

    Theirs is copied only if it fits into one chunk. A larger one stays in the file's history, where Drive keeps it for
    30 days, and the log says so.
    """
    try:
        answer = await service.call(
            lambda api: api.revisions().list(
                fileId=ours.id, pageSize=1000, fields="revisions(id,md5Checksum,size,mimeType)"
            )
        )
    except PermissionError:  # of a file whose history is not ours to see
        return False
    between = _between(answer.get("revisions", []), ours, before, md5)
    if not between:
        return False
    theirs = between[-1]
    if int(theirs.get("size") or 0) > CHUNK_BYTES:
        log.error("file %s was changed by two at once; revision %s is in its history", ours.id, theirs["id"])
        return True
    data = await service.call(lambda api: api.revisions().get_media(fileId=ours.id, revisionId=theirs["id"]))
    media = MediaInMemoryUpload(data or b"", mimetype=theirs.get("mimeType") or "application/octet-stream")
    await service.call(lambda api: api.files().update(fileId=ours.id, media_body=media, fields="id", **SHARED))
    return True


def _between(revisions: list[dict[str, Any]], ours: Entry, before: Entry, md5: str) -> list[dict[str, Any]]:
    """Oldest first. Revisions with our own content are ours: an attempt whose answer was lost."""
    ids = [f"{ours.id}-{revision['id']}" for revision in revisions]
    old, new = before.version.partition("-link-")[0], ours.version
    if old not in ids or new not in ids:
        return []  # Drive has dropped the old one, or merged them
    found = revisions[ids.index(old) + 1 : ids.index(new)]
    return [revision for revision in found if revision.get("md5Checksum") != md5]
