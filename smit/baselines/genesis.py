"""Models Genesis, "MG": restore a crop whose texture, greys and parts were disturbed [SMIT 7].

Zhou et al., Models Genesis, Medical Image Analysis 67, 2021; first at MICCAI 2019.
The disturbances are pure functions of an image (D, H, W) in [0, 1] and of one torch.Generator, in
the order in which a sample meets them: flip, local shuffling, intensity curve, painting. Their
probabilities are those of the released code, tagged [MG].
"""
import numpy as np
import torch
from torch.nn import functional as F

from smit.baselines.task import Task, coin, u_then_v, whole
from smit.baselines.unet import UNet3D

FLIP = 0.4               # of another flip, at most three times [MG]
SHUFFLE = 0.5            # [MG]
INTENSITY = 0.9          # [MG]
DECREASING = 0.5         # of the intensity curves [MG]
PAINT = 0.9              # [MG]
OUTER = 0.8              # of the painted ones; the others are painted inside [MG]
WINDOWS = 10_000         # of local shuffling, whatever the size of the crop [MG]
MOST_BOXES = 5           # of painting [MG]
ANOTHER_BOX = 0.95       # [MG]
MARGIN = 3               # voxels between a box and the border [MG]


class Genesis(Task):
    """Models Genesis: the mean squared error of the restored crop, over all voxels."""
    terms = ("restore",)

    def __init__(self, width=64):
        super().__init__()
        self.unet = UNet3D(width=width)

    @property
    def encoder(self):
        return self.unet.encoder

    def samples(self, views, rng):
        """Disturb both views: input and target (2, 1, D, H, W)."""
        inputs, targets = [], []
        for view in views[:, 0]:
            target = random_flip(view, rng)
            inputs.append(disturb(target, rng))
            targets.append(target)
        return {"input": torch.stack(inputs)[:, None], "target": torch.stack(targets)[:, None]}

    def forward(self, batch):
        _, restored, target = self.restore(batch)
        return {"restore": F.mse_loss(restored, target)}

    def restore(self, batch):
        disturbed = u_then_v(batch["input"])                                # (2B, 1, D, H, W)
        restored = self.unet(disturbed).float().sigmoid()
        return disturbed, restored, u_then_v(batch["target"])

    def transferred(self):
        """Return the whole U-Net: segmentation replaces its last convolution alone [MG]."""
        return self.unet.state_dict()


def disturb(image, rng):
    """Shuffle, map the greys and paint, each with its probability [MG]."""
    if coin(SHUFFLE, rng):
        image = shuffle_windows(image, *random_windows(image.shape, rng), rng)
    if coin(INTENSITY, rng):
        points = torch.rand(2, 2, generator=rng)
        image = map_intensities(image, points, decreasing=coin(DECREASING, rng))
    if coin(PAINT, rng):
        if coin(OUTER, rng):
            image = paint_outside(image, outer_boxes(image.shape, rng), rng)
        else:
            image = paint_inside(image, inner_boxes(image.shape, rng), rng)
    return image


def random_flip(image, rng):
    """Flip a random axis up to three times, each by FLIP's chance; one may come twice [MG]."""
    for _ in range(3):
        if not coin(FLIP, rng):
            break
        # differs: the release's axis 0 is the channel, so a third of its flips change nothing
        # and the depth is never flipped
        image = image.flip(whole(0, 2, rng))
    return image


# --------------------------------------------------------------------------- local shuffling
def random_windows(shape, rng):
    """Draw windows of 1 to a tenth of each side: starts and sides, each (n, 3) long [MG]."""
    starts = torch.empty(WINDOWS, 3, dtype=torch.long)
    sides = torch.empty(WINDOWS, 3, dtype=torch.long)
    for axis, size in enumerate(shape):
        longest = max(1, size // 10)
        sides[:, axis] = torch.randint(1, longest + 1, (WINDOWS,), generator=rng)
        places = size - sides[:, axis] + 1
        starts[:, axis] = (torch.rand(WINDOWS, generator=rng) * places).long()
    return starts, sides


def shuffle_windows(image, starts, sides, rng):
    """Permute the voxels inside each window [MG].

    image (D, H, W); starts, sides (n, 3). A window's voxels come from the image as it was, and are
    written over those of the windows before it.
    """
    before = image.numpy()
    after = before.copy()
    # in numpy, and all keys in one draw: ten thousand windows take a third of the time
    keys = torch.rand(int(sides.prod(dim=1).sum()), generator=rng).numpy()
    used = 0
    for (x, y, z), (a, b, c) in zip(starts.tolist(), sides.tolist()):
        window = slice(x, x + a), slice(y, y + b), slice(z, z + c)
        order = keys[used:used + a * b * c].argsort()
        used += a * b * c
        after[window] = before[window].ravel()[order].reshape(a, b, c)
    return torch.from_numpy(after)


# --------------------------------------------------------------------------- intensity curve
def map_intensities(image, points, decreasing=False, samples=100_000):
    """Map greys along a Bezier curve from (0, 0) to (1, 1), or from (0, 1) to (1, 0) [MG].

    points (2, 2): x and y of the two inner control points, in the unit square. Such a curve is
    monotone, so the order of the greys survives, or is reversed.
    """
    t = np.linspace(0, 1, samples)
    (x1, y1), (x2, y2) = points.double().tolist()
    x = 3 * (1 - t) ** 2 * t * x1 + 3 * (1 - t) * t ** 2 * x2 + t ** 3
    y = 3 * (1 - t) ** 2 * t * y1 + 3 * (1 - t) * t ** 2 * y2 + t ** 3
    if decreasing:
        y = y[::-1]
    return torch.from_numpy(np.interp(image.numpy(), x, y).astype(np.float32))


# --------------------------------------------------------------------------- painting
def inner_boxes(shape, rng):
    """Draw up to five boxes, of a sixth to a third of each side: tuples of slices [MG]."""
    boxes = []
    while len(boxes) < MOST_BOXES and coin(ANOTHER_BOX, rng):
        sides = [whole(size // 6, size // 3, rng) for size in shape]
        boxes.append(random_box(shape, sides, rng))
    return boxes


def outer_boxes(shape, rng):
    """Draw one to five boxes, of three to four sevenths of each side: tuples of slices [MG]."""
    boxes = []
    while not boxes or len(boxes) < MOST_BOXES and coin(ANOTHER_BOX, rng):
        sides = [size - whole(3 * size // 7, 4 * size // 7, rng) for size in shape]
        boxes.append(random_box(shape, sides, rng))
    return boxes


def random_box(shape, sides, rng):
    """Place a box of these sides inside the margin: a tuple of three slices."""
    box = []
    for size, side in zip(shape, sides):
        start = whole(MARGIN, size - side - MARGIN, rng)
        box.append(slice(start, start + side))
    return tuple(box)


def paint_inside(image, boxes, rng):
    """Fill the boxes with uniform noise, drawn for each voxel [MG]."""
    result = image.clone()
    for box in boxes:
        result[box] = torch.rand(result[box].shape, generator=rng)
    return result


def paint_outside(image, boxes, rng):
    """Fill all but the boxes with uniform noise, drawn for each voxel [MG]."""
    result = torch.rand(image.shape, generator=rng)
    for box in boxes:
        result[box] = image[box]
    return result
