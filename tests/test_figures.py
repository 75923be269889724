"""Pictures: each is parsed and its PNGs decoded,
and what it shows is held against values computed here."""
import base64
import math
import re
import struct
import xml.etree.ElementTree as ET
import zlib

import nibabel as nib
import numpy as np
import pytest
import torch

from smit import data, phantom, pretrain, runtime, scoring
from smit.figures import canvas, charts, example, page, panels, report


# ------------------------------------------------------------------------------------------ reading
def decoded(content):
    """Pixels of a PNG whose rows are unfiltered, every chunk's CRC verified."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, start = {}, 8
    while start < len(content):
        (length,), kind = (struct.unpack(">I", content[start:start + 4]),
                           content[start + 4:start + 8])
        body = content[start + 8:start + 8 + length]
        assert (struct.unpack(">I", content[start + 8 + length:start + 12 + length])[0]
                == zlib.crc32(kind + body))
        chunks[kind], start = body, start + 12 + length
    width, height, depth, color, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest, [*chunks][-1]) == (8, [0, 0, 0], b"IEND")
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    channels = {0: (), 2: (3,), 6: (4,)}[color]
    return rows[:, 1:].reshape(height, width, *channels)


def parsed(path):
    """The elements of a page or picture, which must hold no script and lead nowhere."""
    root = ET.fromstring(path.read_text())
    for element in root.iter():
        assert element.tag.split("}")[-1] not in ("script", "link", "iframe", "foreignObject",
                                                  "a", "use", "img")
        for name, value in element.attrib.items():
            embedded = name == "href" and value.startswith("data:image/png;base64,")
            assert (embedded or not name.startswith("on") and "//" not in value
                    and "javascript" not in value)
    assert "@import" not in path.read_text() and "url(" not in path.read_text()
    return root


def all_of(root, tag):
    return [element for element in root.iter() if element.tag.split("}")[-1] == tag]


def words_of(root):
    return [element.text for element in all_of(root, "text")]


def where(root, words):
    """(x, y) of a text that stands in a picture once."""
    (element,) = [element for element in all_of(root, "text") if element.text == words]
    return float(element.get("x")), float(element.get("y"))


def under(root, heading, left_of_next):
    """Pictures of the column under a heading, from the top:
    [(box, pixels)], one over the other in their order."""
    x, _ = where(root, heading)
    column = []
    for image in all_of(root, "image"):
        box = tuple(float(image.get(name)) for name in ("x", "y", "width", "height"))
        if x <= box[0] < left_of_next:
            column.append((box, decoded(base64.b64decode(image.get("href").split(",")[1]))))
    return sorted(column, key=lambda entry: entry[0][1])


def columns_of(root, *headings):
    """Pixels of the pictures under each of a panel's headings,
    all of which must be named in order."""
    lefts = [where(root, heading)[0] for heading in headings] + [math.inf]
    return [[pixels for _, pixels in under(root, heading, following)]
            for heading, following in zip(headings, lefts[1:])]


# ------------------------------------------------------------------------------------------- canvas
@pytest.mark.parametrize("shape", [(5, 9, 3), (6, 2, 4), (7, 3), (1, 1, 3)])
def test_a_png_decodes_to_the_same_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert np.array_equal(decoded(canvas.png(pixels)), pixels)
    turned = pixels.swapaxes(0, 1)  # not contiguous
    assert np.array_equal(decoded(canvas.png(turned)), turned)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 3), np.uint8)])
def test_what_is_no_picture_is_refused(pixels):
    with pytest.raises(ValueError, match="a PNG takes uint8"):
        canvas.png(pixels)


def test_grey_values_outside_the_window_are_clipped_and_none_is_rescaled():
    assert canvas.grey(np.array([[-1, 0, .2, .5, 1, 7]])).tolist() == [[0, 0, 51, 128, 255, 255]]


def test_colors_run_from_the_first_to_the_last():
    scale = (0, 0, 0), (100, 10, 0), (200, 20, 40)
    shades = canvas.colored(np.array([[-9., 1, 2, 2.5, 3, 9]]), scale, 1, 3)
    assert shades.tolist() == [
        [[0, 0, 0], [0, 0, 0], [100, 10, 0], [150, 15, 20], [200, 20, 40], [200, 20, 40]]]


def test_words_that_are_markup_or_no_xml_at_all_stay_words(tmp_path):
    canvas.write_svg(tmp_path / "a.svg", 9, 9,
                     [canvas.text(0, 0, '<b a="1">&\x00\x0b\udcff', fill='"red"')])
    (element,) = all_of(parsed(tmp_path / "a.svg"), "text")
    assert element.text == '<b a="1">&???' and element.get("fill") == '"red"'


# ------------------------------------------------------------------------------------------- planes
def test_right_is_on_the_left_and_anterior_and_superior_are_up():
    volume = np.zeros((5, 7, 9))                                                         # R, A, S
    volume[4, 3, 4], volume[2, 6, 4], volume[2, 3, 8] = 1, 2, 3  # most right, anterior, superior
    axial, coronal, sagittal = panels.slices(volume)
    assert (axial.shape, coronal.shape, sagittal.shape) == ((7, 5), (9, 5), (9, 7))
    assert axial[3, 0] == 1 and axial[0, 2] == 2  # viewer's left; top
    assert coronal[4, 0] == 1 and coronal[0, 2] == 3
    assert sagittal[4, 0] == 2 and sagittal[0, 3] == 3  # anterior on the viewer's left
    assert all(np.count_nonzero(plane) == 2 for plane in (axial, coronal, sagittal))


def test_letters_stand_at_right_anterior_and_superior():
    panel = panels.Panel((80, 80, 80), (1, 1, 1))
    for row, (at_left, at_top) in enumerate(("RA", "RS", "AS")):
        panel.drawing = []
        panel.letters(0, row)
        x, y, width, height = panel.box(0, row)
        left, top = (ET.fromstring(letter) for letter in panel.drawing)
        assert (left.text, top.text) == (at_left, at_top)
        assert x < float(left.get("x")) < x + 10 and abs(float(left.get("y")) - y - height / 2) < 8
        assert y < float(top.get("y")) < y + 20 and float(top.get("x")) == x + width / 2


def test_the_liver_of_a_phantom_is_on_the_viewers_left_and_its_spine_below():
    _, label, _ = phantom.make_patient(0, 0, spacing_mm=(6.0, 6.0, 8.0))
    liver, spleen, aorta = (number == label for number in (6, 1, 8))
    axial = [np.argwhere(panels.slices(organ, panels.busiest(label))[0]).mean(0)
             for organ in (liver, spleen, aorta)]
    assert axial[0][1] < axial[2][1] < axial[1][1]  # liver, aorta, spleen
    assert axial[2][0] > axial[0][0]                # the aorta lies behind the liver


def test_anisotropic_voxels_are_stretched_to_one_scale():
    sizes = panels.plane_sizes((4, 6, 5), (1.0, 2.0, 4.0), longest=100)
    assert np.allclose(sizes, [(20, 60), (20, 100), (60, 100)])  # 4, 12 and 20 mm at 5 pixels a mm
    panel = panels.Panel((4, 6, 5), (1.0, 2.0, 4.0), longest=100)
    assert [panel.box(1, row)[2:] for row in range(3)] == [tuple(size) for size in sizes]
    assert panel.box(0, 1)[1] > panel.box(0, 0)[1] + 60  # the rows do not overlap


def test_labels_are_enlarged_without_mixing_and_large_scans_reduced_to_the_mean():
    plane = np.random.default_rng(0).integers(0, 4, (4, 5))
    assert np.array_equal(panels.nearest(plane, 30, 24), plane.repeat(6, 0).repeat(6, 1))
    assert np.array_equal(panels.shrunk(plane, (5, 4)), plane)
    reduced = panels.shrunk(np.repeat([0., 1.], 32)[None].repeat(64, 0), (16, 16))
    assert reduced.shape == (16, 16) and np.allclose(reduced.mean(), .5)
    assert np.allclose(reduced[:, :6], 0) and np.allclose(reduced[:, 10:], 1)


# ------------------------------------------------------------------------------------------- panels
RECONSTRUCTION = "original", "masked", "reconstruction", "pasted", "absolute error"


def test_the_reconstruction_panel_states_the_mse_of_each_plane(tmp_path):
    rng = np.random.default_rng(0)
    image, guess = rng.random((8, 12, 16)), rng.random((8, 12, 16)) * 1.5
    hidden = rng.random((4, 6, 8)).repeat(2, 0).repeat(2, 1).repeat(2, 2) < .6
    panels.reconstruction_panel(tmp_path / "a.svg", torch.tensor(image), torch.tensor(hidden),
                                guess, (1, 1, 1))
    root, square = parsed(tmp_path / "a.svg"), (guess - image) ** 2
    lefts = [where(root, heading)[0] for heading in RECONSTRUCTION[2:]]

    for plane in ((slice(None), slice(None), 8), (slice(None), 6), (4,)):
        s, h = square[plane], hidden[plane]
        lines = f"MSE {s.mean():.4f}", f"MSE {(s * h).mean():.4f}", f"hidden: MSE {s[h].mean():.4f}"
        for left, line in zip(lefts, lines):
            assert where(root, line)[0] == left, line

    line = (f"Whole volume: MSE {square[hidden].mean():.4f} where hidden, "
            f"MSE {square[~hidden].mean():.4f} elsewhere.")
    assert line + " Grey: 0 is black, 1 is white." in words_of(root)


def test_the_prediction_is_pasted_into_hidden_voxels_alone_and_the_window_is_fixed(tmp_path):
    image, hidden = np.full((4, 4, 4), .4), np.zeros((4, 4, 4), bool)
    hidden[2:] = True  # the patient's right half
    panels.reconstruction_panel(tmp_path / "a.svg", image, hidden, np.full((4, 4, 4), .8),
                                (1, 1, 1))
    original, masked, guess, pasted, error = columns_of(parsed(tmp_path / "a.svg"), *RECONSTRUCTION)

    assert (len(original), len(masked), len(guess), len(pasted)) == (3, 6, 3, 3)
    assert (original[0] == 102).all() and (masked[0] == 102).all() and (guess[0] == 204).all()
    assert pasted[0].tolist() == [[204, 204, 102, 102]] * 4
    assert masked[1].tolist() == [[[*panels.HIDDEN, 255]] * 2 + [[0] * 4] * 2] * 4
    # .4 of .5 lies a fifth of the way from the fourth colour to the fifth
    assert error[0][0, 0].tolist() == [
        round(.8 * a + .2 * b) for a, b in zip(panels.HOT[3], panels.HOT[4])]


def cielab(rgb):
    """CIELAB of linear sRGB (N, 3): a second measure, for the colours were searched in OKLab."""
    xyz = rgb @ np.array([[.4124, .2126, .0193], [.3576, .7152, .1192],
                          [.1805, .0722, .9505]]) / [.9505, 1, 1.089]
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("sees, least", [
    # deuteranope
    (np.eye(3), 28), ([[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]], 17),
    ([[.11238, .88762, 0], [.11238, .88762, 0], [.00401, -.00401, 1]], 14)])  # protanope
def test_organs_colors_are_apart_to_every_eye(sees, least):
    rgb = np.array(panels.ORGAN_COLORS) / 255
    linear = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4)
    lab = cielab(np.clip(linear @ np.array(sees).T, 0, 1))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[~np.eye(13, dtype=bool)]
    assert distance.min() > least  # 2.3 is just noticeable


def legend_of(root):
    """{words: colour} of the entries beside which a square stands."""
    squares = {float(e.get("y")) + 14: e.get("fill") for e in all_of(root, "rect")
               if e.get("width") == "18.00"}
    return {e.text: squares[float(e.get("y"))] for e in all_of(root, "text")
            if float(e.get("y")) in squares}


def test_the_legend_names_each_organ_beside_its_color_with_its_dice(tmp_path):
    truth = np.zeros((9, 10, 11), np.uint8)
    truth[1:5, 2:8, 2:8], truth[6:8, 2:6, 3:9], truth[6:8, 7:9, 3:9] = 1, 6, 15
    pred = np.where(truth == 1, 0, truth)
    pred[7, 2:6, 3:9] = 0  # half of the liver: Dice 2/3
    panels.overlay_panel(tmp_path / "a.svg", truth / 20, truth, pred, (1, 1, 2),
                         {1: "spleen", 6: "liver"}, False)

    # label 15 is the thirteenth of no known organ: the last colour, half as light
    assert legend_of(parsed(tmp_path / "a.svg")) == {"spleen 0.00": "rgb(240, 180, 0)",
                                                     "liver 0.67": "rgb(225, 255, 0)",
                                                     "label 15 1.00": "rgb(0, 112, 67)"}
    panels.overlay_panel(tmp_path / "b.svg", truth / 20, truth, None, (1, 1, 2), {1: "spleen"})
    assert "spleen" in legend_of(parsed(tmp_path / "b.svg"))


def test_an_organ_has_one_color_in_every_data_set():
    btcv, other = (panels.label_colors({6: "liver", 2: "right kidney"}),
                   panels.label_colors({1: "Liver", 4: "spleen"}))
    assert (tuple(btcv[6]) == tuple(other[1]) == panels.ORGAN_COLORS[5]
            and tuple(other[4]) == panels.ORGAN_COLORS[0])

    unnamed = panels.label_colors({})
    assert [tuple(color) for color in unnamed[1:14]] == panels.ORGAN_COLORS
    assert not (panels.label_colors({6: "bladder", 1: "liver"})[[6]] == unnamed[1:14]).all(-1).any()


@pytest.mark.parametrize("contours", [True, False])
def test_truth_and_prediction_stand_under_their_titles(contours, tmp_path):
    truth, pred = np.zeros((2, 8, 8, 8), np.uint8)
    truth[2:6, 2:6, 2:6], pred[2:6, 2:6, 2:6] = 3, 9
    panels.overlay_panel(tmp_path / "a.svg", truth * 0, truth, pred, (1, 1, 1), {}, contours)
    image, *painted = columns_of(parsed(tmp_path / "a.svg"), "image", "truth", "prediction",
                                 "organ, Dice")[:3]

    # labels lie over the image
    assert [len(pictures) for pictures in (image, *painted)] == [3, 6, 6]
    for pictures, number in zip(painted, (3, 9)):
        pixels = pictures[1]  # 80 a voxel, of the axial plane
        assert {tuple(color) for color in pixels[pixels[..., 3] > 0][:, :3]} == {
            panels.ORGAN_COLORS[number - 1]}
        assert ((pixels[320, 320, 3] > 0) == (not contours) and pixels[162, 320, 3]
                and not pixels[150, 320, 3])


def test_contours_are_the_outer_pixels_of_a_label_and_leave_its_inside():
    labels = np.zeros((12, 15), int)
    labels[2:10, 1:8], labels[4:9, 8:13] = 3, 5
    near, steps = np.pad(labels, 2, "edge"), (-2, -1, 1, 2)
    for y, x in np.ndindex(labels.shape):
        others = {near[y + 2 + s, x + 2] for s in steps} | {near[y + 2, x + 2 + s] for s in steps}
        assert panels.edges(labels)[y, x] == (labels[y, x] > 0 and others != {labels[y, x]})
    assert not panels.edges(labels)[4:8, 3:6].any() and not panels.edges(np.ones((4, 4), int)).any()


def test_busiest_planes_show_the_most_organs():
    label = np.zeros((6, 7, 8), np.uint8)
    label[1, 2:5, 3], label[1, 2, 4], label[4, 5, 6], label[4, 1, 6] = 1, 1, 2, 3
    assert panels.busiest(label) == [4, 2, 6] and panels.busiest(np.zeros((6, 7, 8))) == [3, 3, 4]


def test_main_components_find_known_factors_whatever_the_rotation():
    rng = torch.Generator().manual_seed(0)
    # skewed: signs are known
    factors = torch.rand(400, 3, generator=rng).pow(3) * torch.tensor([9.0, 3.0, 1.0])
    turn = torch.linalg.qr(torch.randn(8, 8, generator=rng))[0]
    colors, shares = panels.token_map(factors @ turn[:3] + torch.randn(8, generator=rng))

    assert (np.allclose(colors, panels.token_map(factors)[0], atol=1e-4)
            and abs(sum(shares) - 1) < 1e-9)
    for axis in range(3):
        assert np.corrcoef(colors[:, axis], factors[:, axis])[0, 1] > .95
    variance = factors.var(0) / factors.var(0).sum()
    assert np.allclose(shares, variance, atol=.01)
    grid = panels.token_map(factors.T.reshape(3, 5, 8, 10))[0]
    assert np.allclose(grid.reshape(400, 3), panels.token_map(factors)[0], atol=1e-6)


def test_components_without_variance_are_grey():
    colors, shares = panels.token_map(torch.ones(7, 5))
    assert (colors == .5).all() and shares == [0, 0, 0]
    # one factor, two channels
    colors, shares = panels.token_map(torch.arange(7.0)[:, None] * torch.ones(2))
    assert (colors[:, 1:] == .5).all() and np.allclose(shares, [1, 0, 0])


def test_similarity_is_the_cosine_to_the_chosen_token():
    tokens = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0], [-4.0, 3.0]])
    assert np.allclose(panels.similarity_map(tokens, 0), [1, .96, -1, 0])
    grid = torch.randn(5, 2, 3, 4)
    flat = panels.similarity_map(grid.flatten(1).T, 1 * 12 + 2 * 4 + 3)
    assert np.allclose(panels.similarity_map(grid, (1, 2, 3)).ravel(), flat, atol=1e-6)


@pytest.mark.parametrize("voxel, box, pixels", [
    ((1, 5, 5), (240 - 96, 0, 96, 168 - 96), "left"), ((9, 0, 0), (0, 168 - 96, 48, 96), "right")])
def test_a_token_stands_over_its_own_voxels_though_the_volume_is_no_multiple(
        voxel, box, pixels, tmp_path):
    tokens = torch.zeros(2, 3, 2, 2)
    tokens[0], tokens[0, 2], tokens[1, 2] = 1, 0, 1  # the rightmost third is unlike
    panels.token_panel(tmp_path / "a.svg", np.zeros((10, 7, 7)), [tokens], (1, 1, 1), voxel)
    root = parsed(tmp_path / "a.svg")
    similar = columns_of(root, "image", "3 x 2 x 2: main components", "3 x 2 x 2: similarity")[2][0]
    # 2 voxels of 10 in that third
    (row,) = {tuple(map(tuple, line)) for line in similar.tolist()}
    unlike, like = (
        (panels.HOT[0], panels.HOT[-1]) if pixels == "left" else (panels.HOT[-1], panels.HOT[0]))
    assert row == (unlike,) * 2 + (like,) * 8

    boxes = [[float(e.get(name)) for name in ("x", "y", "width", "height")]
             for e in all_of(root, "rect") if e.get("stroke") == panels.BOX]
    x, y, *_ = panels.Panel((10, 7, 7), (1, 1, 1)).box(0, 0)  # 24 pixels a voxel
    assert np.allclose(boxes[0], np.add(box, (x, y, 0, 0)), atol=.01)


# ------------------------------------------------------------------------------------------- charts
def read_axis(root, anchor, place):
    """Values and pixels of an axis's marks, by their texts."""
    marks = [(float(e.text), float(e.get(place))) for e in all_of(root, "text")
             if e.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.e+-]+", e.text)]
    return np.array(marks).T


