"""Starting values from data: they are what the papers say, change nothing to the bit, and leave nothing behind."""

import pytest
import torch
from torch import nn

import veneer
from veneer import AdapterError, LoraConfig, get_peft_model, initialize_lora_eva_weights, initialize_lora_ga_weights
from veneer.starts import eva

STARTS = {"eva": initialize_lora_eva_weights, "lora_ga": initialize_lora_ga_weights}
TARGETS = {"llama": ["q_proj", "k_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def text(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (rows, 9), generator=torch.manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


BATCHES = [text(3), text(4, 1), text(2, 2)]


def adapted(base: nn.Module, how: str, family: str = "llama", **settings: object) -> veneer.PeftModel:
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=how, target_modules=TARGETS[family], **settings)
    return get_peft_model(base, config)


def updates(model: nn.Module) -> dict[str, nn.Module]:
    return {path: layer.adapters["default"] for path, layer in veneer.core.inject.adapted_layers(model)}


@pytest.fixture(params=STARTS)
def how(request) -> str:
    return request.param


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj|c_attn": 2}}], ids=str
)
@pytest.mark.parametrize("family", TARGETS)
def test_it_changes_nothing_to_the_bit_and_learns(tiny, bits, how, family, settings):
    base = tiny(family)
    before, wanted = bits(base), base(**BATCHES[0]).logits
    model = adapted(base, how, family, **settings)
    fresh = {key: value for key, value in bits(model).items() if key.endswith(".A")}
    assert torch.equal(model(**BATCHES[0]).logits, wanted)
    STARTS[how](model, iter(BATCHES))
    after = bits(model)
    assert all(after[key] != value for key, value in fresh.items())
    assert {key: after[key] for key in before} == before
    assert torch.equal(model(**BATCHES[0]).logits, wanted)
    model.train()(**BATCHES[0]).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.any() for name, grad in grads.items() if name.endswith(".B"))
    assert bits(model.merge_and_unload()) == before


