"""Readers of tables of captions: .csv, .tsv, .txt (read as CSV), .jsonl and .json files.

Commas, semicolons, tabs or bars may separate the columns; the header tells which. For the names of
the columns see COLUMNS. A photo may have several rows, several columns of captions (caption,
caption_2, ...) or a list of captions in one cell. This module must not import torch."""
import ast
import csv
import json
import re
from pathlib import PurePosixPath

from src.utils.errors import DataError
from src.utils.photo_files import photo_suffixes
from src.utils.text_files import one_line, read_json, read_lines

COLUMNS = {  # the names that a column of a table may have; the first one that is there counts
    "image": ("image", "image_name", "image_path", "image_file", "file_name", "filename",
              "filepath", "file_path", "file", "path", "photo", "image_file_name"),
    "caption": ("caption", "captions", "comment", "text", "title", "sentence", "description",
                "sentences", "texts", "comments", "descriptions", "raw"),
    "split": ("split", "set", "subset"),
}
# As in caption_2, pandas' caption.1 and "Caption (2)".
CAPTION_NUMBER = re.compile(r"[ _.-]?(\d+|#\d+|\(\d+\))$")
SPLIT_NAMES = {"train": "train", "training": "train", "restval": "train", "val": "val",
               "valid": "val", "validation": "val", "dev": "val", "test": "test",
               "testing": "test"}
DELIMITERS = ",;\t|"
UNQUOTED = "\t|"  # with these delimiters quotation marks are often part of the text
EXCERPT = 80  # characters of a wrong line that a message shows
# What programs write into the cells of a table that have no value.
NO_VALUE = ("nan", "NaN", "<NA>", "None", "null", "NULL", "#N/A")
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
SPACED_QUOTES = re.compile(r'\s+"((?:[^"]|"")*)"\s*')
# The text of a list of strings in Python's form, or in NumPy's, where no commas separate them.
STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
STRING_LIST = re.compile(
    rf"[\[(]\s*(?:(?:u?(?:{STRING})|np\.str_\((?:{STRING})\)|None|nan)[\s,]*)*[\])]", re.DOTALL)
LIST_STARTS = ("['", '["', "[{", "[['", '[["', "{'", '{"', "array(")

csv.field_size_limit(2**31 - 1)  # a C long of Windows; a column may hold whole articles or features


def split_name(path, place, value):
    """Translate the name that a file gives to a split into "train", "val" or "test". Raises
    DataError, with the file and the place in it, for an unknown name."""
    split = SPLIT_NAMES.get(str(value).strip().lower())
    if split is None:
        raise DataError(f"{path}, {place}: {value!r} is not the name of a split; use train, val or "
                        "test")
    return split


def find_columns(names):
    """Find the columns of a table that are of use.

    names: the names of all of its columns. Returns {"image", "caption" or "split": [rows in
    `names`]}, and the list of the names of columns that might have been meant but are not used.
    Only "caption" may have several columns. What the table lacks is not in the dict."""
    columns, unused = {}, []
    for column, synonyms in COLUMNS.items():
        found = []  # (how early the name stands among the synonyms, row)
        for row, name in enumerate(names):
            name = str(name).strip().lower()
            if column == "caption":
                name = CAPTION_NUMBER.sub("", name)
            if name in synonyms:
                found.append((synonyms.index(name), row))
        if found:
            best = min(found)[0]
            chosen = [row for order, row in found if order == best]
            columns[column] = chosen if column == "caption" else chosen[:1]
            unused += [str(names[row]) for _, row in found if row not in columns[column]]
    return columns, unused


