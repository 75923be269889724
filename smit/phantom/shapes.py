"""Describe solids by the signed distance of points from their surface. [ours]

A shape is anything that is called with x, y, z (arrays of one size, in mm) and
returns an array of distances in mm: negative inside, zero on the surface. So a
function can be a shape too. Distances are exact or nearly so close to the
surface, and only have the right sign far from it.

Read: simple solids, then how new shapes come from others. numpy alone.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Point = Sequence[float]                                                 # x, y, z in mm
Shape = Callable[[Array, Array, Array], Array]


# ---------------------------------------------------------------- simple solids
class Ellipsoid:
    """An ellipsoid, turned about z and then tilted about y, in degrees.

    An infinite radius makes a cylinder along that axis.
    """

    def __init__(self, center: Point, radii: Point, turn: float = 0, tilt: float = 0):
        self.center = np.float32(center)
        self.radii = np.float32(radii)
        self.axes = turned_axes(turn, tilt) if turn or tilt else None   # (3, 3), one a row

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        along = [x - self.center[0], y - self.center[1], z - self.center[2]]
        if self.axes is not None:
            dx, dy, dz = along
            along = [ax * dx + ay * dy + az * dz for ax, ay, az in self.axes]

        # `level` is 0 in the centre and 1 on the surface. (level - 1) over the
        # length of its gradient, slope / level, is the distance to first order.
        finite = [(a, radius) for a, radius in zip(along, self.radii) if np.isfinite(radius)]
        scaled = [(a / radius, radius) for a, radius in finite]
        level = np.sqrt(sum(s * s for s, _ in scaled))
        slope = np.sqrt(sum((s / radius) ** 2 for s, radius in scaled) + np.float32(1e-12))
        return level * (level - 1) / slope


def turned_axes(turn: float, tilt: float) -> Array:
    """Return the axes (3, 3), one a row, of a body turned about z, then tilted about y."""
    cos_turn, cos_tilt = np.cos(np.radians((turn, tilt)))
    sin_turn, sin_tilt = np.sin(np.radians((turn, tilt)))
    return np.float32([
        [cos_turn * cos_tilt, sin_turn * cos_tilt, -sin_tilt],
        [-sin_turn, cos_turn, 0],
        [cos_turn * sin_tilt, sin_turn * sin_tilt, cos_tilt],
    ])


class Tube:
    """A tube along a polyline whose corners are cut, so that it bends smoothly.

    points: (n, 3) in mm. radii: one for the whole tube, or one a point, in mm.
    """

    def __init__(self, points: Sequence[Point], radii: float | Sequence[float]):
        radii = np.broadcast_to(np.float32(radii), len(points))
        self.line = cut_corners(np.column_stack([np.float32(points), radii]))   # (m, 4)

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        nearest = np.float32(np.inf)
        for start, change in zip(self.line[:-1], np.diff(self.line, axis=0)):
            nearest = np.minimum(nearest, segment_distance(x, y, z, start, change))
        return nearest


def cut_corners(line: Array) -> Array:
    """Replace each inner point of a line (n, k) by two, a quarter of the way to its neighbours."""
    starts, ends = line[:-1], line[1:]
    cuts = np.stack([.75 * starts + .25 * ends, .25 * starts + .75 * ends], axis=1)
    inner = cuts.reshape(-1, line.shape[1])[1:-1]
    return np.concatenate([line[:1], inner, line[-1:]])


def segment_distance(x: Array, y: Array, z: Array, start: Array, change: Array) -> Array:
    """Return distances from a straight piece of a tube whose radius changes evenly.

    start: (x, y, z, radius) of its first end. change: what to add for the second.
    """
    sx, sy, sz, widening = change
    dx, dy, dz = x - start[0], y - start[1], z - start[2]

    squared_length = sx * sx + sy * sy + sz * sz + np.float32(1e-6)
    share = np.clip((dx * sx + dy * sy + dz * sz) / squared_length, 0, 1)
    from_axis = np.sqrt((dx - share * sx) ** 2 + (dy - share * sy) ** 2 + (dz - share * sz) ** 2)
    return from_axis - (start[3] + share * widening)


@dataclass(frozen=True)
class HalfSpace:
    """All points where normal . (x, y, z) + offset is negative; normal of about length 1."""

    normal: Point
    offset: float

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        nx, ny, nz = self.normal
        return nx * x + ny * y + nz * z + self.offset


# ------------------------------------------------------------- shapes of shapes
@dataclass(frozen=True)
class Union:
    """Two shapes, melted together over `blend` mm."""

    one: Shape
    other: Shape
    blend: float = 6

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        return smooth_minimum(self.one(x, y, z), self.other(x, y, z), self.blend)


@dataclass(frozen=True)
class Difference:
    """The first shape without the second, the new edge rounded over `blend` mm."""

    one: Shape
    other: Shape
    blend: float = 4

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        return -smooth_minimum(-self.one(x, y, z), self.other(x, y, z), self.blend)


class Intersection:
    """The part of space that all shapes share, with sharp edges."""

    def __init__(self, *shapes: Shape):
        self.shapes = shapes

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        return np.maximum.reduce([shape(x, y, z) for shape in self.shapes])


@dataclass(frozen=True)
class Outside:
    """All of space but the shape."""

    shape: Shape

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        return -self.shape(x, y, z)


@dataclass(frozen=True)
class Grown:
    """The shape with its surface moved outwards by `mm`, inwards if that is negative."""

    shape: Shape
    mm: float

    def __call__(self, x: Array, y: Array, z: Array) -> Array:
        return self.shape(x, y, z) - self.mm


def smooth_minimum(a: Array, b: Array, blend: float) -> Array:
    """Return the smaller of two distances, less by up to blend / 4 where they are alike."""
    alike = np.maximum(blend - np.abs(a - b), 0)
    return np.minimum(a, b) - alike ** 2 / np.float32(4 * blend)
