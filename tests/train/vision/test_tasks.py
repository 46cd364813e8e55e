"""What is learned from pictures: each step's parts of them, the head, the figures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

from veneer.core.errors import AdapterError
from veneer.train.drawing.sheet import painted
from veneer.train.run import read_recipe
from veneer.train.task import Reporter
from veneer.train.vision.model import scaling
from veneer.train.vision.semantic_segmentation import confusion, figures, largest


@pytest.fixture
def built(base, shapes, tmp_path):
    """`built("vit", least=0.5)`: the task of a tiny base on drawn shapes."""

    def build(family: str, target="all-linear", dtype="float32", **data):
        pixels = family in ("segformer", "upernet")
        where = {"path": "pictures", "masks": "masks"} if pixels else {"path": "classes"}
        values = {
            "task": "semantic-segmentation" if pixels else "image-classification",
            "base": str(base(family)),
            "dtype": dtype,
            "device": "cpu",
            "adapter": {"r": 4, "target_modules": target},
            "data": {**{key: str(shapes / own) for key, own in where.items()}, "eval_share": 0.2, **data},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        recipe, task = read_recipe(str(file))
        return task(recipe, Reporter())

    return build


def test_what_is_learned_of_a_picture_depends_on_seed_step_and_row_alone(built):
    task = built("vit", least=0.3)

    def pixels(step: int, rows: list[int]) -> torch.Tensor:
        task.step = step
        torch.rand(step + 3)  # what others draw does not matter
        return task.batches(rows)[0].inputs["pixel_values"]

    first = pixels(5, [3, 4, 5])
    assert torch.equal(pixels(5, [5, 3]), first[[2, 0]])
    assert not torch.equal(pixels(6, [3]), first[:1])
    task.recipe.train.seed = 1
    assert not torch.equal(pixels(5, [3]), first[:1])


@pytest.mark.parametrize(
    ("family", "target", "heads"),
    [
        ("vit", "all-linear", ["classifier"]),
        ("convnext", "all-linear", ["classifier"]),
        ("resnet", ["convolution"], ["classifier"]),
        ("segformer", "attention", ["classifier", "linear_fuse", *(f"linear_projections.{i}" for i in range(4))]),
        ("upernet", "all-linear", ["classifier"]),
    ],
)
def test_a_new_head_is_trained_and_what_is_frozen_stays(built, family, target, heads):
    task = built(family, target)
    config = task.model.peft_config["default"]
    assert sorted(path.removeprefix("decode_head.") for path in config.modules_to_save) == sorted(heads)
    frozen = {name: value.clone() for name, value in task.model.state_dict().items() if ".adapters." not in name}
    task.model.train()
    optimizer = torch.optim.AdamW([own for own in task.model.parameters() if own.requires_grad], lr=0.01)
    for step in range(3):
        task.step = step
        task.loss(task.batches([0, 1, 2, 3])[0]).backward()
        optimizer.step()
    tensors = task.model.get_adapter().tensors
    assert tensors
    after = task.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(own.grad is not None for own in task.model.parameters() if own.requires_grad)


def test_pictures_of_a_table_are_learned_and_shown(base, shapes, tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    names = [f"{number:03}.png" for number in range(8)]
    columns = {
        kind: [{"bytes": (shapes / kind / name).read_bytes(), "path": None} for name in names]
        for kind in ("pictures", "masks")
    }
    features = Features({"pictures": Picture(), "masks": Picture(), "number": Value("int64")})
    Dataset.from_dict({**columns, "number": range(8)}, features=features).to_parquet(tmp_path / "rows.parquet")
    values = {"task": "semantic-segmentation", "base": str(base("segformer")), "dtype": "float32", "device": "cpu"}
    rows = {"path": str(tmp_path / "rows.parquet"), "image": "pictures", "mask": "masks", "eval_share": 0.3}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**values, "data": rows, "adapter": {"target_modules": "attention"}})
    )
    recipe, build = read_recipe(str(tmp_path / "recipe.yaml"))
    task = build(recipe, Reporter())
    assert task.batches([0, 1])[0].inputs["labels"].unique().tolist()[0] == 0
    assert task.sample()[0]["row"].startswith("rows.parquet, row ")
    assert task.draw(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 100
    assert len(task.made_of()["rows"]) == 64


def test_bfloat16_and_another_size(built):
    task = built("vit", dtype="bfloat16", size=48)
    batch = task.batches([0, 1])[0]
    assert batch.inputs["pixel_values"].shape == (2, 3, 48, 48)
    assert task.model.dtype == torch.bfloat16
    assert task.loss(batch).dtype == torch.float32
    assert 0 <= task.evaluate(True)["accuracy"] <= 1
    assert task.facts()["report"].sentences()


def test_new_layers_before_a_normalisation_give_it_variance_one(built):
    task = built("segformer")
    model = task.model.unload()
    head = model.decode_head
    nn.init.normal_(head.linear_fuse.weight, std=3.0)
    seen = []
    head.batch_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = task.batches(list(range(8)))[0].inputs["pixel_values"]
    with torch.no_grad():
        with scaling(model.eval(), ["decode_head.linear_fuse"], ["decode_head.batch_norm"]):
            model(pixel_values=pixels)
        model(pixel_values=pixels)
    spread = seen[-1].transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-3, rtol=1e-3)


def test_figures_of_masks_are_those_of_their_pixels():
    chance = np.random.default_rng(0)
    true, said = chance.integers(-1, 3, (9, 7)), chance.integers(0, 4, (9, 7))
    found = figures(confusion(true, said, 5))
    used = true >= 0
    ious = [
        ((true == i) & (said == i)).sum() / (((true == i) | (said == i)) & used).sum()
        for i in range(5)
        if (((true == i) | (said == i)) & used).any()
    ]
    assert found["mean_iou"] == pytest.approx(np.mean(ious))
    assert found["pixel_accuracy"] == pytest.approx((true == said)[used].mean())


def test_the_largest_class_is_found_in_parts(monkeypatch):
    from veneer.train.vision import semantic_segmentation

    logits = torch.randn(11, 5, 4)
    whole = F.interpolate(logits[None], size=(20, 33), mode="bilinear", align_corners=False)[0].argmax(0)
    monkeypatch.setattr(semantic_segmentation, "NUMBERS", 3 * 20 * 33)
    assert np.array_equal(largest(logits, (20, 33)), whole.numpy())


def test_masks_may_count_from_one_and_have_any_number_for_none(built, tmp_path, shapes):
    plain, reduced = built("segformer"), built("segformer", reduce_labels=True)
    assert (len(plain.data.labels), len(reduced.data.labels)) == (4, 3)
    mask = plain.mask(plain.part, 0)
    assert np.array_equal(reduced.mask(reduced.part, 0), mask - 1)
    without = built("segformer", ignore_index=0, labels=["a", "b", "c", "d"])
    assert np.array_equal(without.mask(without.part, 0), np.where(mask == 0, -1, mask))
    with pytest.raises(AdapterError, match="has the numbers 3: expected those of 3 classes"):
        built("segformer", labels=["a", "b", "c"])


def test_a_painted_mask_holds_its_numbers():
    numbers = np.array([[0, 1, -1], [20, 2, 1]])
    picture = painted(numbers, 21)
    assert np.asarray(picture).tolist() == [[0, 1, 255], [20, 2, 1]]
    assert picture.convert("RGB").getpixel((1, 0)) == (128, 0, 0)
    assert isinstance(picture, Image.Image)


@pytest.mark.parametrize("family", ["resnet", "segformer"])
def test_peft_reads_the_adapter_with_its_head(built, base, tmp_path, family):
    import peft
    import transformers

    task = built(family, ["convolution"] if family == "resnet" else "all-linear")
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    task.model.save_pretrained(tmp_path / "adapter")
    build = getattr(transformers, task.kind)
    model = build.from_pretrained(base(family), num_labels=len(task.data.labels))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(task.model.eval()(pixel_values=pixels).logits, theirs(pixel_values=pixels).logits)
