"""What a scanner makes of a head: planes, thickness, blur, noise, beam hardening, streaks, motion, the head-holder.

Nothing is reconstructed from projections. Each effect is put on the slices as it is known to look: its shape follows
from the slice's own bone and metal, its strength from the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .anatomy import Head
from .fields import Volume, at_places, mix, soft
from .haemorrhage import SUBTYPES

AIR_HU = -1000.0
PADDING_HU = -2000.0
"""What is outside the circle of a padded field; no tissue has it, and each vendor stores it as something else."""
COVERED = 0.4
"""A voxel of a slice is blood where blood fills at least this part of it: less is not seen."""
METAL_HU = 2500.0
_COARSE_MM = 2.0
"""Beam hardening and streaks are smooth: they are made on pixels of about this size."""
_PLANES_MM = 1.6
"""How far apart, about, the planes lie that a slice is averaged from; each takes in 1 mm of the grid on both sides."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A family of reconstruction kernels.

    Attributes:
        blur_mm: standard deviation of its point spread.
        overshoot: how much it sharpens edges.
        noise: factor on the noise.
        peak_per_mm: spatial frequency about which noise is strongest.
        slow: share of the noise that is blotchy, as iterative reconstruction leaves it.
    """

    blur_mm: float
    overshoot: float
    noise: float
    peak_per_mm: float
    slow: float


KERNELS = {
    "soft": Kernel(0.75, 0.0, 0.75, 0.22, 0.15),
    "standard": Kernel(0.55, 0.1, 1.0, 0.30, 0.1),
    "sharp": Kernel(0.40, 0.45, 1.7, 0.45, 0.05),
    "iterative": Kernel(0.50, 0.3, 0.7, 0.14, 0.5),
    "edge": Kernel(0.34, 0.7, 1.3, 0.6, 0.0),
}
"""Training draws the first three; the last two are kept for evaluation."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a head is scanned.

    Attributes:
        vendor: a name in `vendors.VENDORS`, or "" for the plain phantom.
        kernel: a name in `KERNELS`.
        kvp, mas: tube voltage in kV and tube current times time in mAs.
        field_mm: edge of the reconstructed field.
        size: rows and columns.
        thickness_mm, step_mm: of a slice, and from one to the next along their normal.
        low_mm, high_mm: what is scanned along the table, about the anterior commissure.
        tilt_deg: of the gantry about the patient's left-right axis; above 0 the front of a slice is nearer the crown.
        pitch_deg, roll_deg, yaw_deg: how the head lies.
        centre_mm: where its middle lies in the field, (x, y).
        noise_hu: standard deviation in the middle of the head.
        hardening_hu: of the dark band for each mm of bone on both sides of it.
        cupping_hu: brightening beside thick bone that is left by the correction.
        shift_hu, gain: error of calibration.
        motion_mm: how far the head moved in the slices that it moved in; 0: it lay still.
        holder_mm: radius of the head-holder's arc; 0 where none is in the field.
        padded: whether what is outside the circle of the field is padding.
    """

    vendor: str
    kernel: str
    kvp: float
    mas: float
    field_mm: float
    size: int
    thickness_mm: float
    step_mm: float
    low_mm: float
    high_mm: float
    tilt_deg: float
    pitch_deg: float
    roll_deg: float
    yaw_deg: float
    centre_mm: tuple[float, float]
    noise_hu: float
    hardening_hu: float
    cupping_hu: float
    shift_hu: float
    gain: float
    motion_mm: float
    holder_mm: float
    padded: bool

    @property
    def pixel_mm(self) -> float:
        """Edge of a pixel."""
        return self.field_mm / self.size


@dataclass(frozen=True, slots=True)
class Scan:
    """Slices, foot to head.

    Attributes:
        hu: (slices, rows, columns) float32; `PADDING_HU` where there is padding.
        mask: (slices, rows, columns) uint8: 0 none, else 1 + the position in `SUBTYPES`.
        volume_ml: what counts of the blood within the slices, by subtype; a subtype that no voxel of the mask holds is
            left out.
        positions: of each slice's first pixel in the patient, mm (PS3.3 C.7.6.2.1.1).
        orientation: row and column cosines.
    """

    hu: Volume
    mask: NDArray[np.uint8]
    volume_ml: dict[str, float]
    positions: tuple[tuple[float, float, float], ...]
    orientation: tuple[float, float, float, float, float, float]


def draw(
    rng: np.random.Generator,
    *,
    kernels: tuple[str, ...],
    vendor: str = "",
    thickness_mm: float,
    size: int = 512,
    tilt_deg: float | None = None,
    padded: bool = False,
) -> Protocol:
    """A plausible protocol.

    Args:
        kernels: names in `KERNELS` to choose from.
        tilt_deg: of the gantry; drawn where it is not given.
    """
    uniform, normal = rng.uniform, rng.normal
    kernel = str(rng.choice(kernels))
    kvp = float(rng.choice((100, 120, 120, 120, 130, 140)))
    mas = float(np.round(uniform(160, 420)))
    thin = float(np.clip(np.sqrt(5 / thickness_mm), 0.85, 2.6))  # thin slices are given more dose than they would need
    noise = 2.9 * thin * KERNELS[kernel].noise * np.sqrt(300 / mas) * (120 / kvp) ** 1.3 * uniform(0.75, 1.3)
    # Mostly the front nearer the feet: so the shipped weights were trained; with the pitch it comes to both ways.
    drawn_tilt = -float(uniform(-8, 24)) if rng.random() < 0.35 else 0.0
    tilt = drawn_tilt if tilt_deg is None else tilt_deg
    moves = rng.random() < 0.07
    return Protocol(
        vendor=vendor,
        kernel=kernel,
        kvp=kvp,
        mas=mas,
        field_mm=round(float(uniform(215, 256)), 1),
        size=size,
        thickness_mm=thickness_mm,
        step_mm=thickness_mm * float(rng.choice((1.0, 1.0, 1.0, 1.0, 0.8))),
        low_mm=float(uniform(-74, -54)),
        high_mm=98.0,
        tilt_deg=round(tilt, 1),
        pitch_deg=float(uniform(-16, 13)),
        roll_deg=float(normal(0, 3.5)),
        yaw_deg=float(normal(0, 6)),
        centre_mm=(float(normal(0, 5)), float(normal(0, 6))),
        noise_hu=float(np.clip(noise, 1.2, 16)),
        hardening_hu=float(uniform(0.2, 1.5)),
        cupping_hu=float(uniform(-2, 9) if rng.random() < 0.6 else uniform(5, 20)),
        shift_hu=float(normal(0, 1.5)),
        gain=float(normal(1, 0.012)),
        motion_mm=float(uniform(0.8, 5)) if moves else 0.0,
        holder_mm=float(uniform(105, 135)) if rng.random() < 0.85 else 0.0,
        padded=padded,
    )


def scan(rng: np.random.Generator, head: Head, truth: NDArray[np.uint8], protocol: Protocol) -> Scan:
    """Scan a head.

    Args:
        rng: noise and bands are drawn from it.
        head: not changed.
        truth: uint8 on the head's grid: 0 none, else 1 + the position in `SUBTYPES`.
        protocol: how.
    """
    size = protocol.size
    # The head knows no more than 1 mm: it is cut on pixels of about that size, and enlarged.
    coarse = min(size, round(protocol.field_mm / 0.95))
    cut = _Cut.of(protocol, head, coarse)
    hu = _resized(cut.mean(head.hu, AIR_HU, slice(0, cut.count)), size, cv2.INTER_CUBIC)
    mask = np.zeros((cut.count, size, size), dtype=np.uint8)
    most = np.zeros_like(hu)
    volumes: dict[str, float] = {}
    voxel_ml = protocol.pixel_mm**2 * protocol.step_mm / 1000
    for kind, name in enumerate(SUBTYPES, 1):
        blood = truth == kind
        if not blood.any():
            continue
        part = cut.slices_of(blood)
        covered = _resized(cut.mean(blood.astype(np.float32), 0.0, part), size, cv2.INTER_LINEAR)
        here = (covered >= COVERED) & (covered > most[part])
        mask[part][here] = kind
        most[part][here] = covered[here]
        volumes[name] = float(covered.sum(dtype=np.float64)) * voxel_ml
    volumes = {name: ml for name, ml in volumes.items() if (mask == SUBTYPES.index(name) + 1).any()}

    moving = range(0)
    if protocol.motion_mm:
        length = int(rng.integers(1, max(2, round(25 / protocol.step_mm))))
        start = int(rng.integers(0, max(1, cut.count - length)))
        moving = range(start, start + length)
    filters = _spectrum(protocol)
    outside = _outside(protocol)
    for index in range(cut.count):
        _expose(rng, hu[index], protocol, filters, index in moving)
        if outside is not None:
            hu[index][outside] = PADDING_HU
    return Scan(hu, mask, volumes, cut.positions(size, protocol.pixel_mm), cut.orientation)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where the slices' pixels lie in a head: the first pixel, and the way to the next slice, row and column, in mm."""

    count: int
    size: int
    first: NDArray[np.float64]
    step: NDArray[np.float64]
    down: NDArray[np.float64]
    across: NDArray[np.float64]
    offsets: NDArray[np.float64]  # (planes, 3): the planes that a slice is averaged from
    to_head: NDArray[np.float64]
    centre: NDArray[np.float64]
    origin_mm: tuple[float, float, float]

    @classmethod
    def of(cls, protocol: Protocol, head: Head, size: int) -> _Cut:
        """The slices of a protocol on that many rows and columns."""
        pixel = protocol.field_mm / size
        tilt = np.deg2rad(protocol.tilt_deg)
        cosine, sine = float(np.cos(tilt)), float(np.sin(tilt))
        along = protocol.step_mm / cosine  # the table moves along z, whatever the gantry does
        across, down = np.array([pixel, 0, 0]), np.array([0, cosine, -sine]) * pixel
        planes = max(1, round(protocol.thickness_mm / _PLANES_MM))
        places = (np.arange(planes) - (planes - 1) / 2) * protocol.thickness_mm / planes
        return cls(
            count=max(1, int((protocol.high_mm - protocol.low_mm) / along)),
            size=size,
            first=np.array([0, 0, protocol.low_mm + along / 2]) - (size - 1) / 2 * (across + down),
            step=np.array([0, 0, along]),
            down=down,
            across=across,
            offsets=places[:, None] * np.array([0, sine, cosine]),
            to_head=_rotation(protocol).T,
            centre=np.array([*protocol.centre_mm, 0.0]),
            origin_mm=head.origin_mm,
        )

    @property
    def orientation(self) -> tuple[float, float, float, float, float, float]:
        """Row and column cosines (PS3.3 C.7.6.2.1.1)."""
        _, cosine, sine = self.down / np.linalg.norm(self.down)
        return 1.0, 0.0, 0.0, 0.0, round(float(cosine), 8), round(float(sine), 8)

    def positions(self, size: int, pixel_mm: float) -> tuple[tuple[float, float, float], ...]:
        """Of the first pixel of each slice, where the same field has that many smaller pixels."""
        middle = self.first + (self.size - 1) / 2 * (self.across + self.down)
        ways = (way / np.linalg.norm(way) * pixel_mm for way in (self.across, self.down))
        corner = middle - (size - 1) / 2 * sum(ways)
        places = (corner + index * self.step for index in range(self.count))
        return tuple((round(float(x), 4), round(float(y), 4), round(float(z), 4)) for x, y, z in places)

    def mean(self, volume: Volume, outside: float, part: slice) -> Volume:
        """A volume of the head in some of the slices, averaged over their thickness."""
        total = np.zeros((part.stop - part.start, self.size, self.size), dtype=np.float32)
        down, across = ((self.to_head @ way)[::-1] for way in (self.down, self.across))
        number = np.arange(self.size, dtype=np.float32)
        grids = [
            np.add.outer(number * np.float32(by_row), number * np.float32(by_column))
            for by_row, by_column in zip(down, across, strict=True)
        ]
        for index, plane in enumerate(total, part.start):
            for offset in self.offsets:
                at = self.first + index * self.step + offset - self.centre
                start = (self.to_head @ at)[::-1] - self.origin_mm
                places = [grid + np.float32(first) for grid, first in zip(grids, start, strict=True)]
                plane += at_places(volume, places, outside)
        total *= np.float32(1 / len(self.offsets))
        return total

    def slices_of(self, blood: NDArray[np.bool_]) -> slice:
        """The slices that the true voxels of a volume of the head may reach."""
        ends = [np.flatnonzero(blood.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3)]
        corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3) + self.origin_mm
        normal = np.cross(self.across, self.down) / np.linalg.norm(np.cross(self.across, self.down))
        heights = (corners[:, ::-1] @ self.to_head + self.centre - self.first) @ normal / (self.step @ normal)
        reach = 2 + np.ptp(self.offsets @ normal) / (self.step @ normal)
        low, high = (int(np.clip(h, 0, self.count)) for h in (heights.min() - reach, heights.max() + reach + 1))
        return slice(low, max(high, low))


