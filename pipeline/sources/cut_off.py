"""Whether a video file ends before it should: FFmpeg takes a recording that was cut for one that is over.

The containers say how long they are: Matroska in its segment, AVI in its RIFF chunks, MP4 in its boxes. A recorder that
was switched off may not have come to write that; then nobody can tell.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

MATROSKA, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof")


def is_cut_off(path: Path) -> bool:
    """Whether the file is shorter than its container says. False where that says nothing.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        head = file.read(12)
        file.seek(0)
        if head.startswith(MATROSKA):
            return _matroska_end(file) > length
        if head.startswith(b"RIFF"):
            return _riff_end(file, length) > length
        if head[4:8] in BOXES:
            return _boxes_end(file, length) > length
    return False


def _matroska_end(file: BinaryIO) -> int:
    """Where the segment ends; 0 where it is of unknown size."""
    file.seek(len(MATROSKA))
    header = _variable_size(file)
    if header is None:
        return 0
    file.seek(header, os.SEEK_CUR)
    if file.read(len(SEGMENT)) != SEGMENT:
        return 0
    size = _variable_size(file)
    return 0 if size is None else file.tell() + size


def _variable_size(file: BinaryIO) -> int | None:
    """EBML: the zeros before the first one say how many bytes follow; all ones mean unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> more)]) + file.read(more), "big")
    return None if value == (1 << 7 * (more + 1)) - 1 else value


def _riff_end(file: BinaryIO, length: int) -> int:
    """A file of more than a gigabyte has several chunks, one after the other."""
    end = 0
    while end + 8 <= length:
        file.seek(end)
        name, size = struct.unpack("<4sI", file.read(8))
        if name != b"RIFF" or not size:
            break
        end += 8 + size + size % 2
    return end - 1 if end == length + 1 else end  # the last chunk's padding may be left out


def _boxes_end(file: BinaryIO, length: int) -> int:
    end = 0
    while end < length:
        file.seek(end)
        header = file.read(16)
        if len(header) < 8:
            return length + 1  # in the middle of a box's header
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:], "big")
        if size < 8 or not header[4:8].isascii():  # 0: up to the end of the file; else no box
            return end
        end += size
    return end
