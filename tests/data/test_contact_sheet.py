import inspect

import numpy as np
import pytest
from PIL import Image, ImageOps
from runs import ROOT

from configs import default
from ieg_jax.data import augment, autoaugment, sheet
from ieg_jax.errors import UserError


@pytest.fixture(scope="module")
def image():
    return sheet.photograph(16)


@pytest.fixture(scope="module")
def drawn(image):
    config = default.get_config()
    config.augment.standard = "flip|crop(2)"
    return {row.title.split("\n")[0]: row for row in sheet.rows(image, config)}


def test_nothing_is_left_out(drawn):
    policies = ["augment.standard", "augment.strong", "augment.evaluation"]
    assert list(drawn) == [*autoaugment.PRIMITIVES, *augment.OPERATIONS, *policies]
    assert {len(row.tiles) for row in drawn.values()} == {6}
    assert drawn["augment.standard"].title == "augment.standard\nflip|\ncrop(2)"
    captions = [caption for caption, _ in drawn["Rotate"].tiles]
    assert captions == [f"level {level}: {3 * level}" for level in (0, 2, 4, 6, 8, 10)]


def test_a_tile_is_what_its_row_says(drawn, image):
    tiles = {name: [tile for _, tile in row.tiles] for name, row in drawn.items()}
    np.testing.assert_array_equal(tiles["Identity"][5], image)
    np.testing.assert_array_equal(tiles["Invert"][0], 255 - image)
    np.testing.assert_array_equal(tiles["Solarize"][2], ImageOps.solarize(Image.fromarray(image), 154))
    turned = Image.fromarray(image).rotate(30, fillcolor=(128, 128, 128))
    np.testing.assert_array_equal(tiles["Rotate"][5], turned)
    flipped = [np.array_equal(tile, image[:, ::-1]) for tile in tiles["flip"]]
    assert any(flipped) and all(np.array_equal(t, image) for t, f in zip(tiles["flip"], flipped, strict=True) if not f)
    np.testing.assert_array_equal(tiles["augment.evaluation"][3], image)


def test_each_row_shows_what_it_does(drawn, image):
    for name, row in drawn.items():
        changes = any(tile.shape != image.shape or (tile != image).any() for _, tile in row.tiles)
        assert changes == (name not in ("Identity", "augment.evaluation")), name


def test_the_docs_list_every_operation_with_its_parameters():
    text = (ROOT / "docs" / "data.md").read_text()
    for name, operation in augment.OPERATIONS.items():
        parameters = list(inspect.signature(operation).parameters.values())[2:]  # after image and seed
        written = ", ".join(f"{parameter.name}={parameter.default}" for parameter in parameters)
        assert f"| `{name}({written})` |" in text


def test_draw_puts_sheets_side_by_side():
    def row(*greys):
        return sheet.Row("", [("", np.full([4, 4, 3], grey, np.uint8)) for grey in greys])

    picture = sheet.draw([[row(10, 20), row(30)], [row(40), row(50, 60)]])
    # What is not white, in the order in which it is read.
    pixels = np.asarray(picture)[..., 0]
    lines = [line[np.isin(line, range(10, 70, 10))] for line in pixels]
    seen = [tuple(dict.fromkeys(line.tolist())) for line in lines if len(line) >= sheet.TILE]
    assert list(dict.fromkeys(seen)) == [(10, 20, 40), (30, 50, 60)]
    assert all(np.count_nonzero(pixels == grey) >= sheet.TILE**2 for grey in range(10, 70, 10))


def test_write_refuses_before_it_works(tmp_path):
    there = tmp_path / "there.png"
    there.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"there.png exists; name another file, or add --overwrite"):
        sheet.write(there, False, None)
    assert there.read_bytes() == b"mine"
    with pytest.raises(UserError, match=r"sheet.jpg: expected a name that ends in .png"):
        sheet.write(tmp_path / "sheet.jpg", False, None)


def test_write(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "SIDES", (8, 16))
    monkeypatch.setattr(augment, "OPERATIONS", {"flip": augment.flip})
    monkeypatch.setattr(autoaugment, "PRIMITIVES", {"Invert": autoaugment.PRIMITIVES["Invert"]})
    out = tmp_path / "new" / "sheet.png"
    assert sheet.write(out, False, None) == 2
    sheet.write(out, True, None)
    with Image.open(out) as picture:
        assert picture.size > (12 * sheet.TILE, 2 * sheet.TILE)
