"""An adapter of several parts of a pipeline, apart and together: the same changes under the same numbers."""

import pytest
import torch
from torch import nn

from veneer import Adapter, AdapterError, LoraConfig, files, get_peft_model
from veneer.apart.changes import changes
from veneer.files.parts import by_part, joined


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.table, self.norm = nn.Linear(6, 4), nn.Embedding(7, 6), nn.LayerNorm(4)


def _adapter(**settings: object) -> Adapter:
    config = LoraConfig(r=2, target_modules=["proj", "table"], init_lora_weights=False, **settings)
    return get_peft_model(Part(), config).get_adapter()


def test_parts_of_a_pipeline_apart_and_together():
    adapters = {"unet": _adapter(alpha_pattern={"proj": 7}), "text_encoder": _adapter(use_rslora=True)}
    adapters["unet"].metadata = {"trigger": "sks"}
    whole = joined(adapters)
    assert whole.parts == ("unet", "text_encoder")
    assert whole.embeddings == {"unet.table", "text_encoder.table"}
    assert whole.metadata == {"trigger": "sks"}
    apart = by_part(whole)
    for name, adapter in adapters.items():
        assert changes(apart[name]).keys() == changes(adapter).keys()
        for path, change in changes(adapter).items():
            assert changes(apart[name])[path].config == change.config
            torch.testing.assert_close(apart[name].tensors[path], change.tensors, rtol=0, atol=0)
        assert apart[name].embeddings == adapter.embeddings


def test_what_is_trained_whole_is_of_one_model():
    with pytest.raises(AdapterError, match=r"trains others whole: norm\.bias, norm\.weight|norm\.weight, norm\.bias"):
        joined({"unet": _adapter(modules_to_save=["norm"])})


def test_what_another_adapter_left_there_is_not_read_as_its_part(tmp_path):
    whole = joined({"unet": _adapter(), "text_encoder": _adapter()})
    files.write(whole, tmp_path / "whole", "peft")
    with pytest.raises(AdapterError, match="holds text_encoder too, which would be read with it"):
        files.write(joined({"unet": _adapter()}), tmp_path / "whole", "peft", force=True)
    files.write(_adapter(), tmp_path / "one", "peft")
    with pytest.raises(AdapterError, match="of one model, which would be read instead"):
        files.write(whole, tmp_path / "one", "peft", force=True)
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == []
    assert files.write(whole, tmp_path / "whole", "peft", force=True)
