"""Signed distances of simple solids in mm, negative inside; they melt together and carve each other. [ours]"""
from functools import partial

import numpy as np


def ellipsoid(center, radii, turn=0, tilt=0):
    """Signed distance (mm, negative inside) of an ellipsoid turned about z, then tilted about y (degrees)."""
    center, radii = np.float32(center), np.float32(radii)
    (c, cos), (s, sin) = np.cos(np.radians((turn, tilt))), np.sin(np.radians((turn, tilt)))
    axes = np.float32([[c * cos, s * cos, -sin], [-s, c, 0], [c * sin, s * sin, cos]])
    def sdf(x, y, z):
        p = x - center[0], y - center[1], z - center[2]
        if turn or tilt:
            p = [a[0] * p[0] + a[1] * p[1] + a[2] * p[2] for a in axes]
        scaled = [(along / r, r) for along, r in zip(p, radii) if np.isfinite(r)]  # infinite: a cylinder
        value = np.sqrt(sum(v * v for v, _ in scaled))
        return value * (value - 1) / np.sqrt(sum((v / r) ** 2 for v, r in scaled) + np.float32(1e-12))
    return sdf


def tube(points, radii):
    """Signed distance of a tube along a polyline, its corners cut to bend smoothly; radii: one, or one a point (mm)."""
    line = np.column_stack([np.float32(points), np.broadcast_to(np.float32(radii), len(points))])
    cut = np.stack([.75 * line[:-1] + .25 * line[1:], .25 * line[:-1] + .75 * line[1:]], 1).reshape(-1, 4)
    line = np.float32([line[0], *cut[1:-1], line[-1]])
    def sdf(x, y, z):
        nearest = np.float32(np.inf)
        for (ax, ay, az, radius), (sx, sy, sz, widening) in zip(line[:-1], np.diff(line, axis=0)):
            dx, dy, dz = x - ax, y - ay, z - az
            t = np.clip((dx * sx + dy * sy + dz * sz) / (sx * sx + sy * sy + sz * sz + np.float32(1e-6)), 0, 1)
            away = np.sqrt((dx - t * sx) ** 2 + (dy - t * sy) ** 2 + (dz - t * sz) ** 2)
            nearest = np.minimum(nearest, away - (radius + t * widening))
        return nearest
    return sdf


def union(a, b, blend=6, sign=1):
    """Both shapes, melted together over `blend` mm."""
    def sdf(*p):
        one, two = sign * a(*p), b(*p)
        return sign * (np.minimum(one, two) - np.maximum(blend - np.abs(one - two), 0) ** 2 / np.float32(4 * blend))
    return sdf


carve = partial(union, blend=4, sign=-1)  # a with b taken away, the new edge rounded over `blend` mm
overlap = np.maximum.reduce  # overlap((a, b, ...)): distance to the part that several shapes share
