import os
import pathlib
import unicodedata

import image_trees
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from configs import default
from ieg_jax.data.sources import image_files
from ieg_jax.data.sources import load as sources
from ieg_jax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(name, train, **more):
    data = default.get_config().data
    data.name, data.train = name, str(train)
    data.update(more)
    return data


def write_images(folder, names):
    return {name: image_trees.save(folder / name, image_trees.picture(i)) for i, name in enumerate(names)}


def pixels_of(split, row):
    return split.images.reader()(row).whole().numpy()


def test_folder_of_odd_images(tmp_path):
    """Class names with spaces and umlauts, every format, things that are no images beside them."""
    want = {f"Süße Äpfel/{k}": v for k, v in image_trees.odd_images(tmp_path / "own" / "Süße Äpfel").items()}
    want |= {f"birnen/{k}": v for k, v in image_trees.odd_images(tmp_path / "own" / "birnen" / "more").items()}
    (tmp_path / "own" / "birnen" / "notes.txt").write_text("no image")
    (tmp_path / "own" / "birnen" / "._x.jpg").write_bytes(b"of another system")
    (tmp_path / "own" / "Thumbs.db").write_bytes(b"")
    source = sources.load(config("image_folder", tmp_path / "own"))
    assert source.class_names == ("Süße Äpfel", "birnen") and source.num_classes == 2
    assert len(source.train) == len(want)
    assert source.train.clean_labels.tolist() == [-1] * len(want)
    for row, name in enumerate(source.train.names):
        np.testing.assert_array_equal(pixels_of(source.train, row), want[name.replace("/more", "")], err_msg=name)
        assert source.class_names[source.train.labels[row]] == name.split("/")[0]


def test_folders_for_test_and_trusted(tmp_path):
    for part, count in (("train", 3), ("test", 2), ("trusted", 1)):
        write_images(tmp_path / part, [f"{label}/{k}.png" for label in "ab" for k in range(count)])
    data = config("image_folder", tmp_path / "train", test=str(tmp_path / "test"), trusted=str(tmp_path / "trusted"))
    source = sources.load(data)
    assert [len(s) for s in (source.train, source.test, source.trusted)] == [6, 4, 2]
    assert source.test.clean_labels.tolist() == source.test.labels.tolist() == [0, 0, 1, 1]


def test_list_with_everything(tmp_path):
    """A byte order mark, CRLF, blank lines, semicolons, quotes, spaces, a repeated line."""
    want = write_images(tmp_path / "img", ["a 1.png", "b;2.png", "c.png", "d.png", "t.png"])
    text = (
        'path; label; clean_label; split\r\nimg/a 1.png;rot;;\r\n\r\n"img/b;2.png";grün;rot;\r\n;;;\r\n'
        "img/c.png;rot;rot;train\r\nimg/c.png;rot;rot;train\r\nimg/d.png;grün;;trusted\r\nimg/t.png;rot;;test\r\n"
    )
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = sources.load(config("image_csv", tmp_path / "list.csv"))
    assert source.class_names == ("grün", "rot")
    assert source.train.names.tolist() == ["img/a 1.png", "img/b;2.png", "img/c.png"]
    assert source.train.labels.tolist() == [1, 0, 1]
    assert source.train.clean_labels.tolist() == [-1, 1, 1]
    assert source.trusted.labels.tolist() == source.trusted.clean_labels.tolist() == [0]
    assert source.test.names.tolist() == ["img/t.png"]
    np.testing.assert_array_equal(pixels_of(source.train, 1), want["b;2.png"])


