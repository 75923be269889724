"""The command `python -m smit.benchmark`; what it does is in measure.py, which spawned processes import."""
from smit.benchmark.measure import main, parse_arguments

if __name__ == "__main__":
    main(parse_arguments())