@pytest.mark.parametrize("log", [False, True])
def test_a_point_stands_where_the_axes_say(log, tmp_path):
    x, y = [3.0, 140.0, 277.0], [.013, 7.5, .4]
    charts.curves_svg(tmp_path / "a.svg", {"a <b> & c": (x, y)}, "x", "y", "t", {"ln K": 2.0},
                      log_y=log)
    root = parsed(tmp_path / "a.svg")
    (x_marks, x_pixels), (y_marks, y_pixels) = (read_axis(root, "middle", "x"),
                                                read_axis(root, "end", "y"))
    scale = np.log10 if log else np.asarray
    # 5: half a letter
    to_x, to_y = np.polyfit(x_marks, x_pixels, 1), np.polyfit(scale(y_marks), y_pixels - 5, 1)

    assert to_x[0] > 0 > to_y[0]  # more is right, and up
    for circle, a, b in zip(all_of(root, "circle"), x, y, strict=True):
        assert abs(np.polyval(to_x, a) - float(circle.get("cx"))) < .1
        assert abs(np.polyval(to_y, scale(b)) - float(circle.get("cy"))) < .1

    line = next(e for e in all_of(root, "path") if e.get("stroke-dasharray") == "4 4")
    assert abs(float(line.get("d").split()[1]) - np.polyval(to_y, scale(2.0))) < .1
    assert {"a <b> & c", "ln K", "t"} <= set(words_of(root))


