"""cloneofsimo's files: factors in the order of a model's layers, which the shapes must confirm."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from veneer import AdapterError, files
from veneer.apart.changes import adapter_of, changes

CLASSES = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
EXTENDED = [*CLASSES["unet"], "ResnetBlock2D"]


def _counted(model, classes):
    """The layers as they count them: in each module of the classes, in turn."""
    for holder, module in model.named_modules():
        if type(module).__name__ in classes:
            for name, layer in module.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    yield f"{holder}.{name}"


def _order(pipeline, part, classes, then):
    """Then blocks were attn1, ff, attn2; now they are attn1, attn2, ff."""
    paths = list(_counted(getattr(pipeline, part), classes))
    if then:
        for place, path in enumerate(paths):
            if path.endswith("ff.net.0.proj"):
                paths.insert(place - 4, paths.pop(place))
    level = "text_model." if part == "text_encoder" else ""
    return [f"{part}.{level}{path}" for path in paths]


@pytest.fixture(params=[CLASSES["unet"], EXTENDED, ["CrossAttention"]], ids=["usual", "extended", "attention"])
def classes(request):
    return {**CLASSES, "unet": request.param}


def _merged(pipeline, adapter):
    for model in files.attach(pipeline, adapter).values():
        model.merge_and_unload()


@pytest.mark.parametrize("then", [True, False], ids=["then", "now"])
@pytest.mark.parametrize("given", [True, False], ids=["with the model", "without"])
def test_factors_go_where_they_were_counted(
    pipeline, factors, weights, expect_change, product, tmp_path, classes, then, given
):
    flat, about, wanted = {}, {}, {}
    for part, own in classes.items():
        about[part] = json.dumps(own)
        for place, path in enumerate(_order(pipeline, part, own, then)):
            A, B = factors[path]
            flat |= {f"{part}:{place}:down": A, f"{part}:{place}:up": B}
            about[f"{part}:{place}:rank"] = str(len(A))
            wanted[path] = product(A, B)
    save_file(flat, tmp_path / "one", metadata=about)
    assert files.detect(tmp_path / "one") == "cloneofsimo"
    before = weights(pipeline)
    _merged(pipeline, files.read(tmp_path / "one", model=pipeline if given else None))
    expect_change(before, weights(pipeline), wanted)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_the_old_list_is_of_one_part(pipeline, factors, tmp_path, part):
    paths = _order(pipeline, part, CLASSES[part], True)
    torch.save([nn.Parameter(t.half()) for path in paths for t in reversed(factors[path])], tmp_path / "lora.pt")
    adapter = files.read(tmp_path / "lora.pt")
    assert (adapter.parts, list(adapter.tensors)) == ((part,), paths)
    for path, own in adapter.tensors.items():
        assert torch.equal(own["A"], factors[path][0].half())
        assert torch.equal(own["B"], factors[path][1].half())
    model = getattr(pipeline, part)
    assert files.read(tmp_path / "lora.pt", model=model).tensors.keys() == adapter.tensors.keys()
    with pytest.raises(AdapterError, match="pickle is opened when you name the file itself"):
        files.read(tmp_path)


def test_what_is_written_is_read_back_with_zeros_for_the_rest(
    adapter, wanted, pipeline, weights, expect_change, tmp_path
):
    for ends, classes in (("attn2.to_k", ["Attention", "CrossAttention"]), ("ff.net.0.proj", sorted(CLASSES["unet"]))):
        own = {path: change for path, change in changes(adapter).items() if path.endswith((ends, "q_proj"))}
        own |= {path: change for path, change in changes(adapter).items() if path.endswith("attn2.to_k")}
        path = files.write(adapter_of(own, parts=adapter.parts), tmp_path / "a", "cloneofsimo", force=True)
        about = files.stored.mapped(path).about
        assert json.loads(about["unet"]) == classes
        count = len(_order(pipeline, "unet", CLASSES["unet"] if len(classes) == 3 else classes, True))
        assert len([name for name in load_file(path) if name.startswith("unet:")]) == 2 * count
        again = files.read(path)
        for name, change in changes(again).items():
            found = change.update().delta(torch.empty(1, device="meta"))
            expected = wanted[name].flatten(1) if name in own else torch.zeros(())
            torch.testing.assert_close(found.double(), expected.double().expand_as(found), rtol=1e-5, atol=1e-5)


def test_learned_tokens_are_named_in_a_warning(pipeline, factors, tmp_path):
    flat = {}
    for place, path in enumerate(_order(pipeline, "text_encoder", ["CLIPAttention"], True)):
        flat |= {f"text_encoder:{place}:down": factors[path][0], f"text_encoder:{place}:up": factors[path][1]}
    about = {"text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}
    save_file({**flat, "<s1>": torch.randn(10)}, tmp_path / "one", metadata=about)
    with pytest.warns(UserWarning, match="learned tokens are left out.*'<s1>'"):
        assert files.read(tmp_path / "one").parts == ("text_encoder",)


def test_layers_that_are_not_those_of_the_model_are_refused(pipeline, factors, tmp_path):
    paths = _order(pipeline, "unet", CLASSES["unet"], True)
    flat = {}
    for place, path in enumerate(paths):
        flat |= {f"unet:{place}:down": factors[path][0], f"unet:{place}:up": factors[path][1]}

    def told(tensors, **asked):
        save_file(tensors, tmp_path / "one", metadata={"unet": json.dumps(CLASSES["unet"])})
        with pytest.raises(AdapterError) as error:
            files.read(tmp_path / "one", **asked)
        return str(error.value)

    fewer = {name: tensor for name, tensor in flat.items() if ":143:" not in name}
    assert "it has 143 layers, and Stable Diffusion 1 or 2 has 144 such; give the model" in told(fewer)
    turned = {**flat, "unet:0:down": flat["unet:20:down"].clone(), "unet:0:up": flat["unet:20:up"].clone()}
    assert "shapes are not those of Stable Diffusion 1 or 2 in any order" in told(turned)
    assert "has no such part" in told(flat, model={"text_encoder": pipeline.text_encoder})
    assert "ups and downs that do not fit each other: 3 " in told({**flat, "unet:3:up": torch.randn(4, 9)})
    assert "missing: unet:7:up" in told({name: tensor for name, tensor in flat.items() if name != "unet:7:up"})
    assert "unexpected tensors: odd" in told({**flat, "odd": torch.randn(1)})


def test_what_the_format_cannot_hold_is_refused(adapter, tmp_path):
    with pytest.raises(AdapterError, match=r"unet: no layers that they count: conv_in \(4, 4\), "):
        files.write(adapter, tmp_path / "one", "cloneofsimo")
    assert not list(tmp_path.iterdir())
