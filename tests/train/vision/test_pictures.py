"""How pictures and masks are read, found, and prepared."""

import json
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from train.vision.drawing import draw_all
from veneer import AdapterError
from veneer.train.data import pictures
from veneer.train.data.pictures import Said, read_pictures, read_sides
from veneer.train.data.reading import read_mask, read_picture
from veneer.train.settings import checked
from veneer.train.vision.preparing import Preparer, random_part
from veneer.train.vision.settings import ClassificationData

LABELS = Said(("label",), "label", None, of_folder=True)


def encoded(picture: Image.Image, kind: str = "PNG", **more) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def data(path, **more) -> ClassificationData:
    return checked(ClassificationData, {"path": str(path), **more}, "data")


def test_a_picture_is_read_as_people_see_it():
    red = (200, 0, 0)
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([200, 0, 0])
    deep = Image.fromarray(np.full((2, 4), 200 * 256, np.uint16))
    seen = {
        "transparent": (encoded(clear), (255, 255, 255)),
        "palette": (encoded(palette), red),
        "a transparent palette": (encoded(palette, transparency=0), (255, 255, 255)),
        "grey": (encoded(Image.new("L", (4, 2), 90)), (90, 90, 90)),
        "black and white": (encoded(Image.new("1", (4, 2), 1)), (255, 255, 255)),
        "16 bits": (encoded(deep), (200, 200, 200)),
        "CMYK": (encoded(Image.new("CMYK", (4, 2), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    }
    for name, (raw, colour) in seen.items():
        picture = read_picture(raw, name)
        assert (picture.mode, picture.size, picture.getpixel((3, 1))) == ("RGB", (4, 2), colour), name


def test_a_picture_is_turned_as_its_camera_was_held():
    picture = Image.new("RGB", (4, 2), (0, 0, 0))
    picture.putpixel((0, 0), (255, 255, 255))
    turned = Image.Exif()
    turned[0x0112] = 6  # held to the left: to be turned to the right
    upright = read_picture(encoded(picture, exif=turned), "p")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


def test_what_is_no_picture_is_named():
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    for raw, told in ((b"hello", "row 3: is no picture"), (whole[: len(whole) // 2], "row 3: cannot be read: ")):
        with pytest.raises(AdapterError, match=told):
            read_picture(raw, "row 3")


def test_masks_have_one_number_a_pixel():
    numbers = np.arange(6, dtype=np.uint8).reshape(2, 3)
    palette = Image.fromarray(numbers)
    palette.putpalette(list(range(48)))
    for picture in (Image.fromarray(numbers), palette, Image.fromarray(numbers).convert("RGB")):
        assert read_mask(encoded(picture), "m").tolist() == numbers.tolist()
    assert read_mask(encoded(Image.fromarray(numbers.astype(np.uint16) + 300)), "m").max() == 305
    with pytest.raises(AdapterError, match="the mask: expected a mask with one number a pixel, found RGB"):
        read_mask(encoded(Image.new("RGB", (3, 2), (1, 2, 3))), "the mask")


def test_folders_lists_and_tables_hold_the_same(tmp_path, shapes):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Picture

    names = sorted(path.relative_to(shapes / "classes") for path in (shapes / "classes").rglob("*.png"))[::10]
    columns = {"image": [str(shapes / "classes" / name) for name in names], "label": [n.parent.name for n in names]}
    features = Features({"image": Picture(), "label": ClassLabel(names=["circle", "cross", "square"])})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "beside").mkdir()
    lines = []
    for name, label in zip(names, columns["label"], strict=True):
        for place in (tmp_path / "folders/train" / name, tmp_path / "beside" / name.name):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes((shapes / "classes" / name).read_bytes())
        lines.append(json.dumps({"file_name": name.name, "label": label}))
    (tmp_path / "beside/metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "folders/train/circle/notes.txt").write_text("no picture")
    wanted = [(read_picture(shapes / "classes" / name, "p").tobytes(), name.parent.name) for name in names]
    for path in ("folders", "beside", "beside/metadata.jsonl", "rows.parquet"):
        own = data(tmp_path / path)
        found = read_pictures(own.path, "train", own, LABELS)
        assert [(read_picture(found.raw(i), "p").tobytes(), found.truth(i)) for i in range(len(found))] == wanted, path
        digest = found.digest()
        assert read_pictures(own.path, "train", own, LABELS).digest() == digest
        learned, held = read_sides(own.model_copy(update={"eval_share": 0.4}), 0, lambda held: LABELS)
        assert {*learned.rows} | {*held.rows} == {*range(len(names))}
        assert len(learned) + len(held) == len(names)
        assert held.digest() != digest != learned.digest()


def test_what_is_wrong_with_a_folder_is_said(tmp_path, shapes):
    def problem(path, said=LABELS, **more) -> str:
        own = data(path, **more)
        with pytest.raises(AdapterError) as error:
            read_pictures(own.path, own.split, own, said)
        return str(error.value)

    masks = Said(("mask",), "mask", None, str(tmp_path / "masks"), is_picture=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "list.csv").write_text("file_name,label\ngone.png,a\n")
    assert "expected pictures, or metadata.jsonl" in problem(tmp_path / "empty")
    assert "'000.png', '001.png'" in problem(shapes / "pictures")
    assert "expected a folder for each class" in problem(shapes / "pictures")
    assert "60 pictures" in problem(shapes / "pictures", masks)
    assert "line 2: file_name is 'gone.png', and no file beside the list" in problem(tmp_path / "list.csv")
    assert "did you mean 'classes'" in problem(shapes / "clases")
    assert "expected the column label='klass'" in problem(tmp_path / "list.csv", Said((), "label", "klass"))
    (tmp_path / "split/val").mkdir(parents=True)
    assert "has no folder 'train': found 'val'" in problem(tmp_path / "split")


def test_each_picture_and_each_mask_is_part_of_the_digest_and_no_place_is(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LOOKED_INTO", 1)  # of the others, the ends
    found = set()
    for name, place in (("one", tmp_path / "one"), ("two", tmp_path / "two")):
        draw_all(place, 6)
        monkeypatch.chdir(place)
        masks = Said(("mask",), "mask", None, masks="masks" if name == "one" else str(place / "masks"), is_picture=True)
        digest = read_pictures("pictures", "train", data("pictures"), masks).digest
        before = digest()
        for file in ("pictures/004.png", "masks/003.png"):
            kept = (place / file).read_bytes()
            (place / file).write_bytes(encoded(Image.open(BytesIO(kept)).transpose(Image.Transpose.ROTATE_90)))
            assert digest() != before, f"{name}: {file}"
            (place / file).write_bytes(kept)
        assert digest() == before
        found.add(before)
    assert len(found) == 1


def test_masks_lie_in_the_split_of_their_pictures(tmp_path, shapes):
    for split, number in (("training", "001"), ("validation", "002")):
        for kind in ("pictures", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
            (tmp_path / kind / split / f"{number}.png").write_bytes((shapes / kind / f"{number}.png").read_bytes())
    own = data(tmp_path / "pictures", split="training", eval_split="validation")
    said = Said(("mask",), "mask", None, str(tmp_path / "masks"), is_picture=True)
    for part, number in zip(read_sides(own, 0, lambda held: said), ("001", "002"), strict=True):
        assert len(part) == 1
        assert np.array_equal(read_mask(part.truth(0), "m"), read_mask(shapes / f"masks/{number}.png", "m"))


@pytest.mark.parametrize(("name", "size"), [("vit", None), ("convnext", None), ("vit", 48), ("convnext", 48)])
def test_pictures_are_prepared_as_the_base_says(base, name, size):
    picture = Image.effect_noise((60, 90), 60).convert("RGB")
    preparer = Preparer(base(name), size)
    side = size or 32
    assert preparer.size == (side, side)
    pixels = preparer.picture(picture)
    square = picture.resize((side, side), Image.Resampling.BILINEAR) if name == "vit" else None
    if square is not None:
        torch.testing.assert_close(pixels, torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1)
    part = preparer.part(picture, (0, 0, 60, 90), flip=True)
    assert part.shape == pixels.shape == (3, side, side)
    if name == "vit":
        torch.testing.assert_close(part.flip(-1), pixels)


def test_a_mask_goes_where_its_picture_goes(base):
    numbers = np.zeros((20, 40), np.int64)
    numbers[:10, :20] = 7
    numbers[10:, 20:] = -1
    preparer = Preparer(base("segformer"), None, whole=True)
    picture = Image.fromarray((numbers == 7).astype(np.uint8) * 255).convert("RGB")
    for box, flip in (((0, 0, 40, 20), False), ((4, 2, 36, 18), True)):
        mask, pixels = preparer.mask(numbers, box, flip), preparer.part(picture, box, flip)
        assert set(mask.unique().tolist()) == {-1, 0, 7}
        assert ((pixels[0] > 0) == (mask == 7)).float().mean() > 0.9


def test_random_parts_are_inside_and_of_their_size():
    for number in range(200):
        chance = random.Random(number)
        width, height = chance.randint(1, 300), chance.randint(1, 300)
        left, top, right, bottom = random_part(width, height, 0.25, chance)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (right - left) * (bottom - top) >= 0.2 * width * height - 300
    wide = [random_part(400, 100, 0.25, random.Random(number), 4.0) for number in range(50)]
    assert all(9 / 4 - 0.1 < (right - left) / (bottom - top) < 16 / 3 + 0.1 for left, top, right, bottom in wide)