def test_intervals_become_bands_and_gaps_stay_gaps(tmp_path):
    y = np.array([1.0, 2.0, math.nan, 4.0, 5.0, math.inf])
    charts.curves_svg(tmp_path / "a.svg", {"a": (range(6), y, y - .5, y + .5)}, "x", "y", "t")
    paths = all_of(parsed(tmp_path / "a.svg"), "path")
    assert [e.get("d").count("L") for e in paths if e.get("fill-opacity")] == [3, 3]
    assert [e.get("d").count("L") for e in paths if e.get("stroke-width") == "2"] == [1, 1]
    with pytest.raises(ValueError, match="b.svg: no finite value"):
        charts.curves_svg(tmp_path / "b.svg", {"a": ([1], [math.nan])}, "x", "y", "t")


def test_many_and_long_names_stand_in_rows_of_a_legend_above_the_curves(tmp_path):
    names = [f"a rather long name {number}" for number in range(9)]
    charts.curves_svg(tmp_path / "a.svg", {name: ([1, 2], [3, 4]) for name in names}, "x", "y", "t")
    root = parsed(tmp_path / "a.svg")
    ends = [(where(root, name)[0] + canvas.text_width(name), where(root, name)[1])
            for name in names]

    assert max(x for x, _ in ends) < 640 and len(set(ends)) == 9
    assert max(y for _, y in ends) < min(float(e.get("cy")) for e in all_of(root, "circle"))
    dashed = {e.get("stroke") for e in all_of(root, "path") if e.get("stroke-dasharray") == "9 4"}
    assert dashed == set(charts.CURVE_COLORS[:2])  # the 8th and 9th


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3.2, 17), (1e-9, 2e-4), (5, 5), (0, 0), (8.99, 9.02), (0, 123456),
                  (0, 1e-13), (1e-13, 1e-13), (.5, .5 + 1e-13)])
