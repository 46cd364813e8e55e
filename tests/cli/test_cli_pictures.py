"""Tasks on pictures, as a person runs them: train, resume, measure, ask, merge."""

import hashlib
import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from train.vision.drawing import draw_all, tiny
from veneer.train.record import read_metrics


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return draw_all(tmp_path_factory.mktemp("shapes"), 30)


@pytest.fixture
def recipe(tmp_path, tmp_path_factory):
    """`recipe("image-classification", "vit", folder, {"train": …})`: what trains a tiny base on drawn shapes."""

    def write(task: str, family: str, shapes: Path, more: dict | None = None) -> Path:
        pictures = {"path": str(shapes / "pictures"), "masks": str(shapes / "masks")}
        data = {"path": str(shapes / "classes")} if task == "image-classification" else pictures
        values = {
            "task": task,
            "base": str(tiny(family, tmp_path_factory.getbasetemp() / "seeing" / family)),
            "dtype": "float32",
            "device": "cpu",
            "output": str(tmp_path / "runs"),
            "name": "seeing",
            "adapter": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            "data": {**data, "eval_share": 0.2},
            "train": {"steps": 4, "batch_size": 4, "lr": 0.01},
            "sample": {"count": 2},
        }
        for key, value in (more or {}).items():
            values[key] |= value
        file = tmp_path / "seeing.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def sha(run: Path) -> str:
    return hashlib.sha256((run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def figures(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["figures"]


def test_a_classifier_of_pictures_is_trained_resumed_measured_asked_and_merged(
    veneer, recipe, shapes, tmp_path, monkeypatch
):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from veneer.train.vision.picture_task import PictureTask

    file = recipe(
        "image-classification", "vit", shapes, {"adapter": {"lora_dropout": 0.2}, "train": {"accumulation": 2}}
    )
    assert veneer("train", file, f"output={tmp_path / 'whole'}").code == 0
    loss, calls = PictureTask.loss, []

    def cutting(self, batch):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return loss(self, batch)

    monkeypatch.setattr(PictureTask, "loss", cutting)
    said, run = veneer("train", file), tmp_path / "runs/seeing-1"
    assert said.code == 128 + signal.SIGINT
    assert "classifier start at random: trained whole" in said.err.replace("\n", " ")
    said = veneer("train", file, "--resume")
    assert said.code == 0, said.err
    assert "goes on from step 3" in said.err
    assert " pictures/s " in said.err
    steps = [record for record in read_metrics(run) if "loss" in record]
    assert {record["pictures"] for record in steps} == {8}
    assert all(record.keys() == {"step", "loss", "lr", "pictures", "seconds"} for record in steps)
    assert sha(run) == sha(tmp_path / "whole/seeing-1")
    with Image.open(run / "samples/answers.png") as sheet:
        assert sheet.width > sheet.height
    measured = json.loads(veneer("evaluate", run, "--no-base", "--json").out)["adapted"]
    assert measured == figures(run)
    names = [str(path) for path in sorted((shapes / "classes").rglob("*.png"))]
    said = veneer("predict", run, "--dtype", "float32", "--picture", shapes / "classes")
    rows = list(map(json.loads, said.out.splitlines()))
    assert [row["picture"] for row in rows] == names
    assert veneer("merge", run, "--out", tmp_path / "merged").code == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    pictures = [Image.open(name).convert("RGB") for name in names]
    with torch.no_grad():
        share = model(**processor(pictures, return_tensors="pt")).logits.softmax(-1)
    assert [model.config.id2label[int(i)] for i in share.argmax(1)] == [row["label"] for row in rows]
    torch.testing.assert_close(share.max(1).values, torch.tensor([row["probability"] for row in rows]))


def test_pixels_are_told_apart_and_masks_written(veneer, recipe, shapes, tmp_path):
    from transformers import AutoModelForSemanticSegmentation

    said = veneer("train", recipe("semantic-segmentation", "segformer", shapes))
    run = tmp_path / "runs/seeing-1"
    assert said.code == 0, said.err
    assert {"eval_loss", "mean_iou", "pixel_accuracy"} == set(figures(run))
    sheet = run / "samples/answers.png"
    assert sheet.stat().st_size
    assert ["to", "look", "at", str(sheet)] in [line.split() for line in said.out.splitlines()]
    usage = json.loads((run / "adapter/veneer.json").read_text())
    assert usage["data"]["labels"] == [f"class {i}" for i in range(4)]
    file = shapes / "pictures/007.png"
    said = veneer("predict", run, "--picture", file, "--out", tmp_path / "masks")
    shares = json.loads(said.out)["shares"]
    with Image.open(tmp_path / "masks/007.png") as mask:
        counts = torch.tensor(list(mask.get_flattened_data())).bincount(minlength=4) / (32 * 32)
    assert shares == {f"class {i}": pytest.approx(float(share)) for i, share in enumerate(counts) if share}
    assert veneer("merge", run, "--out", tmp_path / "merged").code == 0
    model, found = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"]
    assert model.config.id2label[3] == "class 3"
    said = veneer("predict", run, "--text", "a shape")
    assert said.code == 2
    assert "ask it by `veneer predict --picture`" in said.err


def test_what_is_wrong_with_pictures_is_told_at_once(veneer, recipe, tmp_path):
    shapes = draw_all(tmp_path / "shapes", 12)
    (shapes / "classes/circle/000.png").write_bytes(b"no picture")
    (shapes / "classes/cross/001.png").write_bytes((shapes / "classes/cross/004.png").read_bytes()[:400])
    said = veneer("train", recipe("image-classification", "vit", shapes, {"data": {"eval_share": 0.0}}))
    assert said.code == 2
    for words in ("circle/000.png: is no picture", "cross/001.png: cannot be read"):
        assert words in said.err
    Image.new("L", (32, 32), 9).save(shapes / "masks/003.png")
    Image.new("L", (5, 6), 1).save(shapes / "masks/004.png")
    Image.new("L", (32, 32), 255).save(shapes / "masks/005.png")
    more = {"data": {"labels": ["ground", "circle", "cross", "square"], "eval_share": 0.0}}
    said = veneer("train", recipe("semantic-segmentation", "segformer", shapes, more))
    assert said.code == 2
    for words in ("003.png has the numbers 9", "32×32 points, and its mask 5×6", "005.png has no pixel with a class"):
        assert words in said.err
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "family", "more", "steps", "figure", "before", "after"),
    [
        ("image-classification", "resnet", {"target_modules": ["convolution"]}, 60, "accuracy", 0.45, 0.6),
        ("semantic-segmentation", "segformer", {}, 40, "mean_iou", 0.2, 0.4),
    ],
)
def test_drawn_shapes_are_learned(veneer, recipe, tmp_path, task, family, more, steps, figure, before, after):
    shapes = draw_all(tmp_path / "shapes", 150)
    settings = {"adapter": {"r": 16, "lora_alpha": 32, **more}, "train": {"steps": steps, "batch_size": 16}}
    file = recipe(task, family, shapes, {**settings, "data": {"least": 0.8}})
    assert veneer("train", file).code == 0
    lines = map(json.loads, (tmp_path / "runs/seeing-1/metrics.jsonl").read_text().splitlines())
    first, last = (record[figure] for record in lines if figure in record)
    assert first < before
    assert last > after
