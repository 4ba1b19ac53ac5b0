"""What Linux offers to confine a process, through libc: namespaces, Landlock, another user.

Each function tries one measure and returns whether the system allowed it; none raises, because
containers and distributions refuse different ones. Python 3.11 has no `os.unshare`, and no version
has Landlock (https://docs.kernel.org/userspace-api/landlock.html), hence ctypes.
"""

import ctypes
import os

from .processes import SIGKILL

_LIBC = ctypes.CDLL(None, use_errno=True)

# linux/sched.h
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
# linux/prctl.h
_PARENT_DEATH_SIGNAL, _KEEP_CAPABILITIES, _SUBREAPER, _NO_NEW_PRIVILEGES, _AMBIENT = (
    1,
    8,
    36,
    38,
    47,
)
# sys/mount.h
_NO_SETUID, _NO_DEVICES, _RECURSIVE, _PRIVATE = 2, 4, 16384, 1 << 18
# system call numbers, the same on every architecture but Alpha
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_EVERYTHING = 2  # CAP_DAC_READ_SEARCH

# linux/landlock.h: file rights by the version of the interface that introduced them
_WRITE_FILE = 1 << 1
_WRITES = {1: _WRITE_FILE | sum(1 << bit for bit in range(4, 13)), 2: 1 << 13, 3: 1 << 14}
_TCP = 0b11  # bind and connect, version 4
_SCOPES = 0b11  # abstract Unix sockets and signals, version 6


def unshare(flag: int) -> bool:
    """Move this process, or with NEW_PIDS its future children, into a new namespace."""
    return _LIBC.unshare(flag) == 0


def new_user_namespace() -> bool:
    """Enter a user namespace in which this user keeps its number and may create the others."""
    uid, gid = os.geteuid(), os.getegid()
    if not unshare(NEW_USER):
        return False
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def private_folder(folder: str, num_bytes: int) -> bool:
    """Mount a file system of limited size on `folder`, seen by this process's namespace only."""
    if not unshare(NEW_MOUNTS):
        return False
    if _LIBC.mount(None, b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None):
        return False
    options = f"size={num_bytes},nr_inodes=4096,mode=700".encode()
    flags = ctypes.c_ulong(_NO_SETUID | _NO_DEVICES)
    return _LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options) == 0


def _prctl(option: int, *values: int) -> bool:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return _LIBC.prctl(option, *padded) == 0


def adopt_orphans() -> bool:
    """Become the parent of descendants whose own parent ended."""
    return _prctl(_SUBREAPER, 1)


def die_with_parent() -> bool:
    """Have the kernel kill this process when its parent ends."""
    return _prctl(_PARENT_DEATH_SIGNAL, SIGKILL)


def forbid_new_privileges() -> bool:
    """Make setuid programs run without their privileges from here on."""
    return _prctl(_NO_NEW_PRIVILEGES, 1)


def become(uid: int, reads_everything: bool) -> bool:
    """Turn from root into user and group `uid`, without privileges.

    With `reads_everything` it may still read all files, which it needs if the interpreter is in a
    folder that only root may enter.
    """
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        _prctl(_KEEP_CAPABILITIES, int(reads_everything))
        os.setresuid(uid, uid, uid)
    except OSError:
        return False
    if reads_everything:
        bits = 1 << _READ_EVERYTHING
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)(bits, bits, bits, 0, 0, 0)
        _LIBC.capset(header, sets)
        _prctl(_AMBIENT, 2, _READ_EVERYTHING)
    return True


def is_open_to_all(path: str) -> bool:
    """Whether any user may enter every folder above `path`."""
    path = os.path.realpath(path)
    while path != "/":
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & 0o001:
            return False
    return True


def landlock_version() -> int:
    """Version of the kernel's Landlock interface; 0 if it has none."""
    return max(0, _LIBC.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), 1))


def restrict(folder: str) -> list[str]:
    """Forbid writes outside `folder`, TCP, and signals to processes outside, by Landlock.

    Returns those of "files", "tcp" and "signals" that the kernel supports. Needs
    `forbid_new_privileges`.
    """
    version = landlock_version()
    if not version:
        return []
    writes = sum(bits for since, bits in _WRITES.items() if since <= version)
    fields = [writes, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0]
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = (ctypes.c_uint64 * 3)(*fields)
    ruleset = _LIBC.syscall(
        ctypes.c_long(_CREATE_RULESET), rules, ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    if ruleset < 0:
        return []
    try:
        allowed = _allow(ruleset, folder, writes) and _allow(ruleset, os.devnull, _WRITE_FILE)
        done = _LIBC.syscall(ctypes.c_long(_RESTRICT_SELF), ruleset, ctypes.c_uint32(0)) == 0
    finally:
        os.close(ruleset)
    names = ["files", *(["tcp"] if fields[1] else []), *(["signals"] if fields[2] else [])]
    return names if allowed and done else []


class _Beneath(ctypes.Structure):
    """Struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def _allow(ruleset: int, path: str, rights: int) -> bool:
    """Except a file or a folder with all it contains from a ruleset."""
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = _Beneath(rights, opened)
        flags = ctypes.c_uint32(0)
        return not _LIBC.syscall(ctypes.c_long(_ADD_RULE), ruleset, 1, ctypes.byref(rule), flags)
    finally:
        os.close(opened)