def test_ticks_are_round_enclose_the_data_and_are_few(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 8
    step = marks[1] - marks[0]
    assert np.allclose(np.diff(marks), step) and f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize("steps", [300, 600, 1_200, 12_000, 50_000])
def test_a_curve_of_a_round_number_of_steps_ends_with_its_axis(tmp_path, steps):
    charts.curves_svg(tmp_path / "a.svg", {"a": ([1, steps], [3, 4])}, "step", "y", "t")
    marks, _ = read_axis(parsed(tmp_path / "a.svg"), "middle", "x")
    assert max(marks) == steps


def log_file(folder, rows):
    (folder / "log.csv").write_text(
        "step,lr,loss,mpd,mip,val_mip,val_constant,itd\n" + "".join(rows))
    return folder / "log.csv"


def test_a_log_becomes_charts_with_ln_k_among_the_token_losses_alone(tmp_path):
    rows = [f"{s},{1e-3 / s},{9 - s / 100},{8.9 - s / 10},{.4 / s},{',' if s % 5 else '.1,.2'},\n"
            for s in range(1, 21)]
    numbers = charts.from_log(log_file(tmp_path, [*rows, "21,0.1"]), tmp_path, 8192)
    assert (numbers["step"] == 21 and numbers["val_mip"] == .1 and numbers["mpd"] == 6.9
            and "itd" not in numbers)
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"loss", "token_losses", "mip", "rate"}

    texts = {stem: words_of(parsed(tmp_path / f"{stem}.svg")) for stem in ("mip", "token_losses")}
    assert "ln K" in texts["token_losses"] and "ln K" not in texts["mip"]
    assert ({"training", "held back", "best constant"} <= set(texts["mip"])
            and "visible median" not in texts["mip"])

    root = ET.parse(tmp_path / "token_losses.svg")
    marks, pixels = read_axis(root, "end", "y")
    line = next(e for e in all_of(root, "path") if e.get("stroke-dasharray") == "4 4")
    assert abs(np.interp(math.log(8192), marks, pixels - 5) - float(line.get("d").split()[1])) < .1