def test_paths_are_relative_to_data_dir_where_it_is_given(tmp_path):
    write_images(tmp_path / "img", ["0.png", "1.png", "2.png"])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.csv").write_text("path,label\n0.png,0\n1.png,1\n")
    (tmp_path / "lists" / "trusted.csv").write_text(f"path,label\n{tmp_path}/img/1.png,1\n2.png,0\n")
    data = config(
        "image_csv",
        tmp_path / "lists" / "train.csv",
        dir=str(tmp_path / "img"),
        trusted=str(tmp_path / "lists" / "trusted.csv"),
    )
    source = sources.load(data)
    assert source.class_names == ("0", "1")
    assert source.trusted.names.tolist() == ["1.png", "2.png"], "the same file has the same name in both lists"


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,label\nx.png,0\n", r"columns \['file', 'label'\], expected a first line with path and label"),
        ("x.png,0\ny.png,1\n", "expected a first line with path and label"),
        ("path,label\n", "no images listed"),
        ("path,label\nx.png,\n", "line 2: path 'x.png', label ''"),
        ("path,label\nx.png,a\ny.png,b\nx.png,b\n", "line 4: x.png has label 'b', but 'a' in .*line 2"),
        ("path,label\nx.png,a\n./x.png,b\n", "x.png has label 'b', but 'a'"),
        ("path,label\nx.png,a\ny.png,a\n", "at least two classes"),
        ('path,label\n"x.png,a\ny.png,b\n"z.png",b\n', "line 4: path .*is a quotation mark left open"),
        ("path,label\nx,1.png,a\ny.png,b\n", "line 2: 1 cells too many"),
        ("path,label\nx.png,0\ny.png,nan\n", "line 3: label 'nan', as a missing value is written"),
        ("path,label,label\nx.png,0,1\n", "'label' more than once"),
        ("path,label\nx.png,a\nbad\0name.png,b\n", "line"),
        ("path,label\nx.png,0\ny.png,-1\n", "line 3: label -1, expected 0, or more"),
        ("path,label,split\nx.png,0,training\n", "split 'training', expected one of train, test, trusted"),
        ("path,label,split\nx.png,a,train\ny.png,b,train\nz.png,c,test\n", "'c' is none of the 2 classes a, b"),
        ("path,label\nx.png,a\ngone.png,b\n", "1 of 2 images cannot be used:\n  gone.png: no such file"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    write_images(tmp_path, ["x.png", "y.png", "z.png"])
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        sources.load(config("image_csv", tmp_path / "list.csv"))


def write_parquet(where, **columns):
    parquet.write_table(pa.table(columns), where)


def test_lists_in_parquet(tmp_path):
    """Read as the same list in CSV is, whatever types its columns have."""
    names = [f"{k}.png" for k in range(5)]
    write_images(tmp_path, names)
    labels, clean, splits = ["b", "a", "b", "a", "a"], [None, "b", None, "", None], ["train"] * 3 + ["test", "trusted"]
    lines = [",".join([n, y, c or "", s]) for n, y, c, s in zip(names, labels, clean, splits, strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,clean_label,split", *lines]))
    write_parquet(
        tmp_path / "list.parquet",
        other=pa.array([[1.0]] * 5),
        split=pa.array(splits),
        path=pa.array(names, pa.large_string()),
        label=pa.array(labels).dictionary_encode(),
        clean_label=pa.array(clean),
    )
    text, table = (sources.load(config("image_csv", tmp_path / f"list.{ending}")) for ending in ("csv", "parquet"))
    assert text.class_names == table.class_names == ("a", "b")
    for one, other in ((text.train, table.train), (text.test, table.test), (text.trusted, table.trusted)):
        for column in ("labels", "clean_labels", "names"):
            np.testing.assert_array_equal(getattr(one, column), getattr(other, column))
    # Numbers; floats where some are missing, as pandas has it.
    write_parquet(tmp_path / "list.PQ", path=names, label=[0, 1, 2, 1, 0], clean_label=[float("nan"), 2.0, None, 1, 0])
    source = sources.load(config("image_csv", tmp_path / "list.PQ"))
    assert source.train.labels.tolist() == [0, 1, 2, 1, 0] and source.train.clean_labels.tolist() == [-1, 2, -1, 1, 0]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"file": ["x.png"], "label": [0]}, r"columns \['file', 'label'\], expected path and label"),
        ({"path": ["x.png"], "label": [0.5]}, "column 'label' is of type double, expected text or whole numbers"),
        ({"path": ["x.png"], "label": [True]}, "column 'label' is of type bool"),
        ({"path": [b"x.png"], "label": [0]}, "column 'path' is of type binary"),
        ({"path": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "no images listed"),
        ({"path": ["x.png", None], "label": ["a", "b"]}, "row 1: path '', label 'b'; expected both"),
        ({"path": ["x.png", "x.png"], "label": ["a", "b"]}, "row 1: x.png has label 'b', but 'a' in .*row 0"),
    ],
)
def test_bad_lists_in_parquet(tmp_path, columns, message):
    write_images(tmp_path, ["x.png"])
    write_parquet(tmp_path / "list.parquet", **columns)
    with pytest.raises(UserError, match=message):
        sources.load(config("image_csv", tmp_path / "list.parquet"))


