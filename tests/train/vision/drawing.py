"""Pictures drawn here, the same ones every time, and tiny genuine bases that see."""

import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "square")
SIDE = 32


def drawn(number: int) -> tuple[Image.Image, Image.Image, int]:
    """A picture of one shape on a noisy ground, its mask (0 ground, then shapes), and the number of the shape."""
    chance = random.Random(number)
    shape = number % len(SHAPES)
    picture = Image.frombytes("RGB", (SIDE, SIDE), bytes(chance.randrange(0, 90) for _ in range(3 * SIDE * SIDE)))
    mask = Image.new("L", (SIDE, SIDE), 0)
    size, colour = chance.randrange(14, 22), tuple(chance.randrange(140, 256) for _ in range(3))
    left, top = chance.randrange(0, SIDE - size), chance.randrange(0, SIDE - size)
    box, third = (left, top, left + size, top + size), size // 3
    for image, ink in ((picture, colour), (mask, shape + 1)):
        pen = ImageDraw.Draw(image)
        if shape == 0:
            pen.ellipse(box, ink)
        elif shape == 1:
            pen.rectangle((left + third, top, left + 2 * third, top + size), ink)
            pen.rectangle((left, top + third, left + size, top + 2 * third), ink)
        else:
            pen.rectangle(box, ink)
    return picture, mask, shape


def draw_all(folder: Path, count: int) -> Path:
    """classes/<shape>/<number>.png, pictures/<number>.png and masks/<number>.png."""
    for name in ("pictures", "masks", *(f"classes/{shape}" for shape in SHAPES)):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        picture, mask, shape = drawn(number)
        picture.save(folder / f"classes/{SHAPES[shape]}/{number:03}.png")
        picture.save(folder / f"pictures/{number:03}.png")
        mask.save(folder / f"masks/{number:03}.png")
    return folder


def tiny(name: str, folder: Path) -> Path:
    """The folder of a tiny base of that family, without a head for a task."""
    if not folder.exists():
        torch.manual_seed(0)
        for part in _made(name):
            part.save_pretrained(folder)
    return folder


def _made(name: str) -> tuple[object, object]:
    import transformers as t

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    square = {"height": SIDE, "width": SIDE}

    if name == "vit":
        config = t.ViTConfig(image_size=SIDE, patch_size=8, **sizes)
        return t.ViTModel(config, add_pooling_layer=False), t.ViTImageProcessorPil(size=square)
    if name == "convnext":
        config = t.ConvNextConfig(patch_size=2, layer_scale_init_value=1.0, **stages)
        return t.ConvNextModel(config), t.ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=1.0)
    if name == "resnet":
        config = t.ResNetConfig(embedding_size=8, layer_type="basic", **stages)
        return t.ResNetModel(config), t.ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=1.0)
    if name == "upernet":
        names = ["stage1", "stage2", "stage3", "stage4"]
        backbone = t.ConvNextConfig(patch_size=2, layer_scale_init_value=1.0, out_features=names, **stages)
        config = t.UperNetConfig(backbone_config=backbone, hidden_size=16, pool_scales=[1, 2])
        return t.UperNetForSemanticSegmentation(config), t.SegformerImageProcessorPil(size=square)
    config = t.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 1, 2, 2],
        sr_ratios=[4, 2, 1, 1],
        strides=[2, 2, 2, 2],
        decoder_hidden_size=32,
        classifier_dropout_prob=0.0,
    )
    return t.SegformerModel(config), t.SegformerImageProcessorPil(size=square)