def test_a_log_without_rows_gives_no_chart_and_removes_an_earlier_runs(tmp_path):
    (tmp_path / "rank.svg").touch()
    assert (charts.from_log(log_file(tmp_path, []), tmp_path) == {}
            and not list(tmp_path.glob("*.svg")))
    assert charts.from_log(tmp_path / "none.csv", tmp_path) == {}


def test_a_gradient_that_is_zero_on_its_logarithmic_chart_ends_no_run(tmp_path):
    (tmp_path / "log.csv").write_text("step,grad_norm\n1,0\n2,0\n")
    assert charts.from_log(tmp_path / "log.csv", tmp_path)["grad_norm"] == 0
    assert not list(tmp_path.glob("*.svg"))


def test_a_loss_that_was_not_finite_leaves_a_gap_and_is_told(tmp_path):
    losses = [.9, .5, "nan", .4, "inf"]
    rows = [f"{10 * n},{loss}\n" for n, loss in enumerate(losses, 1)]
    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(rows))
    report.run_page(tmp_path, {"total": 50}, "A run")

    curve = [path for path in all_of(parsed(tmp_path / "loss.svg"), "path")
             if path.get("stroke-width") == "2"]
    assert len(curve) == 2                               # of steps 10 and 20, and of step 40
    facts = facts_of(parsed(tmp_path / "index.html"))
    assert facts["Loss of the last logged step"] == "not finite"


