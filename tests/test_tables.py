"""Tables of captions, and the messages for those that do not parse."""
import csv
import json

import pytest

from src.utils.errors import DataError
from src.utils.tables import captions_in, find_columns, table_rows
from tests.conftest import read_captions, write_lines


def read(path, *lines):
    """Write a table. Return what it holds as {photo: [captions]}, and the notes."""
    write_lines(path, lines)
    notes, captions = [], {}
    for name, caption, _ in table_rows(path, notes):
        captions.setdefault(name, []).append(caption)
    return captions, notes


@pytest.mark.parametrize("content, message", [
    ("name,text\n", "line 1: expected the header"),
    ("", "line 1: expected the header"),
    ("image,caption\na.jpg,one, two\n", "line 2: expected 'image,caption'"),
    ("image,caption\na.jpg\n", "line 2: expected 'image,caption'"),
    ('image,caption\na.jpg,"open\n', "not valid CSV"),
])
def test_captions_of_kaggle_that_do_not_parse(tmp_path, content, message):
    (tmp_path / "captions.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_captions(tmp_path / "captions.txt")


def test_captions_of_kaggle_with_quotes(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text('image,caption\na.jpg,"A dog , ""big"" , runs ."\na.jpg,Plain .\n')
    assert read_captions(path) == {"a.jpg": ['A dog , "big" , runs .', "Plain ."]}


def test_a_line_break_inside_a_quoted_caption_becomes_a_space(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes(b'image,caption\na.jpg,"two\ndogs"\na.jpg,"a \r\n red\r\n\r\n hat"\n')
    assert read_captions(path) == {"a.jpg": ["two dogs", "a red hat"]}
    path.write_bytes(path.read_bytes() + b"b.jpg\n")
    # The message counts the lines as an editor does.
    with pytest.raises(DataError, match="line 8: expected 'image,caption'"):
        read_captions(path)


@pytest.mark.parametrize("name, lines", [
    ("a.csv", ("image;caption", 'a.jpg;"two; dogs"', "b.jpg;a cat, black")),  # Excel in Europe
    ("a.csv", ("sep=;", "image;caption", 'a.jpg;"two; dogs"', "b.jpg;a cat, black")),
    ("a.csv", ("filepath\ttitle", "a.jpg\ttwo; dogs", "b.jpg\ta cat, black")),
    ("a.csv", ("Image|TEXT", "a.jpg|two; dogs", "b.jpg|a cat, black")),
    ("a.csv", ('"Image","Caption"', '"a.jpg","two; dogs"', '"b.jpg","a cat, black"')),
    ("a.tsv", ("image,caption", "a.jpg,two; dogs", 'b.jpg,"a cat, black"')),
])
def test_the_header_tells_the_delimiter(tmp_path, name, lines):
    captions, notes = read(tmp_path / name, *lines)
    assert captions == {"a.jpg": ["two; dogs"], "b.jpg": ["a cat, black"]} and not notes


@pytest.mark.parametrize("cell, captions", [
    ("['a dog', \"it's a dog\", 'b']", ["a dog", "it's a dog", "b"]),  # Python
    ("['a dog' \"it's a dog\"\n 'b']", ["a dog", "it's a dog", "b"]),  # NumPy
    ("[np.str_('a dog'), np.str_('b')]", ["a dog", "b"]),
    ("('a dog', 'b')", ["a dog", "b"]),
    ("('a dog',)", ["a dog"]),
    ("['a dog', None]", ["a dog"]),
    ("['caf\\xe9', 'two\\nlines']", ["caf\xe9", "two lines"]),
    ('["a dog", "it\'s \\"a dog\\"", null]', ["a dog", "it's \"a dog\""]),  # JSON
    ('[{"raw": "a dog", "sentid": 5}, {"raw": "b"}]', ["a dog", "b"]),
    ("[{'raw': 'a dog', 'tokens': ['a']}, {'raw': 'b'}]", ["a dog", "b"]),
    ("[]", []),
    ("[ 'a dog' ]", ["a dog"]),
    # All of these are captions.
    ("[two dogs] run", ["[two dogs] run"]),
    ("[two dogs run]", ["[two dogs run]"]),
    ("[1, 2]", ["[1, 2]"]),
    ("('Stop')", ["('Stop')"]),
    ("(a dog)", ["(a dog)"]),
    ("'Stop' and 'go'", ["'Stop' and 'go'"]),
])
def test_a_cell_may_hold_a_list_of_captions(tmp_path, cell, captions):
    assert captions_in(cell) == captions
    path = tmp_path / "captions.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "captions"], ["a.jpg", cell]])
    notes = []
    assert list(table_rows(path, notes)) == [
        ("a.jpg", caption, None) for caption in captions or [""]]
    assert not notes


def test_what_begins_like_a_list_but_is_none_is_counted(tmp_path):
    captions, notes = read(tmp_path / "captions.tsv", "image\tcaption", "a.jpg\t['a dog', 'b")
    assert captions == {"a.jpg": ["['a dog', 'b"]}
    assert notes == [f"{tmp_path / 'captions.tsv'}: captions that begin like a list but cannot be "
                     "read as one (1, such as that of line 2: ['a dog', 'b) are left as they are"]


@pytest.mark.parametrize("columns, chosen, unused", [
    ("image,caption,caption_2,caption_3", [1, 2, 3], []),
    ("caption1,image,Caption 2", [0, 2], []),
    ("image,caption,caption,caption", [1, 2, 3], []),
    ("image,caption,caption.1", [1, 2], []),  # pandas
    ("sentence_1,sentence_2,image", [0, 1], []),
    ("image,Caption #1,Caption (2),caption_de", [1, 2], []),
    ("image,caption_0,caption_1", [1, 2], []),
    ("image,caption_id,caption_length,comment_number,caption", [4], []),
    ("image,title,caption,text_2", [2], ["title", "text_2"]),
    ("raw,sentids,split,filename,img_id", [0], []),  # Flickr30k on Hugging Face's hub
    ("image,path,TEXT", [2], ["path"]),
])
def test_which_columns_hold_captions(tmp_path, columns, chosen, unused):
    names = columns.split(",")
    found, not_read = find_columns(names)
    assert found["caption"] == chosen and not_read == unused
    row = [f"{i}" for i in range(len(names))]
    if "split" in found:
        row[found["split"][0]] = "val"
    captions, notes = read(tmp_path / "captions.csv", columns, ",".join(row))
    assert captions == {str(found["image"][0]): [str(i) for i in chosen]}
    assert len(notes) == bool(unused)
    assert not unused or notes[0].endswith(f" are read and not {', '.join(unused)}")


def test_a_photo_may_have_fewer_captions_than_there_are_columns(tmp_path):
    captions, _ = read(tmp_path / "captions.csv", "image,caption_1,caption_2", "a.jpg,one,two",
                       "b.jpg,,three", "c.jpg, ,")
    assert captions == {"a.jpg": ["one", "two"], "b.jpg": ["three"], "c.jpg": [""]}


@pytest.mark.parametrize("rows, line", [
    # A quotation mark opens one caption, and another one closes a later caption.
    (['a.jpg\tval\t"one', "b.jpg\tval\ttwo", 'c.jpg\tval\tthree"'], 2),
    (['1\tval\t"one', "2\tval\ttwo", '3\tval\tthree"'], 2),
    (['x y\tval\t"one', "x z\tval\ttwo", 'y z\tval\tthree"'], 2),
    (['a.jpg\tval\t"STOP" it says', "b.jpg\tval\ttwo"], 2),
    (["a.jpg\tval\tone", 'b.jpg\tval\ta 5" disk', 'c.jpg\tval\t"quoted"'], 3),
    (["a.jpg\tval\tone", 'b.jpg\tval\t"open'], 3),
])
def test_stray_quotation_marks_between_tabs_are_text(tmp_path, rows, line):
    captions, notes = read(tmp_path / "captions.tsv", "image\tsplit\tcaption", *rows)
    assert captions == {row.split("\t")[0]: [row.split("\t")[2]] for row in rows}
    assert len(notes) == 1 and f"are read as part of the text because of line {line} (" in notes[0]


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("names", [("a.jpg", "b.jpg", "c.jpg"), ("1", "2", "3")])
def test_a_table_of_a_csv_writer_is_read_as_it_was_written(
        tmp_path, delimiter, quoting, order, names):
    captions = ['a "big"\ndog; or,\ttwo | ones\n\nrun', '"STOP"', "one\ntwo"]
    path = tmp_path / "captions.tsv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([cells[::order] for cells in
                          [("image", "caption"), *zip(names, captions)]])
    notes = []
    assert list(table_rows(path, notes)) == [
        (name, " ".join(caption.split()), None) for name, caption in zip(names, captions)]
    assert not notes


@pytest.mark.parametrize("names", [("a.jpg", "b.jpg"), ("1", "2")])
def test_between_commas_a_stray_quotation_mark_is_an_error(tmp_path, names):
    first, second = names
    message = "captions.csv, line 2: .* opens a cell that goes on to line 3, over other rows"
    with pytest.raises(DataError, match=message):
        read(tmp_path / "captions.csv", "image,caption", f'{first},"one', f'{second},two"')


@pytest.mark.parametrize("order", [1, -1])
def test_a_cell_over_lines_that_could_be_rows_is_counted(tmp_path, order):
    rows = [("image", "caption"), ("ant", "one"), ("bee", '"two'), ("cow", 'three"'), ("dog", "x")]
    captions, notes = read(tmp_path / "captions.csv", *(";".join(row[::order]) for row in rows))
    assert len(captions) == 3
    assert len(notes) == 1 and "look like other rows (1, such as line 3);" in notes[0]


def test_a_row_with_a_cell_too_few_is_reported_with_its_line(tmp_path):
    with pytest.raises(DataError, match="captions.tsv, line 4: expected 'image,caption,split'"):
        read(tmp_path / "captions.tsv", "image\tcaption\tsplit", 'a.jpg\t"one', 'two"\tval',
             "b.jpg\tx")
    with pytest.raises(DataError, match="line 3: expected .* because of line 2"):
        read(tmp_path / "captions.tsv", "image\tcaption", 'a.jpg\t"one', "b.jpg", "c.jpg\ttwo")


@pytest.mark.parametrize("content", [
    {"a.jpg": ["one", "two"], "b.jpg": "three"},
    {"a.jpg": [{"caption": "one"}, {"caption": "two"}], "b.jpg": {"captions": ["three"]}},
    [{"image": "a.jpg", "caption": "one"}, {"image": "a.jpg", "caption": "two"},
     {"image": "b.jpg", "caption": "three"}],
    {"info": {}, "data": [{"file": "a.jpg", "captions": ["one", "two"]},
                          {"file": "b.jpg", "captions": ["three"]}]},
    {"images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}],
     "annotations": [{"image_id": 5, "caption": "one"}, {"image_id": 5, "caption": "two"},
                     {"image_id": 6, "caption": "three"}]},
    {"images": [{"filename": "a.jpg", "sentences": [{"raw": "one"}, {"raw": "two"}]},
                {"filename": "b.jpg", "sentences": [{"raw": "three"}]}]},
])
def test_the_forms_of_captions_json(tmp_path, content):
    for indent in (None, 2):
        captions, notes = read(tmp_path / "captions.json", json.dumps(content, indent=indent))
        assert captions == {"a.jpg": ["one", "two"], "b.jpg": ["three"]} and not notes


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
def test_objects_line_by_line(tmp_path, name):
    captions, _ = read(tmp_path / name, '{"image": "a.jpg", "captions": ["one", {"raw": "two"}]}',
                       '{"image": "b.jpg", "captions": "three"}',
                       '{"image": "c.jpg", "captions": null}')
    assert captions == {"a.jpg": ["one", "two"], "b.jpg": ["three"], "c.jpg": [""]}


@pytest.mark.parametrize("content, message", [
    ('["a", "b"]', "expected {photo: captions} or a list of objects"),
    ("5", "expected {photo: captions} or a list of objects"),
    ('{"a.jpg": 5}', r"entry 1: expected image and caption, found \['a.jpg', 5\]"),
    ('{"a.jpg": ', "not valid JSON"),
    ('{"images": [{"id": 1}], "annotations": []}', "not in COCO's format"),
    ('[{"image": null, "caption": "one"}]', "entry 1: expected image and caption"),
])
def test_a_json_file_of_another_form(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "captions.json", content)


@pytest.mark.parametrize("lines", [
    ("image,caption", "a.jpg,one,", "b.jpg,two, ,"),  # a delimiter ends each row
    ("image;caption;;", "a.jpg;one;;", "b.jpg;two;;;", ";;;"),
    ("# made by hand, 2024", "#", "image,caption", "a.jpg,one", "b.jpg,two"),
    ("# image,caption", "a.jpg,one", "b.jpg,two"),
    ("image, caption", 'a.jpg, "one"', 'b.jpg,  "two" '),
    ('"image", "caption"', '"a.jpg", "one"', '"b.jpg", "two"'),
    ("image,caption,split", "a.jpg,one,", "b.jpg,two, "),  # a column without values
])
def test_tables_written_by_hand(tmp_path, lines):
    captions, notes = read(tmp_path / "captions.csv", *lines)
    assert captions == {"a.jpg": ["one"], "b.jpg": ["two"]} and not notes


def test_quotation_marks_after_a_space_may_be_text(tmp_path):
    captions, _ = read(tmp_path / "captions.csv", "image,caption", 'a.jpg, "STOP" and "go"',
                       'b.jpg, "a ""big"" dog"')
    assert captions == {"a.jpg": ['"STOP" and "go"'], "b.jpg": ['a "big" dog']}


def test_a_comma_outside_quotation_marks_is_explained(tmp_path):
    with pytest.raises(DataError, match="line 2: .* 'a.jpg;one; two'; a cell that contains ';' "):
        read(tmp_path / "captions.csv", "image;caption", "a.jpg;one; two")


def test_a_cell_may_be_longer_than_the_limit_of_csv(tmp_path):
    long = "a dog " * 30_000
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        captions, notes = read(tmp_path / name, delimiter.join(["image", "features", "caption"]),
                               delimiter.join(["a.jpg", long, f'"{long}"']))
        assert captions == {"a.jpg": [long.strip()]} and not notes


@pytest.mark.parametrize("cell", ["nan", "NaN", "<NA>", "None", "null", " NULL ", "#N/A"])
def test_what_programs_write_for_no_value_is_no_caption(tmp_path, cell):
    captions, _ = read(tmp_path / "captions.csv", "image,caption,caption_2", f"a.jpg,one,{cell}",
                       f"b.jpg,{cell},", "c.jpg,a nan,None of them")
    assert captions == {"a.jpg": ["one"], "b.jpg": [""], "c.jpg": ["a nan", "None of them"]}


@pytest.mark.parametrize("cell, captions", [
    ('{"text": ["one", "two"]}', ["one", "two"]),  # Label Studio
    ("{'raw': 'one', 'tokens': ['one']}", ["one"]),
    ('{"a": "one"}', None), ("{'one', 'two'}", None), ("[['one'], ['two']]", None),
    ("array(['one'], dtype=object)", None),
])
def test_a_cell_may_hold_an_object(tmp_path, cell, captions):
    path = tmp_path / "captions.tsv"
    found, notes = read(path, "image\tcaption", f"a.jpg\t{cell}")
    assert found == {"a.jpg": captions or [cell]}
    assert any("begin like a list" in note for note in notes) == (captions is None)


def test_columns_of_numbers_and_splits_of_another_name_are_said(tmp_path):
    path = tmp_path / "captions.csv"
    captions, notes = read(path, "image,caption,caption_2,partition,caption_de",
                           "a.jpg,train,1,Train,ein Zug", "b.jpg,12,-2.5,test,",
                           "c.jpg,a dog,,test,ein Hund")
    assert captions == {"a.jpg": ["train", "1"], "b.jpg": ["12", "-2.5"], "c.jpg": ["a dog"]}
    assert notes == [
        f"{path}: the column partition is not read; name it split if it holds the splits",
        f"{path}: the column caption_de is not read; name it caption_2 if it holds captions",
        f"{path}: the column caption_2 holds numbers only (2, such as 1), which are read as "
        "captions"]


def test_json_with_a_list_for_each_split(tmp_path):
    path = tmp_path / "captions.json"
    content = {"info": [], "train": [{"image": "a.jpg", "caption": "one"}],
               "Validation": [{"image": "b.jpg", "caption": "two"},
                              {"image": "c.jpg", "caption": "three", "split": "test"}],
               "all": [{"image": "d.jpg", "caption": "four"}]}
    path.write_text(json.dumps(content))
    notes = []
    assert list(table_rows(path, notes)) == [
        ("a.jpg", "one", "train"), ("b.jpg", "two", "val"), ("c.jpg", "three", "test")]
    assert notes == [f"{path}: all is not read, as there is train"]


def test_json_with_the_list_of_each_column(tmp_path):
    columns = {"image": ["a.jpg", "b.jpg"], "caption": [["one", "two"], "three"], "id": [1, 2]}
    for content in (columns, {name: dict(enumerate(cells)) for name, cells in columns.items()}):
        captions, notes = read(tmp_path / "captions.json", json.dumps(content))
        assert captions == {"a.jpg": ["one", "two"], "b.jpg": ["three"]} and not notes