def _resized(slices: Volume, size: int, how: int) -> Volume:
    if slices.shape[1] == size or not len(slices):
        return slices if slices.shape[1] == size else np.zeros((0, size, size), dtype=np.float32)
    return np.stack([np.asarray(cv2.resize(one, (size, size), interpolation=how), np.float32) for one in slices])


def _rotation(protocol: Protocol) -> NDArray[np.float64]:
    """From head coordinates to the patient's in the scanner."""
    angles = (np.deg2rad(a) for a in (protocol.pitch_deg, protocol.roll_deg, protocol.yaw_deg))
    (cp, sp), (cr, sr), (cy, sy) = ((np.cos(a), np.sin(a)) for a in angles)
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_y = np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


def _expose(
    rng: np.random.Generator, hu: Volume, protocol: Protocol, filters: tuple[Volume, Volume], moved: bool
) -> None:
    """One slice through the scanner, in place."""
    size, pixel = protocol.size, protocol.pixel_mm
    kernel = KERNELS[protocol.kernel]
    dense = np.float32((120 / protocol.kvp) ** 0.55)
    hu += np.maximum(hu - 150, 0) * (dense - 1)  # bone and iodine, but not tissue, depend on the voltage
    hu *= np.float32(protocol.gain)
    hu += np.float32(protocol.shift_hu) * (hu > -300)
    coarse = max(16, round(protocol.field_mm / _COARSE_MM))
    small = np.asarray(cv2.resize(hu, (coarse, coarse), interpolation=cv2.INTER_AREA), dtype=np.float32)
    error = _hardening(rng, small, protocol, protocol.field_mm / coarse)
    if hu.max() > METAL_HU:
        error += _metal(rng, small, protocol.field_mm / coarse)
    hu += np.asarray(cv2.resize(error, (size, size), interpolation=cv2.INTER_CUBIC), dtype=np.float32)
    if protocol.holder_mm:
        axis = ((np.arange(size) - (size - 1) / 2) * pixel).astype(np.float32)
        arc = protocol.holder_mm - np.hypot(axis[None, :] * 1.05, axis[:, None] + 10)
        arc = np.where(axis[:, None] < 5, np.float32(-40), np.minimum(arc, 3.5 - arc))
        mix(hu, 120.0, soft(arc, 1.0) * (hu < -300))
    if moved:
        angle, turn = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.6 * protocol.motion_mm)
        move = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), turn, 1.0)
        move[:, 2] += np.array([np.cos(angle), np.sin(angle)]) * protocol.motion_mm / pixel
        ghost = cv2.warpAffine(hu, move, (size, size), borderMode=cv2.BORDER_REPLICATE)
        share = np.float32(rng.uniform(0.25, 0.5))
        hu += share * (ghost - hu)
    blurred = np.asarray(cv2.GaussianBlur(hu, (0, 0), max(0.3, kernel.blur_mm / pixel)), dtype=np.float32)
    if kernel.overshoot:
        wide = cv2.GaussianBlur(blurred, (0, 0), 1.4 / pixel)
        blurred += np.float32(kernel.overshoot) * (blurred - wide)
    hu[:] = blurred
    # Fewer photons come through the middle and through bone.
    path = cv2.GaussianBlur(np.clip(small / 1000 + 1, 0, 2.5), (0, 0), 28 / _COARSE_MM)
    level = 0.35 + 0.75 * cv2.resize(path, (size, size), interpolation=cv2.INTER_LINEAR)
    hu += _noise(rng, protocol, filters) * np.asarray(level, dtype=np.float32)
    np.clip(hu, -1024, 3071, out=hu)


