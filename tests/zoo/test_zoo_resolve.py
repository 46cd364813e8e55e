"""A folder, a name of the zoo, a hub id: each is found, and everything else is refused by name."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from veneer import zoo
from veneer.core.errors import AdapterError


def test_a_folder_with_a_model_is_itself(tmp_path, monkeypatch):
    for name, index in (("model", "config.json"), ("pipeline", "model_index.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / index).write_text("{}")
        assert zoo.resolve(str(tmp_path / name)) == tmp_path / name
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert zoo.resolve("~/model") == tmp_path / "model"


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path):
    with pytest.raises(AdapterError, match=r"is a folder without config\.json"):
        zoo.resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="is a folder with an adapter"):
        zoo.resolve(str(tmp_path))
    with pytest.raises(AdapterError, match=r"is a file; expected a folder with config\.json"):
        zoo.resolve(str(tmp_path / "adapter_config.json"))


def test_a_name_of_the_zoo_is_pulled_when_it_is_not_here(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="base 'tiny' is not here yet: run `veneer pull tiny`"):
        zoo.resolve("tiny", download=False)
    lines: list[str] = []
    assert zoo.resolve("tiny", report=lines.append) == zoo.folder_of("tiny")
    assert lines
    assert zoo.resolve("tiny", download=False) == zoo.folder_of("tiny")
    # a run's folder of that name does not hide the base; a model's folder is what the user has made it to be
    (tmp_path / "tiny").mkdir()
    assert zoo.resolve("tiny") == zoo.folder_of("tiny")
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert zoo.resolve("tiny") == Path("tiny")


@pytest.mark.parametrize("name", ["./nope", "~/nope", "/nope/at/all", "a/b/c", "", "two words", "owner/na me"])
def test_what_cannot_be_a_hub_id_is_refused_without_asking(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(
        AdapterError, match=r"is neither a folder, a name that `veneer models` lists .*, nor a hub id"
    ) as caught:
        zoo.resolve(name)
    assert f"base {name!r}" in str(caught.value)


def test_a_slip_gets_the_nearest_name():
    with pytest.raises(AdapterError) as caught:
        zoo.resolve("smolm2-135m")
    assert str(caught.value).startswith(
        "base 'smolm2-135m' is neither a folder, a name that `veneer models` lists (emoji, minilm-l6, smollm2-135m), "
        "nor a hub id (owner/name); did you mean 'smollm2-135m'? (as a name of the hub: HF_HUB_OFFLINE is set"
    )


class Hub:
    """The hub as a test wants it: its files, and whether it answers."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        self.failure: Exception | None = None
        self.cached = False
        self.folder = folder
        self.asked: list[dict[str, object]] = []
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        patch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, name: str, timeout: float) -> SimpleNamespace:
        """Answer like HfApi.model_info."""
        if self.failure:
            raise self.failure
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def snapshot_download(self, name: str, *, local_files_only: bool = False, **patterns: object) -> str:
        """Answer like huggingface_hub.snapshot_download."""
        if local_files_only and not self.cached:
            raise FileNotFoundError(name)
        if not local_files_only:
            self.asked.append(patterns)
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    """A hub without a network."""
    (tmp_path / "snapshot").mkdir()
    return Hub(tmp_path / "snapshot", monkeypatch)


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], "*.safetensors"),
        (["config.json", "pytorch_model.bin"], "*.bin"),
        (["model_index.json", "all-in-one.safetensors", "unet/model.safetensors"], "*/*.safetensors"),
        (["model_index.json", "all-in-one.safetensors", "unet/model.bin"], "*/*.bin"),
    ],
)
def test_a_hub_model_is_fetched_with_its_safest_weights(hub, files, weights):
    hub.files = files
    for name in ("owner/name", "gpt2"):
        assert zoo.resolve(name) == hub.folder
    patterns = hub.asked[0]["allow_patterns"]
    assert isinstance(patterns, list)
    assert [pattern for pattern in patterns if pattern.endswith(("bin", "safetensors"))] == [weights]


def test_a_hub_that_does_not_answer_is_one_error_unless_the_model_is_cached(hub):
    hub.failure = RuntimeError("404: no such model\nand much more")
    message = r"base 'owner/name' is a hub id, but the hub did not give it \(404: no such model\), and it is not in"
    with pytest.raises(AdapterError, match=message):
        zoo.resolve("owner/name")
    hub.cached = True
    (hub.folder / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="the cache has its config but no weights"):
        zoo.resolve("owner/name")
    (hub.folder / "model.safetensors").write_bytes(b"")
    assert zoo.resolve("owner/name") == hub.folder


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_the_hub_is_not_asked(hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "yes")
    message = f"base 'owner/name' is a hub id, but {variable} is set, and it is not in the cache: "
    with pytest.raises(AdapterError, match=message):
        zoo.resolve("owner/name")
    with pytest.raises(AdapterError, match=f"base 'gpt2' is neither .*{variable} is set"):
        zoo.resolve("gpt2")
    hub.cached = True
    (hub.folder / "config.json").write_text("{}")
    (hub.folder / "pytorch_model.bin").write_bytes(b"")
    assert zoo.resolve("gpt2") == hub.folder
    assert hub.asked == []


def test_the_hubs_own_cache_is_read_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(AdapterError, match="nothing is to be downloaded, and it is not in the cache"):
        zoo.resolve("owner/name", download=False)
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).write_text("{}")
    assert zoo.resolve("owner/name", download=False) == snapshot
