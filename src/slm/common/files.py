"""Which files are trusted: none that another account on this machine owns or can write.

The rules also apply to root, who can read everything. Our own files and folders must belong to us
and be writable by no one else. Files that are only read may also belong to root. No other account
may be able to replace anything on the path. Checks apply to the opened file, never to a name. Does
not know what the files are for.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

from slm.errors import ConfigurationError

MAX_SECRET_BYTES: Final = 64 * 1024
"""Anything larger is not a token or a key."""

MAX_PEM_BYTES: Final = 4 * 1024 * 1024

_POSIX: Final = os.name == "posix"
_DIRECTORY: Final = (
    getattr(os, "O_PATH", os.O_RDONLY)
    | getattr(os, "O_DIRECTORY", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
_FILE: Final = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_HANDED_DOWN: Final = re.compile(r"/dev/stdin|/dev/fd/([0-9]+)|/proc/self/fd/([0-9]+)")
_MAX_LINKS: Final = 40


class NotTrusted(ConfigurationError):
    """Another account owns or can write a file or folder; the message says what to do."""


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder for us alone, with missing parents, or accept one that is already ours.

    Raises:
        NotTrusted: it, or one on its path, belongs to another account or can be written by one.
        OSError: it cannot be created; NotADirectoryError if it is not a folder.
    """
    if not _POSIX:
        Path(path).mkdir(parents=True, exist_ok=True)
        return
    with _found(path, make=True) as (parent, name, shown):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        folder = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            _judge_own_folder(os.fstat(folder), shown)
        finally:
            os.close(folder)


def check_own_folder(path: str | os.PathLike[str]) -> None:
    """Check that a folder is ours alone.

    Raises:
        NotTrusted: it, or one on its path, belongs to another account or can be written by one.
        OSError: it does not exist or cannot be inspected.
    """
    if not _POSIX:
        return
    with _found(path) as (parent, name, shown):
        folder = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            _judge_own_folder(os.fstat(folder), shown)
        finally:
            os.close(folder)


def read_own(path: str | os.PathLike[str], limit: int = MAX_SECRET_BYTES) -> tuple[bytes, int]:
    """Return the content and mode of a file that must be ours alone, such as `admin.token`.

    Raises:
        NotTrusted: it belongs to another account, can be written by one, or is not a regular file.
        OSError: it does not exist or cannot be read.
    """
    return _read(path, limit, may_be_roots=False)


def read_given(path: str | os.PathLike[str], limit: int = MAX_SECRET_BYTES) -> bytes:
    """Return the content of a file that the operator names and we only read, such as a token.

    It may belong to root, as files mounted by an orchestrator do. A descriptor inherited by this
    process (`/dev/fd/63`) is read as it is.

    Raises:
        NotTrusted: it belongs to another account, can be written by one, or is not a regular file.
        OSError: it does not exist or cannot be read.
    """
    handed = _HANDED_DOWN.fullmatch(os.fspath(path))
    if handed is not None and _POSIX:
        with os.fdopen(os.dup(int(handed[1] or handed[2] or 0)), "rb") as file:
            return _bounded(file.read(limit + 1), limit, str(path))
    return _read(path, limit, may_be_roots=True)[0]


def check_given(path: str | os.PathLike[str], limit: int = MAX_PEM_BYTES) -> None:
    """Check a file that a library opens by name and only reads, such as a certificate.

    Raises:
        NotTrusted: it belongs to another account, can be written by one, or is not a regular file.
        OSError: it does not exist or cannot be read.
    """
    with _opened(path, may_be_roots=True) as (_, status, shown):
        if status.st_size > limit:
            _refuse(f"{shown} has more than {limit} bytes: this cannot be the file that was meant")


def check_own_file(path: str | os.PathLike[str]) -> None:
    """Check that a file of any size, which a library opens by name, is ours alone.

    Raises:
        NotTrusted: it belongs to another account, can be written by one, or is not a regular file.
        OSError: it does not exist or cannot be read.
    """
    with _opened(path, may_be_roots=False):
        pass


# --- internals ---


def _read(path: str | os.PathLike[str], limit: int, *, may_be_roots: bool) -> tuple[bytes, int]:
    with _opened(path, may_be_roots=may_be_roots) as (descriptor, status, shown):
        with os.fdopen(os.dup(descriptor), "rb") as file:
            content = file.read(limit + 1)
        return _bounded(content, limit, shown), stat.S_IMODE(status.st_mode)


def _bounded(content: bytes, limit: int, shown: str) -> bytes:
    if len(content) > limit:
        _refuse(f"{shown} has more than {limit} bytes: this cannot be the file that was meant")
    return content