def parse_list(text):
    """Return the list whose text this is, in Python's, NumPy's or JSON's form, or None if it is not
    the text of a list of captions. "[two dogs]" is none. The text of an object with a caption, such
    as '{"raw": "two dogs"}', is a list of one."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return None
    try:
        values = json.loads(text)
        if isinstance(values, dict):
            return [values] if "caption" in find_columns(list(values))[0] else None
        if all(value is None or isinstance(value, (str, list, dict)) for value in values):
            return values
    except (ValueError, RecursionError):
        pass
    try:
        if STRING_LIST.fullmatch(text):
            strings = re.findall(STRING, text, re.DOTALL)
            if text[0] == "(" and len(strings) < 2 and not text[:-1].rstrip().endswith(","):
                return None  # ("a dog") is no tuple
            # In Python's eyes, strings without commas between them are a single string.
            return [ast.literal_eval(string) for string in strings]
        if text.startswith("[{"):
            return ast.literal_eval(text)  # of objects
        if text.startswith("{'"):
            values = ast.literal_eval(text)
            if isinstance(values, dict) and "caption" in find_columns(list(values))[0]:
                return [values]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    return None


def captions_in(value):
    """Return the captions in a cell of a table or in a value of JSON, as a list of strings in one
    line each, without empty ones. The value is a string, the text of a list, a list, or an object
    with a caption. Raises TypeError if it is something else."""
    if value is None or value != value:  # NaN
        return []
    if isinstance(value, str):
        values = parse_list(value)
        if values is not None:
            return captions_in(values)
        text = one_line(value)
        return [text] if text and text not in NO_VALUE else []
    if isinstance(value, dict):
        columns, _ = find_columns(list(value))
        value = [list(value.values())[row] for row in columns.get("caption", [])]
        if not value:
            raise TypeError("an object without a caption")
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{type(value).__name__} is not a caption")
    return [caption for part in value for caption in captions_in(part)]


def jsonl_records(path, notes):
    """Yield (place in the file, names of columns, their values) for each line of a .jsonl file."""
    for number, line in enumerate(read_lines(path, notes), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: the line is not valid JSON ({error})"
                            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: the line is not a JSON object")
        yield f"line {number}", tuple(record), list(record.values())


def json_records(path, notes):
    """Yield records as `jsonl_records` does, of a .json file. It holds {photo: captions}, or a list
    of objects, which may be in an object, or a list of them for each split, or the list of each
    column, or images and annotations as in COCO's files."""
    lines = (line for line in read_lines(path) if line.strip())
    first, second = next(lines, ""), next(lines, "")
    if second and first.rstrip().endswith("}"):
        yield from jsonl_records(path, notes)
        return
    content = read_json(path, notes)
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list) and value
                 and isinstance(value[0], dict)
                 and {"image", "caption"} <= find_columns(list(value[0]))[0].keys()}
        splits = [key for key in lists if key.strip().lower() in SPLIT_NAMES]
        unread = [key for key in lists if key not in (splits or list(lists)[:1])]
        if unread:
            notes.append(f"{path}: {', '.join(unread)} is not read, as there is "
                         f"{next(iter(splits or lists))}")
        cells = [list(value.values()) if isinstance(value, dict) else value
                 for value in content.values()]
        if splits:
            content = [{"split": key, **record} if isinstance(record, dict) else record
                       for key in splits for record in lists[key]]
        elif lists:
            content = next(iter(lists.values()))
        elif ({"image", "caption"} <= find_columns(list(content))[0].keys()
              and all(isinstance(column, list) and len(column) == len(cells[0])
                      for column in cells)):
            content = [dict(zip(content, row)) for row in zip(*cells)]
        elif {"images", "annotations"} <= content.keys():
            try:
                names = {image["id"]: image["file_name"] for image in content["images"]}
                content = [{"image": names[annotation["image_id"]],
                            "caption": annotation["caption"]}
                           for annotation in content["annotations"]]
            except (KeyError, TypeError) as error:
                raise DataError(f"{path}: the file is not in COCO's format "
                                f"({type(error).__name__}: {error})") from None
        else:
            content = [value if isinstance(value, dict) and "image" in find_columns(list(value))[0]
                       else {"image": name, **value} if isinstance(value, dict)
                       else {"image": name, "caption": value} for name, value in content.items()]
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        if not isinstance(record, dict):
            raise DataError(f"{path}: expected {{photo: captions}} or a list of objects with image "
                            f"and caption, found {str(record)[:EXCERPT]!r}")
        yield f"entry {number}", tuple(record), list(record.values())


def find_header(path, notes=None):
    """Find the header of a table in a text file.

    Returns (number of its line, the delimiter, the names of the columns). The delimiter is one with
    which there are columns of photos and of captions, or None. Then the whole line is the only
    name. Lines that begin with # may stand above the header."""
    delimiters = DELIMITERS
    if path.suffix.lower() == ".tsv":
        delimiters = "\t" + DELIMITERS.replace("\t", "")
    for number, line in enumerate(read_lines(path, notes), start=1):
        if not line.strip(f" \r\n\"{DELIMITERS}") or line.lower().startswith("sep="):
            continue  # Excel writes sep=; above the header
        for delimiter in delimiters:
            try:
                cells = csv.reader([line.lstrip("# ")], delimiter=delimiter, skipinitialspace=True)
                names = [name.strip() for name in next(cells)]
            except csv.Error:
                continue
            if {"image", "caption"} <= find_columns(names)[0].keys():
                return number, delimiter, tuple(names)
        if not line.startswith("#"):
            return number, None, (line.strip(),)
    return 1, None, ()