def test_a_table_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other.csv: no column 'step'"):
        charts.from_log(tmp_path / "other.csv", tmp_path)


# --------------------------------------------------------------------------------------------- page
def facts_of(root):
    """{name: value} of a page's lists."""
    return {row[0].text: row[1].text for row in all_of(root, "div")
            if len(row) == 2 and row[0].tag.endswith("span")}


def test_the_page_escapes_what_it_is_told_and_cuts_long_values(tmp_path):
    page.write_page(tmp_path / "index.html", "<script>alert(1)</script>",
                    {"a & b": "<p>c</p>", "empty": ""}, {"<i>": ["<b>"] * 500, "lr": 2e-4})
    root = parsed(tmp_path / "index.html")
    assert all_of(root, "h1")[0].text == "<script>alert(1)</script>"
    assert [heading.text for heading in all_of(root, "h2")] == ["a & b", "Settings"]

    facts = facts_of(root)
    assert (facts["lr"] == "0.0002" and facts["<i>"].startswith("['<b>', ")
            and len(facts["<i>"]) < 210)


def test_the_page_holds_the_pictures_of_its_folder_in_order_with_what_to_see(tmp_path):
    for stem in ("tokens", "reconstruction", "loss", "stray"):
        canvas.write_svg(tmp_path / f"{stem}.svg", 9, 9, [canvas.text(0, 0, stem)])
    report.run_page(tmp_path, {}, "t")
    root = parsed(tmp_path / "index.html")
    # loss.svg was of a log that is not there
    assert words_of(root) == ["reconstruction", "tokens"]
    captions = ["".join(caption.itertext()) for caption in all_of(root, "figcaption")]
    assert captions[1].startswith("Tokens. ") and len(captions) == 2


def test_a_page_before_the_first_step_shows_dashes_and_no_number_of_an_unmeasured_kind(tmp_path):
    config = {"held_back": ["a.nii.gz"], "total": 40}
    report.finetuning_report(tmp_path, config)
    facts = facts_of(parsed(tmp_path / "index.html"))
    assert [facts[name] for name in ("Steps done", "Best mean Dice so far")] == ["–", "–"]

    (tmp_path / "log.csv").write_text("step,lr,loss,val_dice,best_dice\n10,.1,2.5,,-1\n")
    report.finetuning_report(tmp_path, config)
    facts = facts_of(parsed(tmp_path / "index.html"))
    assert facts["Best mean Dice so far"] == facts["Mean Dice of the last validation"] == "–"
    assert facts["Steps done"] == "10 of 40" and facts["Loss of the last logged step"] == "2.5"
    assert "best_dice" not in facts and "Momentum of the teacher" not in facts