def test_parquet_that_is_damaged(tmp_path):
    (tmp_path / "list.parquet").write_text("path,label\nx.png,0\n")
    with pytest.raises(UserError, match="list.parquet: cannot be read as Parquet"):
        sources.load(config("image_csv", tmp_path / "list.parquet"))


def test_all_that_is_wrong_with_a_list_is_said_at_once(tmp_path):
    write_images(tmp_path, ["x.png", "y.png", "z.png"])
    lines = ["path,label,split", "x.png,a,train", "y.png,b,train", "x.png,b,train", "z.png,c,test", "z.png,d,test"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        sources.load(config("image_csv", tmp_path / "list.csv"))
    line = f"{tmp_path}/list.csv, line"
    assert str(raised.value).splitlines() == [
        "3 things are wrong with what is listed:",
        f"  {line} 4: x.png has label 'b', but 'a' in {line} 2; keep one of the two",
        f"  {line} 6: z.png has label 'd', but 'c' in {line} 5; keep one of the two",
        f"  {line} 5: label 'c' is none of the 2 classes a, b",
    ]
    (tmp_path / "list.csv").write_text("path,label\nx.png,0\ny.png,1\n" + "".join(f"{k}.png,-1\n" for k in range(12)))
    with pytest.raises(UserError, match=r"12 things (?s:.*)line 4: label -1(?s:.*)line 13: (?s:.*)and 2 more$"):
        sources.load(config("image_csv", tmp_path / "list.csv"))
    (tmp_path / "list.csv").write_text("path,label\nx.png,0\ny.png,\n,1\n")
    with pytest.raises(UserError, match=r"2 things (?s:.*)line 3: path 'y.png'(?s:.*)line 4: path ''"):
        sources.load(config("image_csv", tmp_path / "list.csv"))


def test_clean_labels_of_test_and_trusted_images_are_their_labels(tmp_path):
    write_images(tmp_path, [f"{k}.png" for k in range(5)])
    (tmp_path / "list.csv").write_text(
        "path,label,clean_label,split\n0.png,0,1,train\n1.png,1,,train\n2.png,0,1,trusted\n3.png,0,,trusted\n"
        "4.png,1,0,test\n"
    )
    source = sources.load(config("image_csv", tmp_path / "list.csv"))
    assert source.train.labels.tolist() == [0, 1] and source.train.clean_labels.tolist() == [1, -1]
    assert source.trusted.labels.tolist() == source.trusted.clean_labels.tolist() == [1, 0]
    assert source.test.labels.tolist() == source.test.clean_labels.tolist() == [0]


def test_a_label_beyond_num_classes(tmp_path):
    write_images(tmp_path, ["x.png", "y.png"])
    (tmp_path / "list.csv").write_text("path,label\nx.png,0\ny.png,7\n")
    with pytest.raises(
        UserError, match=r"line 3: label 7, expected 0 to 4 \(data.num_classes=5\); with data.num_classes=0 "
    ):
        sources.load(config("image_csv", tmp_path / "list.csv", num_classes=5))
    (tmp_path / "list.csv").write_text("path,label\nx.png,0\ny.png,3\n")
    assert sources.load(config("image_csv", tmp_path / "list.csv", num_classes=5)).num_classes == 5


def test_bad_places(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        sources.load(config("image_folder", tmp_path / "none"))
    with pytest.raises(UserError, match="no such file"):
        sources.load(config("image_csv", tmp_path / "none.csv"))
    (tmp_path / "flat").mkdir()
    with pytest.raises(UserError, match="expected one for each class"):
        sources.load(config("image_folder", tmp_path / "flat"))
    write_images(tmp_path / "own", ["a/x.png", "b/y.png"])
    (tmp_path / "own" / "c").mkdir()
    with pytest.raises(UserError, match="class 'c' has no images"):
        sources.load(config("image_folder", tmp_path / "own"))
    (tmp_path / "latin.csv").write_bytes("path,label\nx.png,grün\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        sources.load(config("image_csv", tmp_path / "latin.csv"))


def test_folders_that_are_numbers_are_names_in_their_order(tmp_path):
    write_images(tmp_path / "own", [f"{number}/x.png" for number in (10, 2, 1)])
    source = sources.load(config("image_folder", tmp_path / "own"))
    assert source.class_names == ("1", "2", "10") and source.train.labels.tolist() == [0, 2, 1]
    assert source.train.names.tolist() == ["1/x.png", "10/x.png", "2/x.png"]


def test_links_are_followed_once(tmp_path):
    write_images(tmp_path / "own", ["a/x.png", "a/more/z.png", "b/y.png"])
    (tmp_path / "own" / "a" / "more" / "up").symlink_to(tmp_path / "own" / "a")
    (tmp_path / "elsewhere").mkdir()
    write_images(tmp_path / "elsewhere", ["w.png"])
    (tmp_path / "own" / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    source = sources.load(config("image_folder", tmp_path / "own"))
    assert source.train.names.tolist() == ["a/more/z.png", "a/x.png", "b/linked/w.png", "b/y.png"]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write_images(tmp_path / "own", ["a/x.png", "b/y.png", "b/more/z.png"])
    scandir = os.scandir

    def forbidden(path):
        if pathlib.Path(path).name == "more":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(image_files.os, "scandir", forbidden)
    with pytest.raises(UserError, match=r"b/more: cannot be listed \(Permission denied\)"):
        sources.load(config("image_folder", tmp_path / "own"))


@pytest.mark.parametrize("start", ["", "\n\n", "sep=;\n"])
def test_csv_as_other_programs_write_it(tmp_path, start):
    """Empty lines or Excel's line before the first; whole numbers as floats, and gaps as pandas writes them."""
    write_images(tmp_path, [f"{k}.png" for k in range(4)])
    rows = ["path;label;clean_label", "0.png;1;1.0", "1.png;2.0;nan", "2.png;10;", "3.png;02;2."]
    (tmp_path / "list.csv").write_text(start + "\n".join(rows))
    source = sources.load(config("image_csv", tmp_path / "list.csv"))
    assert source.class_names == ("1", "2", "10") and source.train.labels.tolist() == [0, 1, 2, 1]
    assert source.train.clean_labels.tolist() == [0, -1, -1, 1]
    (tmp_path / "list.csv").write_text(start + "\n".join([*rows, "3.png;-1"]))
    with pytest.raises(UserError, match=rf"list.csv, line {6 + start.count(chr(10))}: .*3.png has label '-1'"):
        sources.load(config("image_csv", tmp_path / "list.csv"))


def test_numbers_that_do_not_begin_at_zero(tmp_path):
    """Lists and folders alike; data.num_classes decides, unless as many other numbers occur."""
    names = ["1", "2", "10"]
    write_images(tmp_path / "own", [f"{name}/x.png" for name in names])
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"own/{name}/x.png,{name}\n" for name in names))
    for source, place in (("image_folder", tmp_path / "own"), ("image_csv", tmp_path / "list.csv")):
        for num_classes, classes in ((0, names), (3, names), (11, [str(number) for number in range(11)])):
            loaded = sources.load(config(source, place, num_classes=num_classes))
            assert loaded.class_names == tuple(classes)
            labels = dict(zip(loaded.train.names, loaded.train.labels.tolist(), strict=True))
            assert list(labels.values()) == [classes.index(name.split("/")[-2]) for name in labels]
        with pytest.raises(
            UserError, match="label 10, expected 0 to 3 .*the 3 numbers that occur are the classes, 1, 2"
        ):
            sources.load(config(source, place, num_classes=4))


def test_a_list_has_a_role(tmp_path):
    """Of rows that say their split only those of the list's role count, and of the rest it is told."""
    write_images(tmp_path, [f"{k}.png" for k in range(6)])
    rows = ["0.png,a,train", "1.png,b,train", "2.png,a,test", "3.png,b,test", "4.png,a,trusted", "5.png,b,trusted"]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *rows]))
    every = tmp_path / "all.csv"
    one = sources.load(config("image_csv", every))
    three = sources.load(config("image_csv", every, test=str(every), trusted=str(every)))
    for name in ("train", "test", "trusted"):
        assert getattr(one, name).names.tolist() == getattr(three, name).names.tolist()
    assert not one.notices
    assert three.notices[0] == f"data.train={every}: rows of other splits are not used (2 test, 2 trusted)"
    (tmp_path / "train.csv").write_text("\n".join(["path,label,split", *rows[:2]]))
    with pytest.raises(
        UserError, match=r"no row with split 'test' \(its column split says: 2 train\); mend the column"
    ):
        sources.load(config("image_csv", every, test=str(tmp_path / "train.csv")))


