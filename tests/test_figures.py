"""Pictures: each is decoded or parsed again, and what it shows is held against values computed here."""
import math
import re
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from smit import data, phantom, pretrain, scoring
from smit.figures import charts as curves, panels as figures, report


def decoded(path):
    """Pixels of a PNG whose rows are unfiltered, every chunk's CRC verified."""
    content, chunks, place = path.read_bytes(), {}, 8
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    while place < len(content):
        (length,), kind = struct.unpack(">I", content[place:place + 4]), content[place + 4:place + 8]
        body = content[place + 8:place + 8 + length]
        assert struct.unpack(">I", content[place + 8 + length:place + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + length
    width, height, depth, color, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest, [*chunks][-1]) == (8, [0, 0, 0], b"IEND")
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape((height, width, 3) if color == 2 else (height, width))


def places(pixels, picture):
    """Upper left corners (row, column) at which a picture stands in pixels, both (H, W, 3)."""
    packed, row = (np.uint32(part) @ np.uint32([65536, 256, 1]) for part in (pixels, picture[8]))      # one number each
    spots = np.argwhere((sliding_window_view(packed, len(row), 1) == row).all(-1)) - [8, 0]
    return [(y, x) for y, x in spots if np.array_equal(pixels[y:y + len(picture), x:x + picture.shape[1]], picture)]


def columns_of(pixels, *titles):
    """Left edges of a panel's columns, by their titles."""
    return [places(pixels, figures.text(title))[0] for title in titles]


@pytest.mark.parametrize("shape", [(5, 9, 3), (7, 3), (1, 1, 3)])
def test_a_png_decodes_to_the_same_pixels(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape[::-1] if len(shape) == 2 else shape, np.uint8)
    pixels = pixels.T if len(shape) == 2 else pixels                                     # not contiguous
    figures.write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(decoded(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 3), np.uint8)])
def test_what_is_no_picture_is_refused_and_leaves_no_file(pixels, tmp_path):
    with pytest.raises(ValueError, match="a.png: a PNG takes uint8"):
        figures.write_png(tmp_path / "a.png", pixels)
    assert not list(tmp_path.iterdir())


def test_right_is_on_the_left_and_anterior_and_superior_are_up():
    volume = np.zeros((5, 7, 9))                                                         # R, A, S
    volume[4, 3, 4], volume[2, 6, 4], volume[2, 3, 8] = 1, 2, 3  # most right, anterior, superior
    axial, coronal, sagittal = figures.slices(volume)
    assert (axial.shape, coronal.shape, sagittal.shape) == ((7, 5), (9, 5), (9, 7))
    assert axial[3, 0] == 1 and axial[0, 2] == 2                                         # viewer's left; top
    assert coronal[4, 0] == 1 and coronal[0, 2] == 3
    assert sagittal[4, 0] == 2 and sagittal[0, 3] == 3                                   # anterior on the viewer's left
    assert all(np.count_nonzero(plane) == 2 for plane in (axial, coronal, sagittal))


def test_letters_stand_at_right_anterior_and_superior():
    for picture, pair in zip(figures.lettered([np.zeros((90, 80, 3), np.uint8)] * 3), ("RA", "RS", "AS")):
        left, top = (figures.text(letter, figures.MARK, (0, 0, 0)) for letter in pair)
        assert (34, 0) in places(picture, left) and (0, 40) in places(picture, top)


def test_nearest_and_interpolated_pixels_lie_alike():
    edge = np.repeat([0, 1], (3, 4))[:, None, None] * np.ones((7, 5, 5))
    for side in (64, 7, 5):
        shown = [figures.displayed(edge, (1, 1, 1), side=side, smooth=smooth)[0] for smooth in (True, False)]
        assert np.array_equal(shown[0] > .5, shown[1] > .5)


