"""Draw SVG: text, lines, pictures, colour bars, and the file that holds them [ours].

text, stroke, rectangle, disc, picture and color_bar return SVG elements, as strings or lists of
them. x runs to the right and y runs down, both in pixels. A keyword such as stroke_width="2"
becomes the attribute stroke-width="2". Panels and charts are lists of such elements.
"""
import base64
import re
import struct
import zlib
from html import escape

import numpy as np

from smit.runtime import atomic_write

FONT_SIZE = 14
INK = "#222"
# XML has no place for these characters, not even escaped
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


# ------------------------------------------------------------------------------------------- words
def escaped(words):
    """Return words as they may stand in SVG, HTML and their attributes."""
    return escape(CONTROL_CHARACTERS.sub("?", str(words)))


def attributes(style):
    """Return {"stroke_width": 2} as ' stroke-width="2"'."""
    return "".join(f' {name.replace("_", "-")}="{escaped(value)}"' for name, value in style.items())


def text(x, y, words, anchor="start", **style):
    """Write one line of text whose baseline is at y."""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes(style)}>'
            f"{escaped(words)}</text>")


def text_width(words, size=FONT_SIZE):
    """Estimate the pixels that words take, on the safe side: browsers choose the font."""
    return 0.62 * size * len(str(words))


# ------------------------------------------------------------------------------------------- lines
def stroke(points, **style):
    """Draw a line through points [(x, y), ...]."""
    path = " L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    return f'<path d="M{path}"{attributes(style)}/>'


def rectangle(x, y, width, height, **style):
    return (f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
            f"{attributes(style)}/>")


def disc(x, y, radius, color):
    return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius}" fill="{color}"/>'


# ---------------------------------------------------------------------------------------- pictures
def png(pixels):
    """Encode pixels as the bytes of a PNG file.

    pixels: uint8, (H, W) grey, (H, W, 3) colour or (H, W, 4) colour with opacity. ValueError for
    other arrays.
    """
    pixels = np.ascontiguousarray(pixels)
    kinds = {(): 0, (3,): 2, (4,): 6}                                   # the colour types of PNG
    kind = kinds.get(pixels.shape[2:])
    if pixels.dtype != np.uint8 or kind is None or pixels.ndim < 2 or not pixels.size:
        raise ValueError(f"a PNG takes uint8 (H, W), (H, W, 3) or (H, W, 4), not {pixels.dtype} "
                         f"{pixels.shape}")

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)

    # each row begins with the number of its filter; 0 is none
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
            + png_chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + png_chunk(b"IEND", b""))


def png_chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def picture(x, y, width, height, pixels, smooth=True, **style):
    """Place pixels, as `png` takes them, into a box, stretched to fill it.

    smooth: let the browser interpolate. Otherwise every pixel is a rectangle with sharp edges.
    """
    content = base64.b64encode(png(pixels)).decode()
    if not smooth:
        style["style"] = "image-rendering: pixelated"
    return (f'<image x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
            f'preserveAspectRatio="none"{attributes(style)} '
            f'href="data:image/png;base64,{content}"/>')


def grey(plane):
    """Turn values (h, w) of the fixed window [0, 1] into uint8; values outside are clipped."""
    return np.rint(np.clip(plane, 0, 1) * 255).astype(np.uint8)


def colored(plane, colors, low, high):
    """Turn values (h, w) into colours (h, w, 3): `low` into the first color, `high` the last."""
    position = np.clip((plane - low) / (high - low), 0, 1) * (len(colors) - 1)
    numbers = range(len(colors))
    channels = [np.interp(position, numbers, channel) for channel in zip(*colors)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def color_bar(x, y, width, colors, labels):
    """Draw a bar of all colours with labels under it, evenly spread between its ends."""
    shades = colored(np.linspace(0, 1, 64)[None], colors, 0, 1)
    drawing = [picture(x, y, width, 12, shades)]
    for number, label in enumerate(labels):
        share = number / (len(labels) - 1)
        anchor = {0: "start", 1: "end"}.get(share, "middle")
        drawing.append(text(x + share * width, y + 27, label, anchor, font_size=13))
    return drawing


# -------------------------------------------------------------------------------------------- file
def write_svg(path, width, height, drawing):
    """Write SVG elements on a white ground, whole or not at all."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
           f'font-size="{FONT_SIZE}" fill="{INK}">{ground}\n' + "\n".join(drawing) + "\n</svg>\n")

    # file names may hold bytes that are no UTF-8
    atomic_write(path, svg.encode("utf-8", "replace"))