def test_what_a_scan_passes_over(tmp_path):
    write_images(tmp_path / "own", ["a/x.png", "b/y.png", "b/more/z.png", "a/@eaDir/x.png/thumb.png", "@eaDir/u.png"])
    write_images(tmp_path / "own", ["__MACOSX/a/x.png", "b/.ipynb_checkpoints/y.png"])
    for name in ("a/1.heic", "a/2.HEIC", "b/noending", "b/Thumbs.db"):
        (tmp_path / "own" / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "own" / "b" / "pipe.png")
    source = sources.load(config("image_folder", tmp_path / "own"))
    assert source.train.names.tolist() == ["a/x.png", "b/more/z.png", "b/y.png"] and source.class_names == ("a", "b")
    assert source.notices[0] == (
        "data.train: 3 files are passed over, as their ending is of no image (1 without an ending, 2 .heic)"
    )
    assert "are of the outer one (b/more); where the inner ones" in source.notices[1]
    write_images(tmp_path / "high", ["train/a/x.png", "train/b/y.png", "val/a/z.png"])
    with pytest.raises(
        UserError, match="train and val in it have folders and no images, so these are one level too hi"
    ):
        sources.load(config("image_folder", tmp_path / "high"))
    (tmp_path / "list.csv").write_text("path,label\nown/b/pipe.png,a\nown/a/x.png,b\n")
    with pytest.raises(UserError, match="own/b/pipe.png: no regular file"):
        sources.load(config("image_csv", tmp_path / "list.csv"))


def test_umlauts_composed_and_decomposed(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    assert composed != decomposed
    write_images(tmp_path, [f"{decomposed}.png", "y.png", "z.png"])
    (tmp_path / "list.csv").write_text(f"path,label\n{composed}.png,{composed}\ny.png,{decomposed}\nz.png,b\n")
    source = sources.load(config("image_csv", tmp_path / "list.csv"))
    assert source.class_names == tuple(sorted((composed, "b")))
    first, second, other = source.train.labels
    assert first == second != other
