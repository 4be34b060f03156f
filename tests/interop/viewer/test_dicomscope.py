"""A presentation state in DICOMscope, OFFIS's viewer of them: window, outlines and text as they stand on its screen.

It runs on a screen that nobody sees (Xvfb), driven by mouse and keys (xdotool); what is looked at is that screen.
"""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from appliance.operations.leash import Leashed
from dicom_io.objects.common import part10
from tests.findings_support import ct_series, rendered, verdict_on
from tests.interop.box import wait_for
from tests.peers import program

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(240)]

WIDTH, HEIGHT = 1280, 1000
CORNER = (7, 68)
"""Where the image begins on the screen, (column, row)."""
SCALE = 6.727
"""Pixels of the screen for one of the image, which is shown as high as there is room."""
DATABASE = "Directory = /var/lib/dcmtk/db/READWRITE"


class Screen:
    """An X server without a screen; its frame buffer is a file (XWD, big endian header)."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        command = [
            program("Xvfb"),
            "-displayfd",
            str(writing),
            "-screen",
            "0",
            f"{WIDTH}x{HEIGHT}x24",
            "-fbdir",
            folder,
        ]
        log = stack.enter_context((folder / "xvfb.log").open("wb"))
        process = subprocess.Popen(
            [str(one) for one in command], pass_fds=[writing], stdout=log, stderr=log, start_new_session=True
        )
        os.close(writing)
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        self.environment = {**os.environ, "DISPLAY": f":{os.read(reading, 16).decode().strip()}"}
        self._buffer = folder / "Xvfb_screen0"

    def look(self) -> NDArray[np.uint8]:
        """What is on it: (rows, columns), grey."""
        data = self._buffer.read_bytes()
        words = struct.unpack(">25I", data[:100])
        start, line = words[0] + words[19] * 12, words[12]
        pixels = np.frombuffer(data, np.uint8, line * HEIGHT, start).reshape(HEIGHT, line // 4, 4)
        return np.asarray(pixels[:, :WIDTH, :3].mean(axis=2).astype(np.uint8))

    def does(self, *actions: object) -> None:
        subprocess.run(
            [program("xdotool"), *map(str, actions)], env=self.environment, check=True, capture_output=True, timeout=30
        )

    def changes(self, act: Callable[[], None]) -> None:
        """Act, and wait until something else is shown and stays."""
        before = self.look()
        act()
        last = [before]

        def settled() -> bool | None:
            now = self.look()
            same = np.array_equal(now, last[0])
            last[0] = now
            time.sleep(0.3)
            return True if same and not np.array_equal(now, before) else None

        wait_for(settled, 60.0, lambda: "nothing changes on the screen")


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[tuple[NDArray[np.uint8], list[NDArray[np.float64]]]]:
    """The screen with the first presentation state of a study, and the outlines in it."""
    scope, java = Path("/usr/share/java/DICOMscope.jar"), program("java")
    if not scope.is_file():
        pytest.skip("dicomscope is not installed")
    (tmp_path / "series").mkdir()
    (tmp_path / "database").mkdir()
    series = ct_series(tmp_path / "series")
    verdict = replace(verdict_on(series), key_slabs=(1,))
    slab = verdict.slabs[1]
    state = tmp_path / "presentation.dcm"
    state.write_bytes(part10(rendered(series, verdict, "presentation.1")))
    index = [program("dcmqridx"), str(tmp_path / "database"), str(series.source(slab.sop_instance_uid)), str(state)]
    subprocess.run(index, check=True, capture_output=True, timeout=60)
    settings = Path("/etc/dcmtk/DICOMscope.cfg").read_text(encoding="latin-1")
    assert DATABASE in settings
    settings = settings.replace(DATABASE, f"Directory = {tmp_path / 'database'}")
    lines = [line for line in settings.splitlines() if not line.startswith(("Receiver =", "Sender =", "Server ="))]
    (tmp_path / "DICOMscope.cfg").write_text("\n".join(lines) + "\n", encoding="latin-1")
    with ExitStack() as stack:
        screen = Screen(tmp_path, stack)
        # It reads DICOMscope.cfg from the folder that it is started in.
        libraries = "-Djava.library.path=/usr/lib/x86_64-linux-gnu/jni"
        start = ["env", "-C", tmp_path, f"DISPLAY={screen.environment['DISPLAY']}", java, libraries, "-jar", scope]
        viewer = Leashed(start, log=tmp_path / "dicomscope.log", grace=2.0)
        stack.callback(viewer.stop)
        dark = lambda: True if viewer.running and (screen.look()[:20] > 200).mean() > 0.5 else None  # noqa: E731
        wait_for(dark, 60.0, lambda: viewer.tail(20))
        # Its tree is there, with the name of the study.
        wait_for(
            lambda: True if (screen.look()[90:102, 80:500] < 100).sum() > 300 else None, 60.0, lambda: viewer.tail(20)
        )
        # Below the study lie the images and the presentation states; below these the one.
        screen.changes(lambda: screen.does("mousemove", 200, 96, "click", 1))
        for keys in (["Right"], ["Down"], ["Down"], ["Right"]):
            screen.changes(lambda keys=keys: screen.does("key", *keys))  # type: ignore[misc]
        screen.changes(lambda: screen.does("mousemove", 200, 144, "click", "--repeat", 2, "--delay", 80, 1))
        picture = screen.look()
    cv2.imwrite(str(tmp_path / "dicomscope.png"), picture)
    yield picture, [np.array(one) for one in slab.outlines]


def drawn(white: NDArray[np.uint8], outline: NDArray[np.float64], shift: tuple[int, int]) -> float:
    """The share of points along an outline that are white on the screen, if it were so many pixels further."""
    closed = np.concatenate([outline, outline[:1]])
    steps = np.linspace(0, 1, 40, endpoint=False)[:, None]
    points = np.concatenate([a + steps * (b - a) for a, b in pairwise(closed)]) + 0.5 + shift
    columns, rows = np.rint(points * SCALE + CORNER).astype(int).T
    return float(white[rows, columns].mean())


def test_it_shows_the_window_the_outlines_and_the_text_on_air(
    shown: tuple[NDArray[np.uint8], list[NDArray[np.float64]]],
) -> None:
    picture, outlines = shown
    # 35 and 70 HU in the window 40/80 (PS3.3 C.11.2.1.2.1), on a display that is not calibrated.
    for rows, columns, hu in ((slice(60, 70), slice(76, 84), 35), (slice(60, 70), slice(50, 60), 70)):
        top, bottom = (round(row * SCALE) + CORNER[1] for row in (rows.start, rows.stop))
        left, right = (round(column * SCALE) + CORNER[0] for column in (columns.start, columns.stop))
        assert abs(float(np.median(picture[top:bottom, left:right])) - ((hu - 39.5) / 79 + 0.5) * 255) < 4
    white = (picture > 250).astype(np.uint8)
    for outline in outlines:
        found = {(x, y): drawn(white, outline, (x, y)) for x in range(-4, 5) for y in range(-4, 5)}
        best = max(found, key=lambda one: found[one])
        # DICOMscope 3.6.0 draws two pixels up and left of where PS3.3 C.10.5.1.2 has a point.
        assert found[best] > 0.95 and max(map(abs, best)) <= 2, (best, found[best])
        assert found[0, 0] < 0.9
    text = picture[CORNER[1] + 2 : CORNER[1] + 105, CORNER[0] + 2 : CORNER[0] + 220]
    assert (text > 200).sum() > 1000  # some ninety letters
    assert np.median(text) < 10