# -------------------------------------------------------------------------------- what scripts call
def small_student(head):
    torch.manual_seed(0)
    return pretrain.SMIT(dict(embed_dim=8, depths=(1, 1), heads=(2, 2), drop_path=.3), head,
                         True, False, head_width=8, bottleneck=8, prototypes=16).train()


@pytest.mark.parametrize("head", ["linear", None])
def test_the_pretraining_report_changes_nothing_in_the_run(head, tmp_path):
    student = small_student(head)
    sample = {"views": torch.randint(0, 256, (2, 1, 8, 16, 24)).byte(),
              "hidden": torch.rand(2, 2, 4, 6) < .7}
    before, random = {k: v.clone() for k, v in student.state_dict().items()}, torch.get_rng_state()
    config = dict(prototypes=16, mask_cell=4, spacing=[2.0, 2.0, 3.0], method="smit")
    report.pretraining_report(tmp_path, config)  # before the first step

    assert (not list(tmp_path.glob("*.svg"))
            and facts_of(parsed(tmp_path / "index.html"))["Steps done"] == "–")

    log_file(tmp_path, ["10,.1,.2,.3,.4,,,\n"])
    report.pretraining_report(tmp_path, config, student, sample, 10)
    assert student.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())

    drawn = {path.stem for path in tmp_path.glob("*.svg")} & {"tokens", "reconstruction"}
    assert drawn == ({"tokens", "reconstruction"} if head else {"tokens"})
    assert "Tokens of a whole view, step 10" in words_of(parsed(tmp_path / "index.html"))


def test_the_fine_tuning_report_shows_charts_and_the_overlay_of_a_named_case(tmp_path):
    (tmp_path / "log.csv").write_text(
        "step,lr,loss,val_dice,best_dice\n10,.1,2.5,,-1\n20,.1,1.5,.25,.25\n")
    image, label, _ = phantom.make_patient(0, 0, spacing_mm=(10.0, 10.0, 10.0))
    config = {"spacing": [10.0] * 3, "labels": {6: "liver"}, "held_back": ["p<7>.nii.gz"]}
    report.finetuning_report(tmp_path, config, np.uint8(image > 0) * 200, label,
                             torch.tensor(label), case="p<7>", step=20)

    assert {path.stem for path in tmp_path.iterdir()} == {"log", "loss", "dice", "rate",
                                                          "overlay", "index"}
    root = parsed(tmp_path / "index.html")
    assert {"liver 1.00", "p<7>, held back, step 20"} <= set(words_of(root))
    image_column = columns_of(parsed(tmp_path / "overlay.svg"), "image", "truth")[0]
    assert set(np.unique(image_column[0])) == {0, 200}


def test_evaluation_shows_scores_and_three_cases_with_organs_matched_by_name(tmp_path, phantoms):
    names, rows, cases = data.label_names(phantoms), [], data.read_list(phantoms)[:3]
    # another system's numbers
    theirs = {number + 1 if number else 0: name for number, name in names.items()}
    for shift, case in zip((1, 0, 2), cases):
        label, _ = data.read_label(case["label"])
        moved = torch.roll(torch.where(label > 0, label + 1, 0), shift, 0).byte()
        case |= {"names": names, "prediction": tmp_path / f"p{shift}.nii.gz"}
        data.write_label(case["prediction"], moved, case["image"])
        rows += scoring.score_case(case, theirs, 2.0)
    report.evaluation_report(tmp_path, cases, rows, theirs,
                             {"modality": "ct", "hu_window": (-175.0, 250.0)})

    for rank, case in (("worst", "p2"), ("median", "p1"), ("best", "p0")):
        mean = np.mean([row["dice"] for row in rows if row["case"] == case])
        assert f"{case}, {rank} of 3, mean Dice {mean:.3f}" in words_of(
            parsed(tmp_path / f"{rank}.svg"))
    assert "liver 1.00" in legend_of(parsed(tmp_path / "best.svg"))

    scores, ranking = all_of(parsed(tmp_path / "index.html"), "table")
    table = {line[0].text.strip(): ["".join(cell.itertext()) for cell in line]
             for line in all_of(scores, "tr")}
    liver = [row["dice"] for row in rows if row["organ"] == "liver"]

    assert table["liver"][0] == "liver LV" and table["liver"][1] == "3"
    assert table["liver"][2:4] == [f"{np.mean(liver):.3f}", f"{min(liver):.3f} to 1.000"]
    assert [line[0].text for line in all_of(ranking, "tr")] == ["case", "p2", "p1", "p0"]


