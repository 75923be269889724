"""The picture of a restoration, as SVG: what went in, what came out, and what was wanted [ours]."""
import numpy as np

from smit.figures.panels import ERROR_TOP, HOT, Panel, colored, mse_text, shrunk, slices
from smit.metrics import to_numpy


def restoration_panel(path, disturbed, restored, target, spacing_mm, title="Restoration"):
    """Show target, disturbed, restored and absolute error, in three planes.

    All volumes (D, H, W) in [0, 1]. Each MSE is of the plane it stands under; those at the foot
    are of the whole volume.
    """
    disturbed, restored, target = (
        to_numpy(volume).astype(np.float32) for volume in (disturbed, restored, target))
    error = np.abs(restored - target)
    change = np.abs(disturbed - target)

    panel = Panel(target.shape, spacing_mm)
    # without letters of orientation: tasks flip and turn their targets
    panel.scan(0, "target", target, letters=False)
    for column, heading in enumerate(("disturbed", "restored", "absolute error"), 1):
        panel.heading(column, heading)
    planes = zip(slices(disturbed), slices(restored), slices(error), slices(change))
    for row, (before, after, wrong, changed) in enumerate(planes):
        panel.show_grey(1, row, before)
        panel.caption(1, row, mse_text(changed))
        panel.show_grey(2, row, after)
        panel.caption(2, row, mse_text(wrong))
        panel.show(3, row, colored(shrunk(wrong, panel.sizes[row]), HOT, 0, ERROR_TOP))

    panel.color_bar(3, HOT, ("0", f"{ERROR_TOP / 2:g}", f"{ERROR_TOP:g} and more"))
    panel.write(path, title, (f"Whole volume: {mse_text(change)} disturbed, {mse_text(error)} "
                              "restored. Grey: 0 is black, 1 is white.",))
