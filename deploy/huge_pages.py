"""Large pages for the memory that an engine's weights lie in.

A decode step reads every weight once: with pages of 4 KiB a good part of that time goes into
finding them. Linux merges them on request (`madvise` mode, which most distributions have).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

HUGE_BYTES = 2**21
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
MAPS = Path("/proc/self/maps")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages(maps: Path = MAPS, enabled: Path = ENABLED) -> int:
    """Ask for large pages in all private anonymous memory of this process; returns bytes asked for.

    No result depends on it: where the system cannot, or its administrator says never, nothing
    happens. Resident memory may rise, because a large page is resident as a whole.

    Args:
        enabled: the kernel's setting, such as "always [madvise] never".
    """
    if not maps.is_file() or _is_off(enabled):
        return 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    asked = 0
    for start, end in _anonymous(maps.read_text(encoding="ascii", errors="replace")):
        if libc.madvise(start, end - start, MADV_HUGEPAGE) == 0:
            libc.madvise(start, end - start, MADV_COLLAPSE)  # Linux 6.1; before: khugepaged, later
            asked += end - start
    return asked


def _is_off(enabled: Path) -> bool:
    """MADV_COLLAPSE does not heed this setting by itself."""
    return enabled.is_file() and "[never]" in enabled.read_text(encoding="ascii")


def _anonymous(maps: str) -> Iterator[tuple[int, int]]:
    """Whole large pages of the readable and writable mappings without a file."""
    for line in maps.splitlines():
        span, mode, _, _, inode, *name = line.split(maxsplit=5)
        if mode != "rw-p" or inode != "0" or (name and name[0] != "[heap]"):
            continue
        start, end = (int(at, 16) for at in span.split("-"))
        start = -(-start // HUGE_BYTES) * HUGE_BYTES
        end = end // HUGE_BYTES * HUGE_BYTES
        if end > start:
            yield start, end