def _spectrum(protocol: Protocol) -> tuple[Volume, Volume]:
    """The noise's amplitude by spatial frequency: of its grain, and of what is blotchy."""
    kernel, size = KERNELS[protocol.kernel], protocol.size
    f = np.hypot(np.fft.fftfreq(size, protocol.pixel_mm)[:, None], np.fft.rfftfreq(size, protocol.pixel_mm)[None, :])
    grain = np.sqrt(f / kernel.peak_per_mm) * np.exp(-0.5 * (f / (1.3 * kernel.peak_per_mm)) ** 2)
    slow = np.exp(-0.5 * (f / 0.05) ** 2)
    slow[0, 0] = 0
    parts = []
    for part in (grain, slow):
        power = 2 * (part**2).sum() - (part[:, 0] ** 2).sum()
        parts.append((part * size / np.sqrt(power)).astype(np.float32))
    return parts[0], parts[1]


def _noise(rng: np.random.Generator, protocol: Protocol, filters: tuple[Volume, Volume]) -> Volume:
    size, slow = protocol.size, KERNELS[protocol.kernel].slow
    white = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    shaped = white * (np.float32(np.sqrt(1 - slow * slow)) * filters[0] + np.float32(slow) * filters[1])
    return np.asarray(np.fft.irfft2(shaped, (size, size)), dtype=np.float32) * np.float32(protocol.noise_hu)


