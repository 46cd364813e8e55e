"""An object keeps its place and its name and gets another class."""

import copy
from abc import ABC

import pytest
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.core.reclass import Reclassed, mixin_of, reclass, restore


class Louder(Reclassed):
    def forward(self, x):
        return 2 * super().forward(x)


class Counted(nn.Linear):
    """A class with names that a careless mixin would hide or read."""

    made: list[type] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.base, self.mixin, self.joined = 3, "mine", nn.Identity()

    def __init_subclass__(cls, **settings: object) -> None:
        Counted.made.append(cls)


def test_the_class_changes_and_comes_back():
    layer, base = Counted(), Counted
    before = dict(vars(layer))
    reclass(layer, Louder)
    assert isinstance(layer, Louder)
    assert isinstance(layer, base)
    assert mixin_of(layer) is Louder
    assert (type(layer).__name__, type(layer).__module__, type(layer).__qualname__) == ("Counted", __name__, "Counted")
    assert type(layer).__doc__ == base.__doc__
    assert vars(layer) == before
    restore(layer)
    assert type(layer) is base


def test_each_pair_of_classes_is_joined_once():
    layers = [Counted(), Counted()]
    for layer in layers:
        reclass(layer, Louder)
    twin = copy.deepcopy(layers[0])
    assert type(layers[0]) is type(layers[1]) is type(twin)
    assert len([made for made in Counted.made if issubclass(made, Louder)]) == 1


@pytest.mark.parametrize("name", ["base", "mixin", "linear", "matrix", "weight", "plan"])
def test_a_model_may_have_parts_with_our_words(name):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(2, 2))

        def forward(self, x):
            return getattr(self, name)(x)

    model = get_peft_model(Model(), LoraConfig(target_modules=[name]))
    assert type(model.unload()) is Model


def test_a_class_that_cannot_be_exchanged_is_refused_before_anything_is_done():
    class Abstract(ABC, nn.Linear):
        pass

    base = nn.Sequential(nn.Linear(2, 2), Abstract(2, 2))
    with pytest.raises(AdapterError, match="1 is a Abstract of a class that Python cannot exchange"):
        get_peft_model(base, LoraConfig(target_modules=["0", "1"]))
    assert [type(module) for module in base] == [nn.Linear, Abstract]
    assert not hasattr(base[0], "adapters")
    with pytest.raises(AdapterError, match=r"AbstractModel inherits from something else before nn\.Module"):
        get_peft_model(
            type("AbstractModel", (ABC, nn.Sequential), {})(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])
        )
