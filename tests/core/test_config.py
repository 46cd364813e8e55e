"""`LoraConfig`: what it accepts, what it says, and how it reads PEFT's files."""

import json
import math
from dataclasses import fields

import pytest

from veneer import AdapterError, LoraConfig
from veneer.core.config import scaling

NAN, INFINITY = math.nan, math.inf
OUT_OF_RANGE = {
    "r": (0, -1, 1.5, True, "8", None),
    "lora_alpha": (NAN, INFINITY, "8", None, True),
    "lora_dropout": (1, 1.0, -0.1, NAN, "0", None),
    "use_rslora": ("no", 1, None),
    "use_dora": ("no", 1, None),
    "options": (None, [], "x"),
    "target_modules": ("", [], [""], [1], 3, {}),
    "exclude_modules": ("", [], ["q", ""], 3),
    "layers_pattern": ("(", "layers", [3]),  # the second one only because layers_to_transform is not given
    "layers_to_transform": (-1, [-1], [0.5], "1", [None]),
    "rank_pattern": (None, [], {"q": 0}, {"q": 1.5}, {"(": 2}),
    "alpha_pattern": (None, [], {"q": NAN}, {"q": "1"}, {"(": 2}),
    "method_pattern": (None, [], {"q": 3}, {"q": {"r": 2}}, {"(": {}}, {"q": {"options": 3}}),
    "init_lora_weights": (None, [], 2, "pizza", "true", "pissa_niter_", "pissa_niter_-1", "xpissa_niter_4"),
    "peft_type": (None, 3, []),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, values in OUT_OF_RANGE.items() for v in values], ids=str
)
def test_a_value_out_of_range_is_named_with_what_was_expected_and_found(name, value):
    with pytest.raises(AdapterError) as error:
        LoraConfig(**{name: value})
    assert str(error.value).startswith(f"LoraConfig: {name} should be ")
    assert f"found {value!r}" in str(error.value)


def test_all_problems_are_in_one_message():
    with pytest.raises(AdapterError) as error:
        LoraConfig(**{name: values[0] for name, values in OUT_OF_RANGE.items()})
    assert all(f"{name} should be " in str(error.value) for name in OUT_OF_RANGE)


@pytest.mark.parametrize(
    "junk", [None, True, -1, 0, 1.5, NAN, "x", "(", [], [[]], [None], {}, {"(": []}, {"x": None}], ids=str
)
@pytest.mark.parametrize("name", [f.name for f in fields(LoraConfig) if f.name != "unknown"])
def test_junk_from_a_file_is_a_config_or_an_adapter_error(name, junk):
    try:
        config = LoraConfig.from_dict({name: junk})
    except AdapterError:
        return
    assert LoraConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "names", [("v", "q"), {"v", "q"}, frozenset("qv"), ["q", "v"]], ids=lambda names: type(names).__name__
)
def test_names_become_a_list_that_json_can_hold(names):
    assert sorted(LoraConfig(target_modules=names).target_modules) == ["q", "v"]
    assert isinstance(LoraConfig(target_modules={"v", "q"}).target_modules, list)


def test_what_is_wrong_with_methods_of_layers_is_named():
    wrong = {"q": {"peft_type": "LOCR"}, "k": {"options": {"lora_bais": True}}, "v": {"use_dora": 1}}
    with pytest.raises(AdapterError) as error:
        LoraConfig(method_pattern=wrong)
    for said in ("'q': LoraConfig: peft_type 'LOCR' is not", "not 'lora_bais'; did you", "'v': LoraConfig: use_dora"):
        assert f"method_pattern {said}" in str(error.value) or said in str(error.value)
    with pytest.raises(AdapterError, match=r"method_pattern 'q': .*init_lora_weights should be one of"):
        LoraConfig(init_lora_weights="pissa", method_pattern={"q": {"peft_type": "LOHA"}})
    for stuck in ({"peft_type": "VERA"}, {"options": {"fused": {"c_attn": [1, 0, 1]}}}):
        for config in ({"method_pattern": {"q": stuck}}, {**stuck, "method_pattern": {"q": {"use_dora": True}}}):
            with pytest.raises(AdapterError, match=r"method_pattern is not for an adapter of .*: use one method"):
                LoraConfig(**config)