def test_the_liver_of_a_phantom_is_on_the_viewers_left_and_its_spine_below():
    _, label, _ = phantom.make_patient(0, 0, spacing_mm=(6.0, 6.0, 8.0))
    liver, spleen, aorta = (number == label for number in (6, 1, 8))
    axial = [np.argwhere(figures.slices(organ, figures.busiest(label))[0]).mean(0) for organ in (liver, spleen, aorta)]
    assert axial[0][1] < axial[2][1] < axial[1][1]                                       # liver, aorta, spleen
    assert axial[2][0] > axial[0][0]  # the aorta lies behind the liver


def test_anisotropic_voxels_are_stretched_to_one_scale():
    sizes = [plane.shape for plane in figures.displayed(np.zeros((4, 6, 5)), (1.0, 2.0, 4.0), side=100)]
    assert sizes == [(60, 20), (100, 20), (100, 60)]  # 4, 12 and 20 mm at 5 pixels a mm
    label = np.random.default_rng(0).integers(0, 4, (3, 4, 5))
    for plane, shown in zip(figures.slices(label), figures.displayed(label, (1, 1, 1), side=30, smooth=False)):
        assert np.array_equal(shown, plane.repeat(6, 0).repeat(6, 1))


def test_the_reconstruction_panel_states_the_mse_of_each_plane(tmp_path):
    rng = np.random.default_rng(0)
    image, guess = rng.random((8, 12, 16)), rng.random((8, 12, 16)) * 1.5
    hidden = rng.random((4, 6, 8)).repeat(2, 0).repeat(2, 1).repeat(2, 2) < .6
    figures.reconstruction_panel(tmp_path / "a.png", torch.tensor(image), torch.tensor(hidden), guess, (1, 1, 1))
    pixels, square = decoded(tmp_path / "a.png"), (guess - image) ** 2
    lefts = [x for _, x in columns_of(pixels, "reconstruction", "pasted", "absolute error")]
    for plane in ((slice(None), slice(None), 8), (slice(None), 6), (4,)):
        s, h = square[plane], hidden[plane]
        lines = f"MSE {s.mean():.4f}", f"MSE {(s * h).mean():.4f}", f"hidden: MSE {s[h].mean():.4f}"
        for left, line in zip(lefts, lines):
            assert left in [x for _, x in places(pixels, figures.text(line))], line
    line = f"whole volume: MSE {square[hidden].mean():.4f} where hidden, MSE {square[~hidden].mean():.4f} elsewhere"
    assert places(pixels, figures.text(line + "; grey: 0 black, 1 white"))


def test_the_prediction_is_pasted_into_hidden_voxels_alone_and_the_window_is_fixed(tmp_path):
    image, hidden = np.full((6, 6, 6), .4), np.zeros((6, 6, 6), bool)
    hidden[3:] = True                                                                    # the patient's right half
    figures.reconstruction_panel(tmp_path / "a.png", image, hidden, np.full((6, 6, 6), .8), (1, 1, 1))
    pixels = decoded(tmp_path / "a.png")
    tops = columns_of(pixels, "original", "masked", "reconstruction", "pasted", "absolute error")
    (right, left), seen = (60, 180), []
    for y, x in tops:
        seen.append([tuple(pixels[y + 100, x + side]) for side in (right, left)])
    assert seen[:4] == [[(102,) * 3] * 2, [figures.HIDDEN, (102,) * 3], [(204,) * 3] * 2, [(204,) * 3, (102,) * 3]]
    assert seen[4] == [tuple(figures.colored(np.array([[.4]]), figures.HOT, 0, .5)[0, 0])] * 2


def cielab(rgb):
    """CIELAB of linear sRGB (N, 3): a second measure, for the colours were searched in OKLab."""
    xyz = rgb @ np.array([[.4124, .2126, .0193], [.3576, .7152, .1192], [.1805, .0722, .9505]]) / [.9505, 1, 1.089]
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("sees, least", [
    (np.eye(3), 28), ([[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]], 17),        # deuteranope
    ([[.11238, .88762, 0], [.11238, .88762, 0], [.00401, -.00401, 1]], 14)])                        # protanope
def test_organs_colors_are_apart_to_every_eye(sees, least):
    rgb = np.array([list(color) for color in figures.COLORS]) / 255
    linear = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4)
    lab = cielab(np.clip(linear @ np.array(sees).T, 0, 1))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[~np.eye(13, dtype=bool)]
    assert distance.min() > least                                                        # 2.3 is just noticeable


