"""Which text belongs to which photo, by their names."""
from src.utils.text_names import TEXT_NAME, match_texts


def test_names_are_matched_by_exactly_one_text():
    def match(*names):
        photos = [name for name in names if name.lower().endswith((".jpg", ".png"))]
        return match_texts(photos, [name for name in names if name not in photos])

    # The last dot separates photos of which some have no text; a number is no field of webdataset.
    assert match("DSC.001.jpg", "DSC.001.txt", "DSC.002.jpg", "DSC.003.txt") == {
        "DSC.001.jpg": ["DSC.001.txt"]}
    assert match("DSC.001.jpg", "DSC.001.caption", "DSC.002.jpg") == {
        "DSC.001.jpg": ["DSC.001.caption"]}
    # A folder's dots do not count.
    assert match("a.b/c.image.jpg", "a.b/c.txt", "a.c/d.jpg", "a.b/d.txt") == {
        "a.b/c.image.jpg": ["a.b/c.txt"]}
    # Capitals matter where the text of another photo is meant.
    assert match("a.jpg", "A.jpg", "A.txt") == {"A.jpg": ["A.txt"]}
    assert match("a.jpg", "A.TXT", "b.JPG", "B.Jpg.Txt") == {"a.jpg": ["A.TXT"],
                                                            "b.JPG": ["B.Jpg.Txt"]}
    # Composed and decomposed accents are the same name.
    assert match("caf\u00e9.jpg", "cafe\u0301.txt") == {"caf\u00e9.jpg": ["cafe\u0301.txt"]}
    # The choice has to be clear.
    assert match("a.jpg", "A.txt", "A.TXT") == {}
    assert match("a.jpg", "a.caption", "a.caption.txt") == {}
    assert match("a.jpg", "a.en.txt", "a.de.txt") == {}
    assert match("a.left.jpg", "a.right.jpg", "a.txt") == {}
    assert match("Dr. Who.jpg", "Dr. No.txt") == {}
    # NAME.txt comes first, and one text may be that of two photos.
    assert match("a.jpg", "a.png", "a.txt", "a.caption", "b.jpg", "b.caption", "b.text") == {
        "a.jpg": ["a.txt"], "a.png": ["a.txt"], "b.jpg": ["b.caption"]}


def test_the_raw_file_of_a_camera_is_not_a_text():
    assert TEXT_NAME.fullmatch("a.caption") and not TEXT_NAME.fullmatch("a.raw")