@contextlib.contextmanager
def _opened(
    path: str | os.PathLike[str], *, may_be_roots: bool
) -> Iterator[tuple[int, os.stat_result, str]]:
    """Open a regular file and check the opened file."""
    if not _POSIX:
        descriptor = os.open(path, _FILE)
        try:
            yield descriptor, os.fstat(descriptor), str(path)
        finally:
            os.close(descriptor)
        return
    with _found(path) as (parent, name, shown):
        # Checked before opening, because opening a device may have an effect.
        if not stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            _refuse(f"{shown} is not an ordinary file")
        descriptor = os.open(name, _FILE, dir_fd=parent)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                _refuse(f"{shown} is not an ordinary file")
            us = os.geteuid()
            if status.st_uid != us and not (may_be_roots and status.st_uid == 0):
                _refuse_owner(shown, status.st_uid)
            if status.st_mode & _WRITABLE_BY_OTHERS:
                mode = "go-w" if may_be_roots else "0600"
                _refuse(f"{shown} can be written by another user: chmod {mode} it")
            if status.st_nlink > 1 and os.fstat(parent).st_mode & _WRITABLE_BY_OTHERS:
                # In a folder such as /tmp, anyone can create a hard link to one of our files.
                _refuse(f"{shown} has another name elsewhere (a hard link): copy it to a new file")
            yield descriptor, status, shown
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _found(path: str | os.PathLike[str], *, make: bool = False) -> Iterator[tuple[int, str, str]]:
    """Yield the open parent folder, the path's last component, and the path to display.

    Opens and checks each folder on the path, and follows a link only if it is ours or root's, so no
    one can replace what was checked.
    """
    # Not normalised: after a link, `..` is not what the text suggests.
    shown = str(Path.cwd() / path)
    parts = deque(part for part in shown.split("/") if part)
    at, links = Path("/"), 0
    folder = os.open("/", _DIRECTORY)
    try:
        while parts:
            name = parts.popleft()
            here = at / name
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                if not parts:
                    break
                if not make:
                    raise
                os.mkdir(name, 0o700, dir_fd=folder)
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if status.st_uid not in (os.geteuid(), 0) or links > _MAX_LINKS:
                    _refuse(f"{here} is a link that belongs to another account: name the real path")
                target = os.readlink(name, dir_fd=folder)
                parts.extendleft(reversed([part for part in target.split("/") if part]))
                if target.startswith("/"):
                    at, folder = Path("/"), _exchange(folder, os.open("/", _DIRECTORY))
                continue
            if not parts:
                break
            folder = _exchange(folder, os.open(name, _DIRECTORY, dir_fd=folder))
            at = here
            _judge_on_the_way(os.fstat(folder), str(at))
        else:
            name = "."
        yield folder, name, shown
    finally:
        os.close(folder)


def _exchange(old: int, new: int) -> int:
    os.close(old)
    return new


def _judge_own_folder(status: os.stat_result, shown: str) -> None:
    if status.st_uid != os.geteuid():
        if status.st_uid == 0 and status.st_mode & stat.S_IWGRP and _is_our_group(status.st_gid):
            _refuse(
                f"{shown} belongs to root: name a folder in it, such as {shown}/slm, which is then"
                " made for this account alone"
            )
        _refuse_owner(shown, status.st_uid)
    if status.st_mode & _WRITABLE_BY_OTHERS:
        _refuse(
            f"{shown} can be written by another user, who may have put something into it: look at"
            " what is in it, then chmod go-w it"
        )


def _judge_on_the_way(status: os.stat_result, shown: str) -> None:
    """Accept a folder with entries that only we and root can replace."""
    if status.st_uid not in (os.geteuid(), 0):
        _refuse_owner(shown, status.st_uid)
    if status.st_mode & stat.S_ISVTX or not status.st_mode & _WRITABLE_BY_OTHERS:
        return
    if status.st_mode & stat.S_IWOTH:
        _refuse(f"{shown} can be written by another user: chmod o-w it, or use another folder")
    # Root's with our group, such as a Kubernetes volume; or ours with a private group, as with
    # umask 002.
    ours = _is_our_group(status.st_gid) if status.st_uid == 0 else _is_private(status.st_gid)
    if not ours:
        _refuse(f"{shown} can be written by another user: chmod g-w it, or use another folder")


def _is_our_group(gid: int) -> bool:
    return gid in (os.getegid(), *os.getgroups())


def _is_private(gid: int) -> bool:
    """Whether we are the group's only member, as in the group created for each user."""
    import grp
    import pwd

    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
        members = set(grp.getgrgid(gid).gr_mem)
    except KeyError:
        return False
    return members <= {name} and all(
        user.pw_name == name for user in pwd.getpwall() if user.pw_gid == gid
    )


def _refuse_owner(shown: str, owner: int) -> NoReturn:
    _refuse(
        f"{shown} belongs to another account (user id {owner}): use another place, or chown it to"
        f" the account that runs this (user id {os.geteuid()}) if what is there can be trusted"
    )


def _refuse(why: str) -> NoReturn:
    raise NotTrusted(why)