def test_the_legend_names_each_organ_beside_its_color_with_its_dice(tmp_path):
    truth = np.zeros((9, 10, 11), np.uint8)
    truth[1:5, 2:8, 2:8], truth[6:8, 2:6, 3:9], truth[6:8, 7:9, 3:9] = 1, 6, 15
    pred = np.where(truth == 1, 0, truth)
    pred[7, 2:6, 3:9] = 0                                                                # half of the liver: Dice 2/3
    figures.overlay_panel(tmp_path / "a.png", truth / 20, truth, pred, (1, 1, 2), {1: "spleen", 6: "liver"}, False)
    pixels, colors = decoded(tmp_path / "a.png"), figures.label_colors({1: "spleen", 6: "liver"})
    for line, number in (("spleen 0.00", 1), ("liver 0.67", 6), ("label 15 1.00", 15)):
        (y, x), = places(pixels, figures.text(line))
        assert tuple(pixels[y + 11, x - 20]) == tuple(colors[number])
    assert colors[15].max() < 128 and not places(pixels, figures.text("aorta"))
    figures.overlay_panel(tmp_path / "b.png", truth / 20, truth, None, (1, 1, 2), {1: "spleen"})
    assert places(decoded(tmp_path / "b.png"), figures.text("spleen"))


def test_an_organ_has_one_color_in_every_data_set():
    btcv, other = figures.label_colors({6: "liver", 2: "right kidney"}), figures.label_colors({1: "Liver", 4: "spleen"})
    assert tuple(btcv[6]) == tuple(other[1]) == tuple(figures.COLORS[5]) and tuple(other[4]) == tuple(figures.COLORS[0])
    unnamed = figures.label_colors({})
    assert [tuple(color) for color in unnamed[1:14]] == [tuple(color) for color in figures.COLORS]
    assert not (figures.label_colors({6: "bladder", 1: "liver"})[[6]] == unnamed[1:14]).all(-1).any()


def test_truth_and_prediction_stand_under_their_titles(tmp_path):
    truth, pred = np.zeros((2, 8, 8, 8), np.uint8)
    truth[2:6, 2:6, 2:6], pred[2:6, 2:6, 2:6] = 3, 9
    figures.overlay_panel(tmp_path / "a.png", truth * 0, truth, pred, (1, 1, 1), {})
    pixels = decoded(tmp_path / "a.png")
    edges = [0, *(x for _, x in columns_of(pixels, "truth", "prediction", "organ, Dice"))]
    found = [[(pixels[:, a:b] == list(figures.COLORS[number - 1])).all(-1).any() for number in (3, 9)]
             for a, b in zip(edges, edges[1:])]
    assert found == [[False, False], [True, False], [False, True]]


def test_contours_are_the_outer_pixels_of_a_label_and_leave_its_inside():
    labels = np.zeros((12, 15), int)
    labels[2:10, 1:8], labels[4:9, 8:13] = 3, 5
    near, steps = np.pad(labels, 2, "edge"), (-2, -1, 1, 2)
    for y, x in np.ndindex(labels.shape):
        others = {near[y + 2 + s, x + 2] for s in steps} | {near[y + 2, x + 2 + s] for s in steps}
        assert figures.edges(labels)[y, x] == (labels[y, x] > 0 and others != {labels[y, x]})
    assert not figures.edges(labels)[4:8, 3:6].any() and not figures.edges(np.ones((4, 4), int)).any()


def test_busiest_planes_show_the_most_organs():
    label = np.zeros((6, 7, 8), np.uint8)
    label[1, 2:5, 3], label[1, 2, 4], label[4, 5, 6], label[4, 1, 6] = 1, 1, 2, 3
    assert figures.busiest(label) == [4, 2, 6] and figures.busiest(np.zeros((6, 7, 8))) == [3, 3, 4]


