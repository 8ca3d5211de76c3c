"""Large pages: which memory they are asked for, and that asking harms nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.huge_pages import ENABLED, HUGE_BYTES, _anonymous, use_huge_pages

MAPS = """\
00400000-00401000 rw-p 00000000 00:00 0
555500000000-555500a00000 rw-p 00000000 00:00 0          [heap]
7f0000100000-7f0000700000 rw-p 00000000 00:00 0
7f0010000000-7f0010400000 r--p 00000000 00:00 0
7f0020000000-7f0020400000 rw-p 00000000 08:01 77         /a file with spaces
7f0030000000-7f0030400000 rw-s 00000000 00:00 0
7ffd00000000-7ffd00400000 rw-p 00000000 00:00 0          [stack]
"""


def test_whole_large_pages_of_anonymous_memory() -> None:
    assert list(_anonymous(MAPS)) == [
        (0x555500000000, 0x555500A00000),
        (0x7F0000200000, 0x7F0000600000),
    ]


def test_another_system_is_left_alone(tmp_path: Path) -> None:
    assert use_huge_pages(tmp_path / "maps") == 0


@pytest.mark.skipif(not ENABLED.is_file(), reason="asks a Linux that has large pages")
def test_an_administrators_never_is_heeded(tmp_path: Path) -> None:
    held = np.ones(4 * HUGE_BYTES, dtype=np.uint8)
    enabled = tmp_path / "enabled"
    enabled.write_text("always madvise [never]\n")
    assert use_huge_pages(enabled=enabled) == 0
    enabled.write_text("always [madvise] never\n")
    assert use_huge_pages(enabled=enabled) >= held.nbytes - 2 * HUGE_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_memory_keeps_what_it_holds() -> None:
    held = np.arange(4 * HUGE_BYTES, dtype=np.uint32)
    asked = use_huge_pages()
    assert asked == 0 or asked >= HUGE_BYTES
    np.testing.assert_array_equal(held, np.arange(4 * HUGE_BYTES, dtype=np.uint32))
