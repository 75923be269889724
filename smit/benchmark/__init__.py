"""Time and memory beside peers: `python -m smit.benchmark` [ours]."""