def test_main_components_find_known_factors_whatever_the_rotation():
    rng = torch.Generator().manual_seed(0)
    factors = torch.rand(400, 3, generator=rng).pow(3) * torch.tensor([9.0, 3.0, 1.0])  # skewed: signs are known
    turn = torch.linalg.qr(torch.randn(8, 8, generator=rng))[0]
    colors, shares = figures.token_map(factors @ turn[:3] + torch.randn(8, generator=rng))
    assert np.allclose(colors, figures.token_map(factors)[0], atol=1e-4) and abs(sum(shares) - 1) < 1e-9
    for axis in range(3):
        assert np.corrcoef(colors[:, axis], factors[:, axis])[0, 1] > .95
    variance = factors.var(0) / factors.var(0).sum()
    assert np.allclose(shares, variance, atol=.01)
    grid = figures.token_map(factors.T.reshape(3, 5, 8, 10))[0]
    assert np.allclose(grid.reshape(400, 3), figures.token_map(factors)[0], atol=1e-6)


def test_components_without_variance_are_grey():
    colors, shares = figures.token_map(torch.ones(7, 5))
    assert (colors == .5).all() and shares == [0, 0, 0]
    colors, shares = figures.token_map(torch.arange(7.0)[:, None] * torch.ones(2))       # one factor, two channels
    assert (colors[:, 1:] == .5).all() and np.allclose(shares, [1, 0, 0])


def test_similarity_is_the_cosine_to_the_chosen_token():
    tokens = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0], [-4.0, 3.0]])
    assert np.allclose(figures.similarity_map(tokens, 0), [1, .96, -1, 0])
    grid = torch.randn(5, 2, 3, 4)
    flat = figures.similarity_map(grid.flatten(1).T, 1 * 12 + 2 * 4 + 3)
    assert np.allclose(figures.similarity_map(grid, (1, 2, 3)).ravel(), flat, atol=1e-6)


def test_a_token_stands_over_its_own_voxels_though_the_volume_is_no_multiple(tmp_path):
    tokens = torch.zeros(2, 3, 2, 2)
    tokens[0], tokens[0, 2], tokens[1, 2] = 1, 0, 1                                      # the rightmost third is unlike
    figures.token_panel(tmp_path / "a.png", np.zeros((10, 7, 7)), [tokens], (1, 1, 1), (1, 5, 5))
    pixels = decoded(tmp_path / "a.png")
    (y, x), = columns_of(pixels, "3 x 2 x 2: similarity")
    row = pixels[y + 26 + 60, x:x + 240].astype(int)  # 24 pixels a voxel; 2 of 10 unlike
    assert (row[:48] == figures.HOT[0]).all() and (row[60:110] == figures.HOT[-1]).all()


# ----------------------------------------------------------------------------------------------------- SVG and HTML
def parsed(path):
    """The elements of a page or chart, which must hold no script and lead nowhere."""
    root = ET.fromstring(path.read_text())
    for element in root.iter():
        assert element.tag.split("}")[-1] not in ("script", "link", "iframe", "foreignObject", "a", "use")
        for name, value in element.attrib.items():
            assert not name.startswith("on") and "//" not in value and "javascript" not in value
    assert "@import" not in path.read_text() and "url(" not in path.read_text()
    return root


def all_of(root, tag):
    return [element for element in root.iter() if element.tag.split("}")[-1] == tag]


def read_axis(root, anchor, place):
    """Values and pixels of an axis's marks, by their texts."""
    marks = [(float(e.text), float(e.get(place))) for e in all_of(root, "text")
             if e.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.e+-]+", e.text)]
    return np.array(marks).T


