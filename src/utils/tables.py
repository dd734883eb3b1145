"""Readers of tables of captions: .csv, .tsv, .txt (read as CSV) and .jsonl files.

This module must not import torch."""
import csv
import json
from pathlib import PurePosixPath

from src.utils.errors import DataError
from src.utils.text_files import one_line, read_lines

COLUMNS = {  # the names that a column of a table may have; the first one that is there counts
    "image": ("image", "image_name", "image_path", "image_file", "file_name", "filename",
              "filepath", "file_path", "file", "path", "photo"),
    "caption": ("caption", "captions", "comment", "text", "title", "sentence", "description"),
    "split": ("split", "set", "subset"),
}
SPLIT_NAMES = {"train": "train", "training": "train", "restval": "train", "val": "val",
               "valid": "val", "validation": "val", "dev": "val", "test": "test",
               "testing": "test"}
EXCERPT = 80  # characters of a wrong line that a message shows


def split_name(path, place, value):
    """Translate the name that a file gives to a split into "train", "val" or "test". Raises
    DataError, with the file and the place in it, for an unknown name."""
    split = SPLIT_NAMES.get(str(value).strip().lower())
    if split is None:
        raise DataError(f"{path}, {place}: {value!r} is not the name of a split; use train, val or "
                        "test")
    return split


def find_columns(names):
    """Find the columns of a table that are of use, among the names of all of its columns.

    Returns {"image", "caption" or "split": name of the column in this table}; what the table lacks
    is not in the dict."""
    columns_by_name = {str(name).strip().lower(): name for name in names}
    columns = {}
    for column, synonyms in COLUMNS.items():
        for synonym in synonyms:
            if synonym in columns_by_name:
                columns.setdefault(column, columns_by_name[synonym])
    return columns


def jsonl_records(path):
    """Yield (line number, {column: value}) for each line of a .jsonl file."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: the line is not valid JSON ({error})"
                            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: the line is not a JSON object")
        yield number, record


def csv_records(path):
    """Yield (line number, {column: value}) for each row below the header of a .csv file, or of a
    .tsv file, where tabs separate the columns."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(read_lines(path), strict=True, delimiter=delimiter)
    try:
        header = next(filter(any, reader), [])
        columns = [column.strip() for column in header]
        if not {"image", "caption"} <= find_columns(columns).keys():
            raise DataError(f"{path}, line {max(reader.line_num, 1)}: expected the header "
                            f"'image,caption', found {','.join(columns)[:EXCERPT]!r}")
        for row in reader:
            if not any(map(str.strip, row)):
                continue
            if len(row) != len(columns):
                raise DataError(f"{path}, line {reader.line_num}: expected "
                                f"'{','.join(columns)}', found {','.join(row)[:EXCERPT]!r}")
            yield reader.line_num, dict(zip(columns, row))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: the file is not valid CSV ({error})"
                        ) from None


def table_rows(path):
    """Yield the rows of a table, a .csv, .tsv, .txt (read as CSV) or .jsonl file. For the names of
    its columns see COLUMNS. In a .jsonl file the caption may be a list of several."""
    records = jsonl_records(path) if path.suffix == ".jsonl" else csv_records(path)
    columns = {}
    for number, record in records:
        columns = columns or find_columns(record)
        try:
            name = str(record[columns["image"]]).strip()
            captions = record[columns["caption"]]
            captions = captions if isinstance(captions, list) else [captions]
            captions = [one_line(caption) for caption in captions]
        except (KeyError, AttributeError):  # a column is missing, or a caption is not a string
            name, captions = "", []
        if not (name and captions and all(captions)):
            expected = " and ".join(columns.get(column, column) for column in ("image", "caption"))
            raise DataError(f"{path}, line {number}: expected {expected}, found "
                            f"{str(list(record.values()))[:EXCERPT]}")
        split = None
        if "split" in columns:
            split = split_name(path, f"line {number}", record.get(columns["split"]))
        for caption in captions:
            yield str(PurePosixPath(name)), caption, split
