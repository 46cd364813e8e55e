"""Each form of a layer's tensors, held to its formula from known factors; and written, read and held to it again."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from veneer.apart.changes import changes
from veneer.files import attach, kohya, lycoris

OUT, IN, R = 6, 8, 3
LINEAR, CONV, POINT = "unet.mid_block.attentions.0.proj_in", "unet.conv_in", "unet.conv_out"
NAME = {path: f"lora_{path.replace('.', '_')}" for path in (LINEAR, CONV, POINT)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def read(format, path: str, **own: Tensor):
    tensors = {f"{NAME[path]}.{name.replace('__', '.')}": tensor for name, tensor in own.items()}
    assert format.detects(tensors.keys(), {})
    adapter = format.read(tensors, {}, "here")
    assert adapter.parts == ("unet",)
    return adapter


def delta(adapter, path: str, W: Tensor) -> Tensor:
    return changes(adapter)[path].update(W.flatten(1)).delta(W.flatten(1)).reshape(W.shape)


def check(tmp_path, format, path: str, W: Tensor, expected: Tensor, **own: Tensor) -> None:
    """What is read is the formula's; so is what is written and read; so is it through LyCORIS's writer."""
    adapter = read(format, path, **own)
    assert torch.allclose(delta(adapter, path, W), expected, rtol=1e-10, atol=1e-12)
    for writer in {format, lycoris}:
        again = stored(writer, adapter, tmp_path / "again.safetensors")
        assert torch.allclose(delta(again, path, W), expected, rtol=1e-10, atol=1e-12)


def stored(format, adapter, path):
    from veneer.safe.stored import read_header, read_tensors

    format.write(adapter, path)
    header, about = read_header(path)
    tensors, wrong = read_tensors(path, header)
    assert wrong == []
    return format.read(tensors, about, str(path))


WEIGHTS = {LINEAR: (OUT, IN), CONV: (OUT, IN, 3, 3), POINT: (OUT, IN, 1, 1)}


@pytest.mark.parametrize("alpha", [None, 1.0, 4.5])
@pytest.mark.parametrize("names", [("lora_down__weight", "lora_up__weight"), ("lora_A__weight", "lora_B__weight")])
@pytest.mark.parametrize("path", WEIGHTS)
def test_lora(tmp_path, path, alpha, names):
    W = rand(*WEIGHTS[path])
    down, up = rand(R, *W.shape[1:]), rand(OUT, R, *[1] * (W.ndim - 2))
    scale = 1 if alpha is None else alpha / R
    expected = scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    own = dict(zip(names, (down, up), strict=True)) | ({} if alpha is None else {"alpha": number(alpha)})
    check(tmp_path, kohya, path, W, expected, **own)


def test_a_kernel_of_one_point_may_be_two_dimensional(tmp_path):
    W, down, up = rand(OUT, IN, 1, 1), rand(R, IN), rand(OUT, R)
    own = {"lora_down__weight": down, "lora_up__weight": up, "alpha": number(2)}
    check(tmp_path, kohya, POINT, W, (2 / R * up @ down).reshape(W.shape), **own)


@pytest.mark.parametrize("dims", [2, 4])
def test_lora_with_a_tucker_core(tmp_path, dims):
    W, mid = rand(OUT, IN, 3, 3), rand(R, R, 3, 3)
    down, up = rand(R, IN), rand(OUT, R)
    expected = 2 / R * torch.einsum("oi,ijhw,jn->onhw", up, mid, down)
    point = [1] * (dims - 2)
    own = {"lora_down__weight": down.reshape(R, IN, *point), "lora_up__weight": up.reshape(OUT, R, *point)}
    check(tmp_path, kohya, CONV, W, expected, **own, lora_mid__weight=mid, alpha=number(2))


@pytest.mark.parametrize("path", WEIGHTS)
def test_loha(tmp_path, path):
    W = rand(*WEIGHTS[path])
    a1, b1, a2, b2 = rand(OUT, R), rand(R, W[0].numel()), rand(OUT, R), rand(R, W[0].numel())
    expected = 2 / R * (torch.einsum("or,rn->on", a1, b1) * torch.einsum("or,rn->on", a2, b2)).reshape(W.shape)
    own = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": number(2)}
    check(tmp_path, lycoris, path, W, expected, **own)


def test_loha_with_tucker_cores(tmp_path):
    W, t1, t2 = rand(OUT, IN, 3, 3), rand(R, R, 3, 3), rand(R, R, 3, 3)
    a1, b1, a2, b2 = rand(R, OUT), rand(R, IN), rand(R, OUT), rand(R, IN)
    one, two = (torch.einsum("ijhw,io,jn->onhw", t, a, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    own = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t1": t1, "hada_t2": t2}
    check(tmp_path, lycoris, CONV, W, 5 / R * one * two, **own, alpha=number(5))


def kron(C: Tensor, D: Tensor) -> Tensor:
    """C ⊗ D, D being a matrix or a kernel, written out."""
    product = torch.einsum("lm,kn...->lkmn...", C, D)
    return product.reshape(len(C) * len(D), C.shape[1] * D.shape[1], *D.shape[2:])


@pytest.mark.parametrize("outer", [(2, 2), (1, 4), (3, 2), (2, 8), (6, 1)])  # any factorisation
@pytest.mark.parametrize("products", ["", "C", "D", "CD"])
@pytest.mark.parametrize("path", [LINEAR, CONV])
def test_lokr(tmp_path, path, outer, products):
    W = rand(*WEIGHTS[path])
    kernel = W.shape[2:]
    C, D = rand(*outer), rand(OUT // outer[0], IN // outer[1], *kernel)
    own, r = {"alpha": number(5)}, 1
    if "C" in products:
        own |= {"lokr_w1_a": rand(len(C), r), "lokr_w1_b": rand(r, C.shape[1])}
        C = own["lokr_w1_a"] @ own["lokr_w1_b"]
    else:
        own["lokr_w1"] = C
    if "D" in products:
        own |= {"lokr_w2_a": rand(len(D), r), "lokr_w2_b": rand(r, D[0].numel())}
        D = (own["lokr_w2_a"] @ own["lokr_w2_b"]).reshape(D.shape)
    else:
        own["lokr_w2"] = D
    scale = 5 / r if products else 1  # α says nothing where neither is a product
    check(tmp_path, lycoris, path, W, scale * kron(C, D), **own)


def test_lokr_with_a_tucker_core(tmp_path):
    W, C, t2, a, b = rand(OUT, IN, 3, 3), rand(2, 2), rand(R, R, 3, 3), rand(R, 3), rand(R, 4)
    expected = 2 / R * kron(C, torch.einsum("ijhw,ik,jn->knhw", t2, a, b))
    own = {"lokr_w1": C, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t2, "alpha": number(2)}
    check(tmp_path, lycoris, CONV, W, expected, **own)


def decomposed(V: Tensor, m: Tensor, dims: tuple[int, ...]) -> Tensor:
    return m * V / V.square().sum(dims, keepdim=True).sqrt()


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("path", WEIGHTS)
def test_dora_along_either_axis(tmp_path, path, inputs):
    W = rand(*WEIGHTS[path])
    down, up = rand(R, *W.shape[1:]), rand(OUT, R, *[1] * (W.ndim - 2))
    point = [1] * (W.ndim - 2)
    m = rand(*((1, IN) if inputs else (OUT, 1)), *point).abs() + 1
    V = W + 2 / R * torch.einsum("or,r...->o...", up.flatten(1), down)
    kept = 1 if inputs else 0
    expected = decomposed(V, m, tuple(dim for dim in range(W.ndim) if dim != kept)) - W
    own = {"lora_down__weight": down, "lora_up__weight": up, "alpha": number(2), "dora_scale": m}
    check(tmp_path, kohya, path, W, expected, **own)


@pytest.mark.parametrize("path", [LINEAR, CONV])
def test_dora_over_loha(tmp_path, path):
    W = rand(*WEIGHTS[path])
    a1, b1, a2, b2 = rand(OUT, R), rand(R, W[0].numel()), rand(OUT, R), rand(R, W[0].numel())
    m = rand(OUT, *[1] * (W.ndim - 1)).abs() + 1
    V = W + 2 / R * ((a1 @ b1) * (a2 @ b2)).reshape(W.shape)
    expected = decomposed(V, m, tuple(range(1, W.ndim))) - W
    own = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": number(2), "dora_scale": m}
    check(tmp_path, lycoris, path, W, expected, **own)


def test_old_files_with_a_scalar(tmp_path):
    W, down, up = rand(OUT, IN), rand(R, IN), rand(OUT, R)
    own = {"lora_down__weight": down, "lora_up__weight": up, "alpha": number(2), "scalar": number(0.25)}
    check(tmp_path, kohya, LINEAR, W, 0.25 * 2 / R * up @ down, **own)


@pytest.mark.parametrize("path", WEIGHTS)
def test_whole_changes(tmp_path, path):
    D, b = rand(*WEIGHTS[path]), rand(OUT)
    adapter = read(lycoris, path, diff=D, diff_b=b)
    for one in (adapter, stored(lycoris, adapter, tmp_path / "again.safetensors")):
        update = changes(one)[path].update()
        assert torch.equal(update.delta(D.flatten(1)), D.flatten(1))
        assert torch.equal(update.shift(None), b)


@pytest.mark.parametrize("own", [["w_norm"], ["w_norm", "b_norm"]])
def test_changes_of_norm_layers(tmp_path, own):
    tensors = {name: rand(OUT) for name in own}
    adapter = read(lycoris, CONV, **tensors)
    for one in (adapter, stored(lycoris, adapter, tmp_path / "again.safetensors")):
        delta = changes(one)[CONV].update(rand(OUT, 2)).delta(rand(OUT, 2))  # a norm layer's scale and bias
        zero = torch.zeros(OUT, dtype=torch.float64)
        assert torch.equal(delta, torch.stack([tensors.get("w_norm", zero), tensors.get("b_norm", zero)], 1))


ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_ia3_by_rows_and_by_columns(tmp_path, dtype):
    W, rows, columns = rand(OUT, IN), rand(OUT).to(dtype), rand(IN).to(dtype)
    own = {ATTENTION: (rows, 0, rows[:, None]), LINEAR: (columns, 1, columns)}
    tensors = {}
    for path, (w, on_input, _) in own.items():
        name = f"lora_{path.replace('.', '_')}"
        tensors |= {f"{name}.weight": w, f"{name}.on_input": torch.tensor(on_input)}
    adapter = lycoris.read(tensors, {}, "")
    for one in (adapter, stored(lycoris, adapter, tmp_path / "again.safetensors")):
        for path, (_, _, scales) in own.items():
            expected = W * (1 + scales.double()) - W
            tolerance = 1e-10 if dtype == torch.float64 else 1e-6  # 1 + w is in fp32, w in fp16
            assert torch.allclose(delta(one, path, W), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("on_input", [0, 1])
@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_ia3_on_layers_with_a_bias_leaves_it_as_it_is(tmp_path, on_input, kernel):
    layer = nn.Linear(IN, OUT) if kernel is None else nn.Conv2d(IN, OUT, kernel)
    model = nn.Sequential(OrderedDict(own=layer)).double()
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    number = IN if on_input else OUT
    points = [1] * (W.ndim - 2)
    w = rand(number).reshape(1, -1, *points) if W.ndim > 2 else rand(number)
    adapter = lycoris.read({"lycoris_own.weight": w, "lycoris_own.on_input": torch.tensor(on_input)}, {}, "")
    shape = (1, -1, *points) if on_input else (-1, 1, *points)
    x = rand(2, IN) if kernel is None else rand(2, IN, 5, 5)
    for one in (adapter, stored(lycoris, adapter, tmp_path / "again.safetensors")):
        attach(model, one)
        live = model(x)
        model.merge_adapter()
        assert torch.allclose(layer.weight, W * (1 + w.reshape(shape)), rtol=1e-6)  # 1 + w is kept in fp32
        assert torch.equal(layer.bias, b)
        assert torch.allclose(live, model(x), rtol=1e-6, atol=1e-6)
        model.unload()


def test_a_file_of_many_methods(tmp_path):
    W, D = rand(OUT, IN), rand(OUT, IN)
    a1, b1, a2, b2 = rand(OUT, R), rand(R, IN), rand(OUT, R), rand(R, IN)
    C, E = rand(2, 2), rand(3, 4)
    expected = {"one": D, "two": 2 / R * (a1 @ b1) * (a2 @ b2), "three": kron(C, E), "four": 3 * a1 @ b1}
    own = {
        "one": {"diff": D},
        "two": {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": number(2)},
        "three": {"lokr_w1": C, "lokr_w2": E, "alpha": number(7)},
        "four": {"lora_up.weight": a1, "lora_down.weight": b1, "alpha": number(3 * R)},
    }
    tensors = {f"lycoris_{layer}.{name}": tensor for layer, named in own.items() for name, tensor in named.items()}
    adapter = lycoris.read(tensors, {"ss_network_args": '{"algo": "mixed"}'}, "")
    for one in (adapter, stored(lycoris, adapter, tmp_path / "again.safetensors")):
        assert one.parts == ()
        assert one is adapter or one.metadata["ss_network_module"] == "lycoris.kohya"
        for layer, change in expected.items():
            assert torch.allclose(delta(one, layer, W), change, rtol=1e-10)


def test_a_scale_of_lokr_without_products_is_folded(tmp_path):
    C, E = rand(2, 2), rand(3, 4)
    tensors = {"lycoris_one.lokr_w1": C, "lycoris_one.lokr_w2": E, "lycoris_one.scalar": number(0.3)}
    adapter = lycoris.read(tensors, {}, "")
    for one in (adapter, stored(lycoris, adapter, tmp_path / "again.safetensors")):
        assert torch.allclose(delta(one, "one", rand(OUT, IN)), 0.3 * kron(C, E), rtol=1e-10)