@pytest.mark.parametrize("log", [False, True])
def test_a_point_stands_where_the_axes_say(log, tmp_path):
    x, y = [3.0, 140.0, 277.0], [.013, 7.5, .4]
    curves.curves_svg(tmp_path / "a.svg", {"a <b> & c": (x, y)}, "x", "y", "t", {"ln K": 2.0}, log_y=log)
    root = parsed(tmp_path / "a.svg")
    (x_marks, x_pixels), (y_marks, y_pixels) = read_axis(root, "middle", "x"), read_axis(root, "end", "y")
    scale = np.log10 if log else np.asarray
    to_x, to_y = np.polyfit(x_marks, x_pixels, 1), np.polyfit(scale(y_marks), y_pixels - 5, 1)     # 5: half a letter
    assert to_x[0] > 0 > to_y[0]                                                         # more is right, and up
    for circle, a, b in zip(all_of(root, "circle"), x, y, strict=True):
        assert abs(np.polyval(to_x, a) - float(circle.get("cx"))) < .1
        assert abs(np.polyval(to_y, scale(b)) - float(circle.get("cy"))) < .1
    line = next(e for e in all_of(root, "path") if e.get("stroke-dasharray") == "4 4")
    assert abs(float(line.get("d").split()[1]) - np.polyval(to_y, scale(2.0))) < .1
    assert {"a <b> & c", "ln K", "t"} <= {e.text for e in all_of(root, "text")}


def test_intervals_become_bands_and_gaps_stay_gaps(tmp_path):
    y = np.array([1.0, 2.0, math.nan, 4.0, 5.0, math.inf])
    curves.curves_svg(tmp_path / "a.svg", {"a": (range(6), y, y - .5, y + .5)}, "x", "y", "t")
    root = parsed(tmp_path / "a.svg")
    paths = all_of(root, "path")
    assert [e.get("d").count("L") for e in paths if e.get("fill-opacity")] == [3, 3]
    assert [e.get("d").count("L") for e in paths if e.get("stroke-width") == "2"] == [1, 1]
    with pytest.raises(ValueError, match="b.svg: no finite value"):
        curves.curves_svg(tmp_path / "b.svg", {"a": ([1], [math.nan])}, "x", "y", "t")


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 17), (1e-9, 2e-4), (5, 5), (0, 0), (8.99, 9.02), (0, 123456)])
def test_ticks_are_round_enclose_the_data_and_are_few(low, high):
    marks = curves.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 8
    step = marks[1] - marks[0]
    assert np.allclose(np.diff(marks), step) and f"{step:.0e}"[0] in "125"


def log_file(folder, rows):
    (folder / "log.csv").write_text("step,lr,loss,mpd,mip,val_mip,val_constant,itd\n" + "".join(rows))
    return folder / "log.csv"


def test_a_log_becomes_charts_with_ln_k_among_the_token_losses_alone(tmp_path):
    rows = [f"{s},{1e-3 / s},{9 - s / 100},{8.9 - s / 10},{.4 / s},{',' if s % 5 else '.1,.2'},\n"
            for s in range(1, 21)]
    numbers = curves.from_log(log_file(tmp_path, [*rows, "21,0.1"]), tmp_path, 8192)
    assert numbers["step"] == 21 and numbers["val_mip"] == .1 and numbers["mpd"] == 6.9 and "itd" not in numbers
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"loss", "token_losses", "mip", "rate"}
    texts = {stem: [element.text for element in all_of(parsed(tmp_path / f"{stem}.svg"), "text")]
             for stem in ("mip", "token_losses")}
    assert "ln K" in texts["token_losses"] and "ln K" not in texts["mip"]
    assert {"training", "held back", "best constant"} <= set(texts["mip"]) and "visible median" not in texts["mip"]
    root = ET.parse(tmp_path / "token_losses.svg")
    marks, pixels = read_axis(root, "end", "y")
    line = next(e for e in all_of(root, "path") if e.get("stroke-dasharray") == "4 4")
    assert abs(np.interp(math.log(8192), marks, pixels - 5) - float(line.get("d").split()[1])) < .1