def test_an_organ_that_no_case_has_is_a_dash_and_a_missed_one_is_counted(tmp_path):
    row = {"case": "a", "organ": "liver", "dice": 0., "hd95_mm": math.inf, "surface_dice": 0.}
    rows = [row, {**row, "organ": "<spleen>", "dice": math.nan, "hd95_mm": math.nan,
                  "surface_dice": math.nan}]
    scores = ET.fromstring("<p>" + report.scores_html(rows) + "</p>")
    lines = [["".join(cell.itertext()) for cell in line] for line in all_of(scores, "tr")]

    assert ["liver", "1", "0.000", "–", "–", "–", "0.000", "–", "1"] in lines
    assert ["<spleen>", "0", "–", "–", "–", "–", "–", "–", "0"] in lines
    assert "The mean of all organs is of 1 of 2: no case has the rest." in "".join(
        scores.itertext())


def test_a_prediction_whose_axes_run_differently_lies_over_its_label_and_what_is_ignored_goes(
        tmp_path):
    label = np.zeros((8, 9, 10), np.uint8)
    label[1:4, 2:5, 3:6], label[5:7, 2:4, 3:9] = 2, 7
    prediction = label.copy()
    prediction[5:7, 2:4, 3:9] = 2  # on ignored voxels alone
    nib.save(nib.Nifti1Image(label, np.diag([2., 2, 3, 1])), tmp_path / "label.nii.gz")
    flipped = np.array([[-2., 0, 0, 14], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(prediction[::-1], flipped), tmp_path / "a.nii.gz")
    paths = {"image": tmp_path / "a.nii.gz", "prediction": tmp_path / "a.nii.gz",
             "label": tmp_path / "label.nii.gz"}
    names = {2: "liver", 7: "ignore"}
    report.case_panel(tmp_path / "a.svg", {**paths, "names": names}, {2: "Liver"}, {}, "t")

    assert [*legend_of(parsed(tmp_path / "a.svg"))] == ["liver 1.00"]


def test_the_example_shows_a_phantom_and_its_own_student_in_a_small_file(tmp_path):
    config = dict(embed_dim=8, depths=[1, 1], heads=[2, 2], window=[4, 4, 4], drop_path=0.,
                  checkpointing=False, voxel_head="linear", mip=1., mpd=0., itd=0.,
                  contrast=0., shared_head=False, head_width=8, bottleneck=8, prototypes=8,
                  mask_cell=4, view=[16, 16, 16], spacing=[8., 8., 10.], modality="ct",
                  hu_window=[-175., 250.])
    student = pretrain.build_student(config)
    with torch.no_grad():
        for parameter in student.voxel_head.parameters():
            parameter.fill_(0)
        [*student.voxel_head.parameters()][-1].fill_(.6)  # it predicts .6 everywhere
    runtime.save_checkpoint(tmp_path / "student.pt",
                            {"model": student.state_dict(), "config": config})
    example.example_svg(tmp_path / "a.svg", tmp_path / "student.pt")
    images = [decoded(base64.b64decode(e.get("href").split(",")[1])) for e in
              all_of(parsed(tmp_path / "a.svg"), "image")]
    original, visible, hidden, guess = images
    clear = hidden[..., 3] == 0

    assert np.array_equal(visible, original) and (guess == 153).all()
    assert (.6 < 1 - clear.mean() < .8 and original.std() > 40
            and (tmp_path / "a.svg").stat().st_size < 60_000)


@pytest.mark.parametrize("names", [{}, {6: "liver"}])
def test_a_hundred_and_seventeen_organs_have_colors_of_their_own_and_none_is_nearly_black(names):
    colors = panels.label_colors(names)[1:118]
    assert len({tuple(color) for color in colors}) == 117
    assert colors.max(1).min() > 60
    assert panels.label_colors(names)[118:].max(1).min() > 60


def test_a_page_draws_stored_values_as_the_hu_that_they_mean(tmp_path):
    scan = np.full((8, 9, 10), -1000, np.float32)
    scan[2:6, 2:6, 2:6] = 40
    for name, offset in (("hu", 0), ("stored", 1024)):
        nib.save(nib.Nifti1Image(scan + offset, np.diag([2., 2, 2, 1])), tmp_path / f"{name}.nii")
    facts = {"modality": "ct", "hu_window": (-175., 250.)}                  # of an older run
    drawn = report.scaled_image(tmp_path / "hu.nii", facts)
    shifted = report.scaled_image(tmp_path / "stored.nii", {**facts, "hu_offset": -1024.})
    assert torch.equal(drawn, shifted) and drawn[0, 0, 0] == 0 and .5 < drawn[3, 3, 3] < .51