def quoted_rows(path, header, delimiter, photo_column, number_of_columns, like_rows):
    """Yield (number of the last line, cells) for each row of a table in which cells may be enclosed
    in quotation marks. header: the number of the header's line. like_rows: a list to which the line
    of each row is appended that has several lines with as many cells as a row.

    Raises DataError for a cell that runs on over what looks like other rows; if the delimiter is in
    UNQUOTED, also for a quotation mark within a cell that is not enclosed."""
    raw = []  # the lines of the row

    def lines_below_header():
        for number, line in enumerate(read_lines(path), start=1):
            raw.append(line)
            yield line if number > header else "\n"

    def could_be_names(names):
        return [name for name in names
                if len(name.split()) == 1 and any(map(str.isdigit, name))]

    def holds_rows():
        """Whether the lines of this row look like rows of their own."""
        lines = [line.split(delimiter) for line in raw if line.strip()]
        if any(len(cells) < number_of_columns for cells in lines[:1]):
            return False
        names = [cells[photo_column].strip(' "\r\n').lower() for cells in lines
                 if len(cells) >= number_of_columns]
        if names[0].endswith(suffixes):
            return any(name.endswith(suffixes) for name in names[1:])
        if could_be_names(names[:1]) and could_be_names(names[1:]):
            return True
        # Other names without a suffix can hardly be told from parts of a caption.
        return delimiter in UNQUOTED and all(len(cells) == number_of_columns for cells in lines)

    suffixes = tuple(photo_suffixes())
    cell = rf'(?:"(?:[^"]|"")*"|[^"\r\n{re.escape(delimiter)}]*)'
    row_pattern = re.compile(rf"{cell}(?:{re.escape(delimiter)}{cell})*\s*")
    reader = csv.reader(lines_below_header(), strict=True, delimiter=delimiter)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {first}: the file is not valid CSV ({error})") from None
        if cells is None:
            return
        fault = None
        if len(raw) > 1 and first > header and holds_rows():
            fault = f"opens a cell that goes on to line {reader.line_num}, over other rows"
        elif delimiter in UNQUOTED and first > header and not row_pattern.fullmatch("".join(raw)):
            fault = "stands within a cell"
        if fault:
            raise DataError(f"{path}, line {first}: the file is not valid CSV (a quotation mark "
                            f"{fault})")
        if len(raw) > 1 and first > header and all(
                line.count(delimiter) == number_of_columns - 1 for line in raw if line.strip()):
            like_rows.append(first)
        yield reader.line_num, cells
        raw.clear()


def text_table_records(path, notes):
    """Yield records as `jsonl_records` does, of each row below the header of a .csv, .tsv or .txt
    file.

    Quotation marks enclose cells as in CSV. In a file with tabs or bars they do so only if all of
    them can be understood so; otherwise they are part of the text."""
    header, delimiter, names = find_header(path, notes)
    if delimiter is None:
        raise DataError(f"{path}, line {header}: expected the header 'image,caption', found "
                        f"{','.join(names)[:EXCERPT]!r}")
    photo_column = find_columns(names)[0]["image"][0]
    like_rows = []
    arguments = (path, header, delimiter, photo_column, len(names))
    rows, because = quoted_rows(*arguments, like_rows), ""
    if delimiter in UNQUOTED:
        try:
            for _ in quoted_rows(*arguments, []):
                pass
        except DataError as error:
            place = str(error).removeprefix(f"{path}, ").replace(": the file is not valid CSV", "")
            because = f"quotation marks are read as part of the text because of {place}"
            notes.append(f"{path}: {because}")
            rows = ((number, line.rstrip("\r\n").split(delimiter))
                    for number, line in enumerate(read_lines(path), start=1) if number > header)
    for number, cells in rows:
        if not any(map(str.strip, cells)):
            continue
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()  # the line ends with a delimiter
        if len(cells) != len(names):
            hint = because
            if len(cells) > len(names) and delimiter not in UNQUOTED:
                hint = (f"a cell that contains {delimiter!r} must be enclosed in quotation marks, "
                        "without a space before them")
            raise DataError(f"{path}, line {number}: expected '{','.join(names)}', found "
                            f"{delimiter.join(cells)[:EXCERPT]!r}{hint and f'; {hint}'}")
        # With a space before them, csv takes quotation marks for a part of the text.
        spaced = map(SPACED_QUOTES.fullmatch, cells if delimiter not in UNQUOTED else ())
        for column, match in enumerate(spaced):
            if match:
                cells[column] = match[1].replace('""', '"')
        yield f"line {number}", names, cells
    if like_rows:
        notes.append(f"{path}: cells in quotation marks go on over lines that look like other rows "
                     f"({len(like_rows):,}, such as line {like_rows[0]}); please look whether a "
                     "quotation mark is too many there")


