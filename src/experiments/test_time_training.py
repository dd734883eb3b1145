"""Measure what the test-time training of the memory (see `TestTimeMemory`) adds to the retrieval.

    python -m src.experiments.test_time_training --output_dir outputs/flickr8k_sgd

Each run's best model is evaluated without and with it. With several runs of different seeds, the
mean and the standard deviation of the gain are printed, too."""
import statistics
import sys
import time
from pathlib import Path

from src.evaluation import evaluate
from src.runs import check_data_dir
from src.search import load_model_and_encoders
from src.utils.console import Parser, prepare_output, text
from src.utils.errors import UsageError
from src.utils.folder import SPLIT_FILES
from src.utils.splits import open_split


def compare_test_time_training(model, dataset):
    """Evaluate without and with the test-time updates of the memory, which begin at the trained
    slots and go on through the photos, then through the captions.

    Returns {"off": metrics, "on": metrics, "seconds": {"off": seconds, "on": seconds}}, the metrics
    as `evaluate` gives them. The memory ends as it was trained."""
    results = {"seconds": {}}
    for mode in ("off", "on"):
        model.memory.reset()
        if mode == "on":
            model.memory.enable_test_time_updates()
        start = time.perf_counter()
        results[mode] = evaluate(model, dataset)  # its results are on the host, so a GPU is done
        results["seconds"][mode] = time.perf_counter() - start
        model.memory.disable_test_time_updates()
        model.memory.reset()
    return results


def measure(run_dir, split, data_dir=None):
    """Load a run's best model and a split -> (results of `compare_test_time_training`, number of
    photos). data_dir: None for the folder that the run was trained on. Raises UsageError for a
    run or a dataset that is missing, and for a model without a memory."""
    model, tokenizer, settings, encoders = load_model_and_encoders(run_dir)
    if model.memory is None:
        raise UsageError(f"{run_dir}: the model has no memory that could be trained; choose a run "
                         "with a --memory_size above 0")
    if data_dir is None:
        data_dir = settings.data_dir
        check_data_dir(data_dir)
    dataset = open_split(
        data_dir, split, settings.stored_pixels("val"), tokenizer, settings.allow_incomplete,
        image_encoder=encoders.image, text_encoder=encoders.text)
    return compare_test_time_training(model, dataset), len(dataset.names)


def adaptation_table(title, results):
    """{name of a run: results of `compare_test_time_training`} as lines of text."""
    lines = [title, f"  {'':<24}{'off':>8}{'on':>8}{'gain':>8}{'seconds off':>14}{'on':>8}"]
    gains = []
    for name, result in results.items():
        off, on = result["off"]["avg_r1"], result["on"]["avg_r1"]
        seconds = result["seconds"]
        gains.append(on - off)
        lines.append(f"  {name:<24}{off:>8.2f}{on:>8.2f}{gains[-1]:>+8.2f}"
                     f"{seconds['off']:>14.2f}{seconds['on']:>8.2f}")
    if len(gains) > 1:
        lines.append(f"  mean ± standard deviation of {len(gains)} runs: "
                     f"gain {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}")
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=text, nargs="+", required=True, metavar="RUN",
                        help="folders of the runs")
    parser.add_argument("--split", choices=list(SPLIT_FILES), default="val",
                        help="the split to evaluate on (default: val)")
    parser.add_argument("--data_dir", type=text, metavar="DIR",
                        help="folder of the dataset (default: the one that the run was trained "
                        "on)")
    args = parser.parse_args(argv)
    results = {}
    try:
        for run_dir in args.output_dir:
            result, num_photos = measure(run_dir, args.split, args.data_dir)
            results[Path(run_dir).name] = result
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    title = f"Test-time training of the memory: avg R@1, {num_photos:,} photos of {args.split}"
    print(adaptation_table(title, results))
    return 0


if __name__ == "__main__":
    prepare_output(end_with_reader=True)
    sys.exit(main())