@pytest.mark.parametrize("most", [1, 10**9])
@pytest.mark.parametrize("family", TARGETS)
def test_eva_is_the_svd_of_all_the_inputs_that_count(tiny, family, most):
    model = adapted(tiny(family), "eva", family)
    inputs: dict[str, list[torch.Tensor]] = {path: [] for path in updates(model)}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: inputs[path].append(x[0]))
        for path in inputs
    ]
    with torch.no_grad(), model.disable_adapter():
        for batch in BATCHES:
            model(**batch)
    for handle in handles:
        handle.remove()
    initialize_lora_eva_weights(model, BATCHES, memory=most)
    for path, update in updates(model).items():
        X = torch.cat(
            [x[batch["attention_mask"] == 1] for x, batch in zip(inputs[path], BATCHES, strict=True)]
        ).double()
        V = torch.linalg.svd(X - X.mean(0)).Vh[:4]
        A = update.A.detach().double()
        torch.testing.assert_close(A @ A.T, torch.eye(4).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close((A @ V.T).abs(), torch.eye(4).double(), rtol=0, atol=1e-4)
        assert not update.B.any()


def test_what_is_shared_is_summed_once(tiny, monkeypatch):
    seen = []
    directions = eva._directions
    monkeypatch.setattr(eva, "_directions", lambda sums, r, path: seen.append(path) or directions(sums, r, path))
    model = adapted(tiny("llama"), "eva", rank_pattern={"k_proj": 6})
    initialize_lora_eva_weights(model, BATCHES)
    assert [path.rpartition(".")[2] for path in seen] == ["q_proj", "o_proj", "down_proj"] * 2
    layer = model.model.layers[0].self_attn
    q, k = (module.adapters["default"].A for module in (layer.q_proj, layer.k_proj))
    assert torch.equal(q, k[:4])
    assert len(k) == 6


@pytest.mark.parametrize("most", [1, 10**9])
@pytest.mark.parametrize("family", TARGETS)
def test_the_first_step_of_lora_ga_is_the_best_of_rank_2r(tiny, family, most):
    base = tiny(family).double()
    model = adapted(base, "lora_ga", family)
    initialize_lora_ga_weights(model, BATCHES, stable_gamma=9, memory=most)
    own = updates(model)
    weights = {path: model.get_submodule(path).weight.requires_grad_() for path in own}
    sum(model(**batch).loss for batch in BATCHES).backward()
    for path, update in own.items():
        layer = model.get_submodule(path)
        G = layer.matrix(weights[path].grad)
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        best = U[:, :8] * S[:8] @ Vh[:8]
        B, A = update.B0, update.A0
        moved = update.scale * (B @ update.A.grad + update.B.grad @ A)
        wanted = update.scale**2 * len(G) ** 0.5 / 9 * best
        assert (moved - wanted).norm() <= 1e-4 * wanted.norm()
        torch.testing.assert_close(A @ A.T, len(G) ** 0.5 / 9 * torch.eye(4).double())
        torch.testing.assert_close(B.T @ B, len(G) ** 0.5 / 9 * torch.eye(4).double())


def test_it_is_saved_as_a_plain_lora_for_the_untouched_base(tiny, bits, how, tmp_path):
    base = tiny("llama")
    model = adapted(base, how)
    model.save_pretrained(tmp_path / "before the data")
    STARTS[how](model, BATCHES)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    wanted = model(**BATCHES[0]).logits
    model.save_pretrained(tmp_path / "trained")
    base = model.unload()
    again = veneer.PeftModel.from_pretrained(base, tmp_path / "trained")
    torch.testing.assert_close(again(**BATCHES[0]).logits, wanted)
    again.load_adapter(tmp_path / "before the data", "early")
    assert again.peft_config["default"].init_lora_weights is True
    assert again.peft_config["default"].r == (8 if how == "lora_ga" else 4)


def _state(model: nn.Module, bits) -> object:
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return bits(model), hooks, flags, [module.training for module in model.modules()], vars(model.adapter_plan).copy()


@pytest.mark.parametrize("failing", range(4))
def test_an_error_leaves_nothing_behind(tiny, bits, how, failing):
    model = adapted(tiny("llama"), how).train()
    model.model.layers[1].eval()
    next(model.parameters()).requires_grad_()
    before, calls = _state(model, bits), []

    def fails(*_: object) -> None:
        calls.append(1)
        if len(calls) > failing:
            raise KeyError

    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(fails)
    within = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(KeyError):
        STARTS[how](model, BATCHES, memory=1)
    assert within == [len(module._forward_hooks) for module in model.modules()]
    handle.remove()
    assert _state(model, bits) == before
    STARTS[how](model, BATCHES)
    assert _state(model, bits)[1:] == before[1:]


def test_what_cannot_be_is_refused_by_name_and_changes_nothing(tiny, bits, how):
    start, other = STARTS[how], next(name for name in STARTS if name != how)

    def refused(model: nn.Module, said: str, batches: object = BATCHES, name: str = "default") -> None:
        before = _state(model, bits)
        with pytest.raises(AdapterError, match=said):
            start(model, batches, name)
        assert _state(model, bits) == before

    refused(adapted(tiny("llama"), other), f"init_lora_weights='{other}': make it with '{how}'")
    model = adapted(tiny("llama"), how)
    refused(model, "no batches", [])
    refused(model, "no adapter named 'defalt'.*did you mean", name="defalt")
    if how == "eva":
        refused(
            model,
            r"q_proj should see more than r=4 tokens, all finite, found 4",
            [{"input_ids": torch.arange(4)[None]}],
        )
    else:
        refused(
            model,
            "loss should give a number that depends on the weights, found None",
            [{"input_ids": BATCHES[0]["input_ids"]}],
        )
        refused(adapted(tiny("llama"), how, rank_pattern={"k_proj": 9}), "half of a layer's smaller side, .*k_proj")
    nn.init.normal_(next(iter(updates(model).values())).B)
    refused(model, "learned something already, in model.layers.0.self_attn.q_proj")
    conv = nn.Sequential(nn.Conv1d(2, 3, 2))
    refused(
        get_peft_model(conv, LoraConfig(target_modules=["0"], init_lora_weights=how)), "is for linear layers, not for 0"
    )


def test_a_layer_that_never_runs_is_named(how):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs, self.rests = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.runs(x)

    config = LoraConfig(r=2, target_modules=["runs", "rests"], init_lora_weights=how)
    model, more = get_peft_model(Half(), config), {}
    if how == "lora_ga":
        more = {"loss": lambda model, x: model(x).square().mean()}
    with pytest.raises(AdapterError, match=r"^rests "):
        STARTS[how](model, [torch.randn(9, 6)], **more)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"k_proj": 2}}], ids=str)
def test_ranks_are_dealt_out_by_explained_variance(tiny, tmp_path, settings):
    base = tiny("llama")
    model = adapted(base, "eva", alpha_pattern={"o_proj": 9}, **settings)
    before = {path: (len(update.A), update.scale) for path, update in updates(model).items()}
    wanted = model(**BATCHES[0]).logits
    initialize_lora_eva_weights(model, BATCHES, rho=2)
    assert torch.equal(model(**BATCHES[0]).logits, wanted)
    after = {path: len(update.A) for path, update in updates(model).items()}
    assert sum(after.values()) == sum(r for r, _ in before.values())
    assert all(1 <= r <= 2 * before[path][0] for path, r in after.items())
    assert any(r != before[path][0] for path, r in after.items())
    for path, update in updates(model).items():
        assert update.scale == before[path][1]
        assert update.B.shape == (len(model.get_submodule(path).weight), after[path])
        nn.init.normal_(update.B)
    wanted = model(**BATCHES[0]).logits
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(model.unload(), tmp_path)
    torch.testing.assert_close(again(**BATCHES[0]).logits, wanted)


def test_the_largest_shares_are_dealt_to():
    shares = {"a": torch.tensor([0.5, 0.3, 0.1]), "b": torch.tensor([0.05, 0.04]), "c": torch.tensor([0.6, 0.2])}
    assert eva._dealt(shares, 6) == {"a": 3, "b": 1, "c": 2}
    assert eva._dealt(shares, 4) == {"a": 2, "b": 1, "c": 1}


@pytest.mark.parametrize("rho", [0.5, float("nan"), "2", None])
def test_a_wrong_rho_is_refused(tiny, rho):
    with pytest.raises(AdapterError, match="rho should be a number of at least 1"):
        initialize_lora_eva_weights(adapted(tiny("llama"), "eva"), BATCHES, rho=rho)
