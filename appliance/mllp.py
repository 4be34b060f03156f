"""MLLP framing (HL7 Transport Specification: MLLP, Release 1): ``VT message FS CR``."""

from __future__ import annotations

VT, FS, CR = b"\x0b", b"\x1c", b"\r"


class FramingError(ValueError):
    """What cannot be an MLLP block."""


def frame(message: str) -> bytes:
    """The message as one MLLP block in UTF-8.

    Raises:
        FramingError: it holds VT or FS, which would end the block early, or cannot be written in UTF-8.
    """
    try:
        content = message.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FramingError(f"the message cannot be written in UTF-8: {error.reason}") from error
    if VT in content or FS in content:
        raise FramingError("the message holds a VT or FS character, which MLLP uses to mark its blocks")
    return VT + content + FS + CR


class Deframer:
    """Takes bytes as they arrive, in any pieces, and gives back the content of whole MLLP blocks.

    It is lenient where real peers are careless: a block ends at FS even if the CR after it is missing, bytes between
    blocks are skipped, and a VT inside a block starts it anew (its sender began again).

    Args:
        maximum: bytes of content that one block may have.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._block: bytearray | None = None
        self.skipped = 0
        """Bytes outside any block, other than CR and LF, and bytes of blocks begun anew."""

    @property
    def begun(self) -> bool:
        """A block has begun and not ended."""
        return self._block is not None

    def feed(self, data: bytes) -> list[bytes]:
        """The blocks that ``data`` completes, without their marks.

        Raises:
            FramingError: a block is longer than ``maximum``; the stream cannot be used any more.
        """
        blocks: list[bytes] = []
        while data:
            if self._block is None:
                outside, begin, data = data.partition(VT)
                self.skipped += len(outside.translate(None, b"\r\n"))
                if begin:
                    self._block = bytearray()
                continue
            inside, end, rest = data.partition(FS)
            before, again, after = inside.rpartition(VT)
            if again:
                self.skipped += len(self._block) + len(before.replace(VT, b""))
                self._block.clear()
            self._block += after
            if len(self._block) > self._maximum:
                raise FramingError(f"a block of more than {self._maximum} bytes")
            if end:
                blocks.append(bytes(self._block))
                self._block = None
            data = rest
        return blocks