def has_columns(path):
    """Whether a table, .jsonl or text, has columns of photos and of captions. Many programs write
    files of the same names."""
    if path.suffix.lower() == ".jsonl":
        _, names, _ = next(jsonl_records(path, None), (None, (), None))
        return {"image", "caption"} <= find_columns(names)[0].keys()
    return find_header(path)[1] is not None


def unread_columns(path, names, values, columns):
    """Return notes on the columns that are not read, but whose first value looks like a split or a
    caption. columns: those that are read, see `find_columns`."""
    notes = []
    for row, (name, value) in enumerate(zip(names, map(str, values))):
        if any(row in rows for rows in columns.values()):
            continue
        if "split" not in columns and value.strip().lower() in SPLIT_NAMES:
            notes.append(f"{path}: the column {name} is not read; name it split if it holds the "
                         "splits")
        elif name.lower().startswith("caption") and len(value.split()) > 1:
            notes.append(f"{path}: the column {name} is not read; name it caption_2 if it holds "
                         "captions")
    return notes


def table_rows(path, notes):
    """Yield the rows of a table, see `caption_files.py`. A row without a caption has "" for it.

    notes: a list to which sentences are appended, on columns that are not read and the like."""
    readers = {".jsonl": jsonl_records, ".json": json_records}
    records = readers.get(path.suffix.lower(), text_table_records)(path, notes)
    columns_of, unused, like_lists = {}, {}, []
    numbers, with_words = {}, set()  # {column: [numbers in it]}; columns that also hold words
    for place, names, values in records:
        if names not in columns_of:
            columns_of[names], other_names = find_columns(names)
            unused.update(dict.fromkeys(other_names))
            if len(columns_of) == 1:
                notes += unread_columns(path, names, values, columns_of[names])
        columns = columns_of[names]
        try:
            name = values[columns["image"][0]]
            name = "" if name is None else str(name).strip()
            cells = [values[row] for row in columns["caption"]]
            captions = captions_in(cells)
        except (KeyError, TypeError):  # a column is missing, or a caption is not a string
            name = ""
        if not name:
            expected = " and ".join(
                str(names[columns[column][0]]) if column in columns else column
                for column in ("image", "caption"))
            raise DataError(f"{path}, {place}: expected {expected}, found "
                            f"{str(list(values))[:EXCERPT]}")
        for row, cell in zip(columns["caption"], cells):
            if (row, names) not in with_words and isinstance(cell, str) and cell.strip():
                if NUMBER.fullmatch(cell.strip()):
                    numbers.setdefault((row, names), []).append(cell.strip())
                else:
                    with_words.add((row, names))
        split = None
        if "split" in columns:
            split = values[columns["split"][0]]
            empty = split is None or split != split or not str(split).strip()
            split = None if empty else split_name(path, place, split)
        for caption in captions or [""]:
            if caption.startswith(LIST_STARTS):
                like_lists.append(f"{place}: {caption[:EXCERPT]}")
            yield str(PurePosixPath(name)), caption, split
    if unused:
        columns = next(iter(columns_of.values()))
        chosen = " and ".join(str(next(iter(columns_of))[rows[0]]) for rows in columns.values())
        notes.append(f"{path}: of the columns with such names, {chosen} are read and not "
                     f"{', '.join(unused)}")
    if like_lists:
        notes.append(f"{path}: captions that begin like a list but cannot be read as one "
                     f"({len(like_lists):,}, such as that of {like_lists[0]}) are left as they are")
    for (row, names), cells in numbers.items():
        if (row, names) not in with_words and len(cells) > 1:
            notes.append(f"{path}: the column {names[row]} holds numbers only ({len(cells):,}, "
                         f"such as {cells[0]}), which are read as captions")
