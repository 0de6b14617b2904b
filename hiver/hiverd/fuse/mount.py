"""A folder of the host served as a governed mount (docs/files.md)."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path
from typing import Final

from hiverd.files import linux
from hiverd.files.acl import Rules
from hiverd.fuse import abi, syscalls
from hiverd.fuse.aside import SLOW, Aside, send
from hiverd.fuse.attributes import OWNED, SHARED, Attributes, Caching, Owners
from hiverd.fuse.caller import Caller
from hiverd.fuse.core import Core
from hiverd.fuse.descriptors import Directories, inode_of
from hiverd.fuse.dispatch import Dispatcher
from hiverd.fuse.judge import Exempt, Judge, Record
from hiverd.fuse.nodes import Node, Tree
from hiverd.remote.content import Content

_log = logging.getLogger(__name__)

CONTENT_THREADS: Final = 32
"""With a backend most requests wait for it."""
_READAHEAD_KIB: Final = abi.MAX_REQUEST_BYTES // 1024
_MNT_FORCE: Final = 1
_SETTLE_SECONDS: Final = 5.0
_SETTLE_POLL_SECONDS: Final = 0.0005


class FuseMount:
    """Serves `folder`, from construction to `close` of one mount.

    `record` is called with each access by the threads that serve, so it must be quick; None tells nothing. `exempt`
    says of a thread of the host whether it belongs to the server, and is asked only when that matters. `content` stands
    behind the folder. `owners` says who owns what; `shared` that others change the folder too.

    Raises `OSError` if the folder cannot be opened. The folder is held open: it may be moved meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rules: Rules,
        record: Record | None,
        exempt: Exempt,
        content: Content | None = None,
        owners: Owners | None = None,
        shared: bool = False,
        threads: int | None = None,
        fs_name: str = "hiver",
    ) -> None:
        root_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        caching: Caching = SHARED if shared or content is not None else OWNED
        self._tree = Tree(rules, inode_of(os.fstat(root_fd)))
        self._callers = [Caller() for _ in range(threads or (CONTENT_THREADS if content is not None else 1))]
        self._directories = Directories(self._tree.root, root_fd, self._callers)
        self._judge = Judge(record, exempt)
        core = Core(self._tree, self._directories, self._judge, Attributes(caching, owners or Owners()), content)
        self._dispatcher = Dispatcher(core)
        core.pages_refused = lambda node: self._aside.do(lambda: self._forget_pages(node))
        self._fs_name = fs_name
        self._fd = -1
        self._mountpoint: str | None = None
        self._threads: list[threading.Thread] = []
        self._aside = Aside(self._dispatcher.answer, self._callers)
        self._changing = threading.Lock()
        self._closed = False

    @property
    def alive(self) -> bool:
        """False once the kernel's connection has ended, or before it began."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self, mountpoint: Path) -> None:
        """Mounts and begins to serve. Needs CAP_SYS_ADMIN and /dev/fuse; raises `OSError`."""
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = (
            f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,"
            f"max_read={abi.MAX_REQUEST_BYTES}"
        )
        try:
            linux.mount(self._fs_name, str(mountpoint), "fuse", linux.MS_NOSUID | linux.MS_NODEV, options)
        except OSError:
            os.close(self._fd)
            self._fd = -1
            raise
        self._mountpoint = str(mountpoint)
        self._aside.start(self._fd)
        for number, caller in enumerate(self._callers[:-1]):  # the last one is the thread's that works aside
            thread = threading.Thread(target=self._serve, args=(caller,), name=f"fuse-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        _read_ahead(self._mountpoint)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Until the kernel's connection has ended. False: it has not, in that time."""
        for thread in self._threads:
            thread.join(timeout_seconds)
        return not self.alive

    def set_record(self, record: Record | None) -> None:
        """Whom accesses are told from now on."""
        self._judge.record = record

    def set_rules(self, rules: Rules) -> None:
        """From now on these rules hold. Returns when the kernel has forgotten what the old ones let it show.

        Not to be called by the threads that serve, nor by one that they may wait for.
        """
        with self._changing:
            before = {node.id: node.access for node in self._tree.all_nodes()}
            self._tree.set_rules(rules)
            self._settle()
            nodes = self._tree.all_nodes()
            self._forget([node for node in nodes if self._tree.fresh(node).access != before.get(node.id)])

    def invalidate(self, path: str) -> None:
        """What the kernel knows of `path` (relative to the mount) is no longer so: it asks again, also for pages."""
        node: Node | None = self._tree.root
        for name in filter(None, os.fsencode(path).split(b"/")):
            node = node.children.get(name) if node is not None else None
        if node is not None:
            with self._changing:
                self._forget([node])

    def unmount(self, *, lazy: bool = False) -> None:
        """Takes the mount away. `EBUSY` while something is open, unless `lazy`. Idempotent."""
        mountpoint, self._mountpoint = self._mountpoint, None
        if mountpoint is None:
            return
        try:
            linux.umount(mountpoint, linux.MNT_DETACH if lazy else 0)
        except OSError as error:
            if error.errno == errno.EBUSY:
                self._mountpoint = mountpoint
            if error.errno != errno.EINVAL:
                raise

    def abort(self) -> None:
        """Ends the kernel's connection: whoever uses the mount gets ENOTCONN from now on. Takes the mount away."""
        mountpoint, self._mountpoint = self._mountpoint, None
        if mountpoint is None:
            return
        try:
            linux.umount(mountpoint, _MNT_FORCE | linux.MNT_DETACH)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def close(self) -> None:
        """Aborts what is left and frees everything. Idempotent."""
        if self._closed:
            return
        self.abort()
        self.wait()
        self._aside.close()
        self._closed = True
        if self._fd >= 0:
            os.close(self._fd)
        self._dispatcher.close()
        self._directories.close()

    def _settle(self) -> None:
        """Waits for the answers that may have been judged by the rules of before: the kernel must have them, or it
        would remember them after it was told to forget. One that waits for a backend is not waited for long: what is
        behind a backend is believed for a second only."""
        deadline_monotonic = time.monotonic() + _SETTLE_SECONDS
        for caller in self._callers:
            turn = caller.turn
            while turn % 2 and caller.turn == turn and time.monotonic() < deadline_monotonic:
                time.sleep(_SETTLE_POLL_SECONDS)

    def _forget(self, nodes: list[Node]) -> None:
        for node in nodes:
            parent = node.parent
            if parent is not None and not node.gone:
                flags = abi.EXPIRE_ONLY if self._dispatcher.expires_entries else 0
                body = abi.INVAL_ENTRY_OUT.pack(parent.id, len(node.name), flags) + node.name + b"\0"
                self._notify(abi.NOTIFY_INVAL_ENTRY, body)
            self._forget_pages(node)

    def _forget_pages(self, node: Node) -> None:
        self._notify(abi.NOTIFY_INVAL_INODE, abi.INVAL_INODE_OUT.pack(node.id, 0, 0))

    def _notify(self, code: int, body: bytes) -> None:
        try:
            os.writev(self._fd, (abi.OUT_HEADER.pack(16 + len(body), code, 0), body))
        except OSError as error:
            # ENOENT: it does not know that, so there is nothing to forget. The others: there is no kernel side left.
            if error.errno not in {errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.EBADF}:
                raise

    def _serve(self, caller: Caller) -> None:
        """The loop of one thread, until the kernel's connection ends."""
        try:
            syscalls.own_thread_identity()
            self._loop(caller)
        except BaseException:
            _log.exception("the thread %s of a mount has ended, so the mount does", threading.current_thread().name)
            # Nobody may wait for answers that never come.
            self.abort()
            raise

    def _loop(self, caller: Caller) -> None:
        fd, answer = self._fd, self._dispatcher.answer
        buffer = bytearray(abi.REQUEST_BUFFER_BYTES)
        view, into = memoryview(buffer), (buffer,)
        readv = os.readv
        while True:
            try:
                size = readv(fd, into)
            except OSError as error:
                if error.errno in {errno.ENODEV, errno.ECONNABORTED}:
                    return
                if error.errno in {errno.ENOENT, errno.EAGAIN, errno.EINTR}:
                    # The request was withdrawn before we had it.
                    continue
                raise
            if buffer[abi.OPERATION_BYTE] in SLOW:
                self._aside.serve(view[:size].tobytes())
                continue
            caller.turn += 1
            answered = answer(caller, view[:size])
            if answered is not None:
                send(fd, answered)
            caller.turn += 1


def _read_ahead(mountpoint: str) -> None:
    """Lets the kernel read as much at once as one request holds; its own default is an eighth of that."""
    device = os.stat(mountpoint).st_dev
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        Path(path).write_text(str(_READAHEAD_KIB), encoding="ascii")
    except OSError as error:
        _log.info("the mount reads ahead by the kernel's default: %s", error)