def test_methods_of_layers_are_written_only_where_there_are_some():
    assert "method_pattern" not in LoraConfig().to_dict()
    config = LoraConfig(method_pattern={"q": {"peft_type": "LOKR", "options": {"decompose_factor": 4}}})
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [own.peft_type for own in config.by_method()] == ["LORA", "LOKR"]
    assert config.by_method()[1].options == {"decompose_both": False, "decompose_factor": 4}


def test_to_dict_and_from_dict_are_inverse_and_json():
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q"], lora_dropout=0.1, use_rslora=True, rank_pattern={"q": 2},
        alpha_pattern={"q": 1.5}, layers_to_transform=[1], layers_pattern="h", exclude_modules="x", task_type="T",
        modules_to_save=["s"], trainable_token_indices={"e": [3, 1]}, ensure_weight_tying=True, bias="all",
    )  # fmt: skip
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values",
    [
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"kasa_config": {"beta": 1e-4}},
        {"arrow_config": {"top_k": 3}},
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(values):
    (key,) = values
    with pytest.raises(AdapterError, match=f"^file.json: {key}=.* is not supported"):
        LoraConfig.from_dict(values, where="file.json")


def test_the_values_at_which_peft_does_nothing_are_read_in_silence():
    from peft import LoraConfig as Theirs

    config = LoraConfig.from_dict(json.loads(json.dumps(Theirs(target_modules=["q"]).to_dict(), default=list)))
    assert config == LoraConfig(target_modules=["q"])


def test_our_defaults_and_names_are_those_of_peft():
    from peft import LoraConfig as Theirs

    theirs = Theirs().to_dict()
    for name, value in LoraConfig().to_dict().items():
        assert (theirs[name] or None) == (value or None), name


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_scaling(rslora, scale):
    assert scaling(4, 16, rslora) == scale


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("LOKR", {"decompose_facto": 4}, "LOKR has .*, not 'decompose_facto'; did you mean 'decompose_factor'"),
        ("LOKR", {"decompose_factor": 0}, "decompose_factor should be -1 or a whole number of at least 1, found 0"),
        ("LOHA", {"freeze_A": True}, "LOHA has nothing, not 'freeze_A'"),
        ("VERA", {"d_initial": NAN}, "d_initial should be a finite number, found nan"),
    ],
)
def test_options_are_checked_by_the_method_that_declares_them(kind, options, said):
    with pytest.raises(AdapterError, match=f"^LoraConfig: .*{said}"):
        LoraConfig(peft_type=kind, options=options)
    with pytest.raises(AdapterError, match=r"'LOKRR' is not a method of veneer.*did you mean 'LOKR'"):
        LoraConfig(peft_type="LOKRR")


@pytest.mark.parametrize(
    ("key", "value"), [("rank_dropout", 0.1), ("module_dropout", 0.1), ("use_effective_conv2d", True)]
)
def test_what_of_lycoris_is_not_built_is_refused_by_name(key, value):
    with pytest.raises(AdapterError, match=f"{key}={value} is not supported"):
        LoraConfig.from_dict({"peft_type": "LOKR", "alpha": 4, key: value})


def test_the_options_of_a_method_stand_beside_the_rest_in_a_file():
    config = LoraConfig(peft_type="LOKR", lora_alpha=3, options={"decompose_factor": 4})
    written = json.loads(json.dumps(config.to_dict()))
    assert (written["alpha"], written["decompose_factor"], written["decompose_both"]) == (3, 4, False)
    assert LoraConfig.from_dict(written) == config
