"""The paper's comparisons: `python -m smit.study` [SMIT 3]."""