def test_an_empty_log_gives_no_chart_and_a_foreign_one_is_refused(tmp_path):
    assert curves.from_log(log_file(tmp_path, []), tmp_path) == {} and not list(tmp_path.glob("*.svg"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other.csv: no column 'step'"):
        curves.from_log(tmp_path / "other.csv", tmp_path)


def test_the_page_shows_every_picture_and_escapes_what_it_is_told(tmp_path):
    figures.write_png(tmp_path / "worst.png", np.zeros((2, 2), np.uint8))
    figures.write_png(tmp_path / "my <i> 100%.png", np.zeros((2, 2), np.uint8))
    curves.curves_svg(tmp_path / "loss.svg", {"a": ([1, 2], [1, 2])}, "x", "y", "t")
    report.index_html(tmp_path, "<script>alert(1)</script>", {"data": ["<b>"] * 500, "lr": 2e-4}, {"mip": .123456})
    root = parsed(tmp_path / "index.html")
    images = [element.get("src") for element in all_of(root, "img")]
    assert images == ["worst.png", "my%20%3Ci%3E%20100%25.png", "loss.svg"]
    assert all_of(root, "h1")[0].text == "<script>alert(1)</script>"
    values = [element.text for element in all_of(root, "b")]
    assert "0.1235" in values and "0.0002" in values and max(map(len, values)) < 220


# ------------------------------------------------------------------------------------------------- what scripts call
@pytest.mark.parametrize("head", ["linear", None])
def test_the_pretraining_report_changes_nothing_in_the_run(head, tmp_path):
    torch.manual_seed(0)
    student = pretrain.SMIT(dict(embed_dim=8, depths=(1, 1), heads=(2, 2), drop_path=.3), head, True, False,
                            head_width=8, bottleneck=8, prototypes=16).train()
    sample = {"views": torch.randint(0, 256, (2, 1, 8, 16, 24)).byte(), "hidden": torch.rand(2, 2, 4, 6) < .7}
    before, random = {k: v.clone() for k, v in student.state_dict().items()}, torch.get_rng_state()
    config = dict(prototypes=16, mask_cell=4, spacing=[2.0, 2.0, 3.0], method="smit")
    log_file(tmp_path, ["10,.1,.2,.3,.4,,,\n"])
    report.pretraining_report(tmp_path, config, student, sample)
    assert student.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert {path.stem for path in tmp_path.glob("*.png")} == ({"tokens", "reconstruction"} if head else {"tokens"})
    parsed(tmp_path / "index.html")


def test_the_fine_tuning_report_shows_charts_and_an_overlay(tmp_path):
    (tmp_path / "log.csv").write_text("step,lr,loss,val_dice,best_dice\n10,.1,2.5,,-1\n20,.1,1.5,.25,.25\n")
    image, label, _ = phantom.make_patient(0, 0, spacing_mm=(10.0, 10.0, 10.0))
    config = {"spacing": [10.0] * 3, "labels": {6: "liver"}}
    report.finetuning_report(tmp_path, config, np.uint8(image > 0) * 200, label, torch.tensor(label))
    assert {path.stem for path in tmp_path.iterdir()} == {"log", "loss", "dice", "rate", "overlay", "index"}
    pixels = decoded(tmp_path / "overlay.png")
    assert places(pixels, figures.text("liver 1.00")) and (pixels == 200).all(-1).any()


def test_evaluation_shows_the_worst_median_and_best_case_with_organs_matched_by_name(tmp_path, phantoms):
    names, rows, cases = data.label_names(phantoms), [], data.read_list(phantoms)[:3]
    theirs = {number + 1 if number else 0: name for number, name in names.items()}       # another system's numbers
    for shift, case in zip((1, 0, 2), cases):
        label, _ = data.read_label(case["label"])
        moved = torch.roll(torch.where(label > 0, label + 1, 0), shift, 0).byte()
        case |= {"names": names, "prediction": tmp_path / f"p{shift}.nii.gz"}
        data.write_label(case["prediction"], moved, case["image"])
        rows += scoring.score_case(case, theirs, 2.0)
    report.evaluation_report(tmp_path, cases, rows, theirs, {"modality": "ct", "hu_window": (-175.0, 250.0)})
    for rank, case in (("worst", "p2"), ("median", "p1"), ("best", "p0")):
        mean = np.mean([row["dice"] for row in rows if row["case"] == case])
        title = f"{case}, {rank} of 3, mean Dice {mean:.3f}"
        assert places(decoded(tmp_path / f"{rank}.png"), figures.text(title)), title
    assert places(decoded(tmp_path / "best.png"), figures.text("liver 1.00"))
    assert len(all_of(parsed(tmp_path / "index.html"), "img")) == 3
