"""Pictures and the page of a run [SMIT Fig. 2, 3, 5]."""
from smit.figures.charts import curves_svg  # noqa: F401
from smit.figures.example import example_svg  # noqa: F401
from smit.figures.panels import overlay_panel, reconstruction_panel, token_panel  # noqa: F401
from smit.figures.report import (  # noqa: F401
    evaluation_report, finetuning_report, pretraining_report, run_page)