def _turned(image: Volume, degrees: float) -> Volume:
    middle = (image.shape[0] - 1) / 2
    return np.asarray(
        cv2.warpAffine(image, cv2.getRotationMatrix2D((middle, middle), degrees, 1.0), image.shape[::-1]), np.float32
    )


def _hardening(rng: np.random.Generator, small: Volume, protocol: Protocol, pixel_mm: float) -> Volume:
    """Dark and bright bands where thick bone lies on both sides, and the brightening beside it.

    A ray's bone is taken from the slice itself: that to one side of a pixel and that to the other, of which the lesser
    counts, above what a vault has.
    """
    bone = np.clip((small - 200) / 1000, 0, 1.6).astype(np.float32)
    size = len(small)
    error = np.zeros_like(small)
    for degrees in (0.0, float(rng.uniform(6, 16)), float(rng.uniform(-16, -6)), 90.0):
        turned = _turned(bone, degrees) if degrees else bone
        left = np.cumsum(turned, axis=1) * np.float32(pixel_mm)
        right = left[:, -1:] - left
        both = np.maximum(np.minimum(left, right) - 7.0, 0)
        waves = cv2.GaussianBlur(rng.standard_normal((size, 1), dtype=np.float32), (0, 0), 1.2)
        bands = both * (-0.6 + 0.7 * waves / (waves.std() + np.float32(1e-3)))
        error += (_turned(bands, -degrees) if degrees else bands) * np.float32(0.5 if degrees else 1.0)
    error *= np.float32(protocol.hardening_hu / 1.6)
    np.clip(error, -60, 45, out=error)
    beside = cv2.GaussianBlur(bone, (0, 0), 6 / pixel_mm)
    error += np.float32(protocol.cupping_hu) * np.clip(beside * 1.6, 0, 1.2)
    return np.asarray(error * (small > -300), dtype=np.float32)


def _metal(rng: np.random.Generator, small: Volume, pixel_mm: float) -> Volume:
    """Rays of streaks from metal."""
    metal = np.clip((small - 1500) / 1500, 0, 1).astype(np.float32)
    error = np.zeros_like(small)
    if not metal.any():
        return error
    near = np.exp(-ndimage.distance_transform_edt(metal < 0.2) * pixel_mm / 35).astype(np.float32)
    for degrees in rng.uniform(0, 180, 9):
        rays = _turned(metal, float(degrees)).sum(axis=1, keepdims=True)
        rays = rays - cv2.GaussianBlur(rays, (0, 0), 2.5)
        error += _turned(np.repeat(rays, len(small), axis=1).astype(np.float32), -float(degrees)) * np.float32(
            rng.uniform(-90, 60)
        )
    return np.asarray(np.clip(error * near, -350, 350) * (small > -700), dtype=np.float32)


def _outside(protocol: Protocol) -> NDArray[np.bool_] | None:
    if not protocol.padded:
        return None
    axis = np.arange(protocol.size) - (protocol.size - 1) / 2
    return np.asarray(np.hypot(axis[:, None], axis[None, :]) > protocol.size / 2)
