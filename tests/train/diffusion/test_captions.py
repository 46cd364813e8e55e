"""Pictures with captions: how they are found, what is said of them at a step, and what is named before the training."""

import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from train.diffusion.captioned import Heard, folder, picture, read
from veneer.core.errors import AdapterError


def problem(path: Path | str, **more) -> str:
    with pytest.raises(AdapterError) as error:
        read(path, **more)
    return str(error.value)


def test_folders_lists_and_tables_say_the_same(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    own = folder(tmp_path / "beside", {f"{i}.png": f"thing {i}" for i in range(5)})
    rows = [{"file_name": f"{i}.png", "text": f"thing {i}"} for i in range(5)]
    for name in ("listed", "written", "table", "captioned"):
        folder(tmp_path / name, {f"{i}.png": None for i in range(5)})
    (tmp_path / "listed/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = ["file_name,prompt", *(f"{row['file_name']},{row['text']}" for row in rows)]
    (tmp_path / "written/metadata.csv").write_text("\n".join(lines))
    (tmp_path / "table/rows.tsv").write_text("\n".join(line.replace(",", "\t") for line in lines))
    for row in rows:
        (tmp_path / "captioned" / row["file_name"]).with_suffix(".caption").write_text(row["text"] + "\n")
    columns = {"image": [str(own / row["file_name"]) for row in rows], "blip": [[row["text"]] for row in rows]}
    features = Features({"image": Picture(), "blip": List(Value("string"))})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "hub/data").mkdir(parents=True)
    own_rows = Dataset.from_dict({"image": columns["image"], "caption": [row["text"] for row in rows]})
    own_rows.cast_column("image", Picture()).to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    expected, _ = read(own)
    assert [expected.caption(row) for row in range(5)] == [row["text"] for row in rows]
    for path, more in {
        "listed": {},
        "written": {},
        "table/rows.tsv": {},
        "captioned": {},
        "rows.parquet": {"caption": "blip"},
        "hub": {},
    }.items():
        found, held_out = read(tmp_path / path, **more)
        assert (len(found), len(held_out)) == (5, 0)
        assert found.digest() == expected.digest(), path
        assert all((found.picture(row)[0] == expected.picture(row)[0]).all() for row in range(5))


def test_what_is_said_and_seen_is_decided_by_the_step(tmp_path):
    own = folder(tmp_path, {f"{i}.png": f"one {i}\n\ntwo {i}\n" for i in range(4)})
    found, _ = read(own, trigger="sks", caption_dropout=0.25, flip=True, crop="random")
    said = Counter(found.caption(2, Random(f"{step}")) for step in range(4000))
    assert set(said) == {"", "sks, one 2", "sks, two 2"}
    assert abs(said[""] / 4000 - 0.25) < 0.03
    assert abs(said["sks, one 2"] - said["sks, two 2"]) < 300
    assert found.caption(2) == "sks, one 2"
    for trigger, said in (("one", "one 2"), ("on", "on, one 2"), ("2", "one 2")):
        assert read(own, trigger=trigger)[0].caption(2) == said, "what has the trigger keeps its words"
    assert found.spoken() == ["", *(f"sks, {word} {i}" for i in range(4) for word in ("one", "two"))]
    pixels, view = found.picture(1, Random(7))
    again, same = found.picture(1, Random(7))
    assert (pixels == again).all()
    assert view == same
    assert len({found.view(1, Random(step)) for step in range(99)}) > 10
    assert found.view(1) == found.view(1)


def test_held_out_pictures_are_never_learned_nor_changed(tmp_path):
    own = folder(tmp_path, {f"{i}.png": f"thing {i}" for i in range(20)})
    learned, held_out = read(own, eval_share=0.3, caption_dropout=1.0)
    names = [{part.name(row) for row in range(len(part))} for part in (learned, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 20
    assert held_out.caption(0, Random(0)).startswith("thing")
    assert learned.caption(0, Random(0)) == ""
    assert learned.digest() != held_out.digest()


def test_pictures_without_captions_are_named_with_the_ways_out(tmp_path):
    from datasets import Dataset
    from datasets import Image as Picture

    own = folder(tmp_path, {"a.png": "a", "b.png": None, "c.png": " \n", "deep/d.png": None})
    told = problem(own)
    assert "3 of 4 pictures have no caption: 'b.png', 'c.png', 'deep/d.png'. Write it into b.txt beside" in told
    assert "data.instance_prompt='a photo of sks dog'" in told
    found, _ = read(own, instance_prompt="a photo of sks dog")
    assert [found.caption(row) for row in range(4)] == ["a", *["a photo of sks dog"] * 3]
    for name in ("d.png", "e.png"):
        (own / name).write_bytes((own / "a.png").read_bytes())
        (own / name).with_suffix(".txt").write_text("x")
    (own / "a.txt").write_bytes("é".encode("latin-1"))
    (own / "b.txt").write_bytes(b"\xff")
    (own / "c.png").write_bytes(b"no picture")
    told = problem(own, eval_share=0.5)
    assert told.count("is not UTF-8") == 2, "all faults of both sides are in one error"
    assert "c.png: is no picture" in told
    assert told.count("pictures have no caption") >= 1
    listed = folder(tmp_path / "listed", {"a.png": None})
    (listed / "metadata.jsonl").write_text('{"file_name": "a.png", "text": {"en": 1}}')
    assert "a.png: expected a caption, or a list of them, found {'en': 1}" in problem(listed)
    (listed / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    assert "1 of 1 pictures have no caption" in problem(listed)
    assert "expected the column caption='txet'" in problem(listed, caption="txet")
    assert read(listed, instance_prompt="x")[0].caption(0) == "x"
    rows = {"image": [str(own / "d.png"), str(own / "e.png")], "text": [None, "said"]}
    for name, columns in (("none", ["image"]), ("some", ["image", "text"])):
        table = Dataset.from_dict({column: rows[column] for column in columns}).cast_column("image", Picture())
        table.to_parquet(tmp_path / f"{name}.parquet")
    assert "2 of 2 pictures have no caption: 'row 1', 'row 2'" in problem(tmp_path / "none.parquet")
    assert "1 of 2 pictures have no caption: 'row 1'" in problem(tmp_path / "some.parquet")
    assert read(tmp_path / "none.parquet", instance_prompt="x")[0].caption(1) == "x"


def test_folders_of_kohya_are_repeated(tmp_path):
    names = {"3_sks dog/a.png": None, "3_sks dog/b.png": "b", "1_sks cat/c.png": None}
    own, heard = folder(tmp_path / "all", names), Heard()
    found, _ = read(own, heard)
    expected = Counter({"sks dog": 3, "b": 3, "sks cat": 1})
    assert Counter(found.caption(row) for row in range(len(found))) == expected
    assert "'1_sks cat' 1 times, '3_sks dog' 3 times; data.repeats=false" in heard.told[-1]
    assert "2 of 3 pictures have no caption" in problem(own, repeats=False)
    folder(own, {"others/d.png": "d"})
    assert "no caption: '1_sks cat/c.png', '3_sks dog/a.png'" in problem(own), "not all folders are named so"


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    file = BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def test_every_kind_of_picture_is_used_or_named(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    good = {
        "clear.png": encoded(Image.new("RGBA", (40, 32), (0, 0, 0, 0))),
        "deep.png": encoded(Image.fromarray(np.full((32, 40), 255 << 8, np.uint16))),
        "ink.jpg": encoded(Image.new("CMYK", (40, 32), (0, 0, 0, 0)), "JPEG"),
        "moving.gif": encoded(picture(0), "GIF", save_all=True, append_images=[picture(1), picture(2)]),
        "turned.png": encoded(picture(0, (32, 40)), exif=turned),
        "upscaled.png": encoded(picture(0, (10, 8))),
    }
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)
    heard = Heard()
    found, _ = read(tmp_path, heard, instance_prompt="x")
    assert [found.original(row) for row in range(6)] == [*[(40, 32)] * 5, (10, 8)]
    for row in range(3):
        assert (found.picture(row)[0] == 1).all(), "white"
    assert "1 of 6 pictures are smaller than what is learned, and are enlarged: upscaled.png (10×8)" in heard.told
    assert "of 1 animated pictures the first frame is learned: 'moving.gif'" in heard.told
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.png").write_bytes(b"hello")
    told = problem(tmp_path, instance_prompt="x")
    assert told.startswith("2 of 8 pictures cannot be used: ")
    assert f"{tmp_path}, half.jpg: cannot be read: " in told
    assert f"{tmp_path}, none.png: is no picture. Mend or remove them" in told
    for name in ("half.jpg", "none.png"):
        (tmp_path / name).write_bytes(encoded(picture(0, (3, 2))))
    told = problem(tmp_path, instance_prompt="x")
    assert "2 pictures are too small to be learned at 32×32: half.jpg (3×2), none.png (3×2). Remove them" in told


def test_pictures_are_looked_at_once(tmp_path):
    own, heard = folder(tmp_path / "own", {f"{i}.png": "x" for i in range(3)}), Heard()
    digests = [read(own, heard)[0].digest() for _ in range(2)]
    assert digests[0] == digests[1]
    assert heard.done == [(f"{own}: reading pictures", 3, 3)]
    picture(9).save(own / "1.png")
    assert read(own, heard)[0].digest() != digests[0]
    assert len(heard.done) == 2


def test_buckets_keep_more_of_pictures_and_say_so(tmp_path):
    own, heard = folder(tmp_path, {f"{i}.png": "x" for i in range(3)}, (128, 32)), Heard()
    square, _ = read(own, heard)
    assert "cropping cuts off 75% of the pictures on average; data.buckets=true would keep more" in heard.told
    wide, _ = read(own, heard, buckets={"smallest": 8, "largest": 64})
    assert (square.targets(), wide.targets()) == ({(32, 32): 3}, {(64, 16): 3})
    assert wide.view(0).lost == 0
    pixels, view = wide.picture(0)
    assert pixels.shape == (3, *view.target[::-1])
    assert wide.groups() is None
    picture(9, (50, 50)).save(own / "1.png")
    both, _ = read(own, buckets={"smallest": 8, "largest": 64})
    assert both.groups().tolist() == [0, 1, 0]
