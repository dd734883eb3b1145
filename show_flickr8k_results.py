"""Show what came out of a training run, finished or still going.

    python show_flickr8k_results.py
    python show_flickr8k_results.py --output_dir outputs/synthetic_sgd
"""
import argparse
import sys

from src.utils.checkpoint import CheckpointError
from src.utils.report import load_run, summary


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/flickr8k_sgd", help="folder of the run (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print(summary(load_run(args.output_dir)))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
