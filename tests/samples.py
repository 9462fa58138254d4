"""Small files whose type is plain from their first bytes, of any length and content."""

import random

PNG_START = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000100000001008020000009091683600000000")


def image(size_bytes: int = 1_000, seed: int = 0) -> bytes:
    """`size_bytes` that are a PNG by their start; different seeds differ."""
    return (PNG_START + random.Random(seed).randbytes(max(0, size_bytes - len(PNG_START))))[:size_bytes]


def video(size_bytes: int = 1_000, seed: int = 0) -> bytes:
    """`size_bytes` that are an MP4 by their start."""
    start = bytes.fromhex("0000001c6674797069736f6d0000020069736f6d69736f326d703431") + b"\x00\x00\x00\x08free"
    return (start + random.Random(seed).randbytes(max(0, size_bytes - len(start))))[:size_bytes]
