"""Names of models -> open_clip models: what loads, what is refused and with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from raysys.models import load_model, model_config, model_name, save_open_clip_folder
from raysys.storage import UserError

TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": TEXT,
}
TIMM: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": TEXT,
}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(VIT))
    return str(file)


def embeddings(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32))
        return torch.cat([image, model.encode_text(torch.arange(32).reshape(2, 16))])


def write_run(folder: Path, *, finished: bool = True) -> str:
    loaded = load_model_from(VIT, folder.parent)
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"verb": "train", "settings": {}}))
    save_open_clip_folder(
        str(folder / "open_clip"),
        config=loaded.config,
        preprocess_cfg=loaded.preprocess_cfg,
        state_dict=loaded.model.state_dict(),
    )
    if finished:
        (folder / "manifest.json").write_text("{}")
    return str(folder)


def load_model_from(config: dict[str, Any], folder: Path) -> Any:
    file = folder / "from.json"
    file.write_text(json.dumps(config))
    return load_model(str(file), "random")


@pytest.mark.parametrize("config", [VIT, TIMM], ids=["vit", "timm"])
def test_saved_folder_loads_with_plain_open_clip_and_gives_the_same_embeddings(config: dict[str, Any], tmp_path: Path) -> None:
    ours = load_model_from(config, tmp_path)
    folder = str(tmp_path / "saved")
    preprocess_cfg = ours.preprocess_cfg | {"mean": (0.5, 0.5, 0.5)}
    save_open_clip_folder(folder, config=ours.config, preprocess_cfg=preprocess_cfg, state_dict=ours.model.state_dict())
    plain, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    again = load_model(f"local-dir:{folder}", None)
    assert torch.equal(embeddings(plain), embeddings(ours.model))
    assert torch.equal(embeddings(again.model), embeddings(ours.model))
    assert again.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    assert repr(again.preprocess) == repr(preprocess)
    assert torch.equal(again.tokenizer(["a dog"]), open_clip.get_tokenizer(f"local-dir:{folder}")(["a dog"]))
    assert again.tokenizer(["a dog"]).shape == (1, 16)


def test_saved_timm_config_never_asks_for_pretrained_towers(tmp_path: Path) -> None:
    ours = load_model_from(TIMM, tmp_path)
    save_open_clip_folder(str(tmp_path), config=ours.config, preprocess_cfg={}, state_dict=ours.model.state_dict())
    saved = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert saved["model_cfg"]["vision_cfg"]["timm_model_pretrained"] is False


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    ours = load_model_from(VIT, tmp_path)
    state = ours.model.state_dict()
    state["ln_final.bias"] = state["ln_final.weight"]
    save_open_clip_folder(str(tmp_path), config=ours.config, preprocess_cfg={}, state_dict=state)
    assert torch.equal(load_model(f"local-dir:{tmp_path}", None).model.state_dict()["ln_final.bias"], torch.ones(32))


def test_run_folder_loads_its_own_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run")
    first, second = load_model(run, None), load_model(run, None)
    assert torch.equal(embeddings(first.model), embeddings(second.model))
    assert first.name == "my run" and model_name(run) == "my-run"


def test_random_takes_a_folders_architecture_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert not torch.equal(embeddings(load_model(run, "random").model), embeddings(load_model(run, None).model))


def test_weights_from_a_file(tiny: str, tmp_path: Path) -> None:
    ours = load_model(tiny, "random")
    torch.save({"state_dict": ours.model.state_dict()}, tmp_path / "weights.pt")
    assert torch.equal(embeddings(load_model(tiny, str(tmp_path / "weights.pt")).model), embeddings(ours.model))


def test_a_json_named_like_an_open_clip_model_does_not_replace_it(tmp_path: Path) -> None:
    file = tmp_path / "ViT-B-32.json"
    file.write_text(json.dumps(VIT))
    assert load_model(str(file), "random").config["embed_dim"] == 16
    assert model_config("ViT-B-32")["embed_dim"] == 512


def test_two_files_of_one_name_are_two_models(tmp_path: Path) -> None:
    for width in (16, 32):
        (tmp_path / str(width)).mkdir()
        (tmp_path / str(width) / "m.json").write_text(json.dumps(VIT | {"embed_dim": width}))
        assert embeddings(load_model(str(tmp_path / str(width) / "m.json"), "random").model).shape == (4, width)


def test_model_is_in_evaluation_mode(tiny: str) -> None:
    assert not load_model(tiny, "random").model.training


@pytest.mark.parametrize(
    ("spec", "pretrained", "words"),
    [
        ("ViT-B-32", None, "pretrained=random"),
        ("ViT-B32", "random", "did you mean ViT-B-32"),
        ("nowhere.json", "random", "nowhere.json: no such file"),
        ("local-dir:nowhere", None, "no open_clip_config.json"),
        ("ViT-B-32", "opnai", "openai"),
        ("ViT-B-32-quickgelu", "no/such/file.pt", "neither a file nor a tag"),
    ],
)
def test_refused_with_the_mend(spec: str, pretrained: str | None, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(spec, pretrained)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_json_without_weights_is_not_random(tiny: str) -> None:
    with pytest.raises(UserError, match="pretrained=random"):
        load_model(tiny, None)


def test_config_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(VIT | {"text_cfg": TEXT | {"layerz": 1}}))
    with pytest.raises(UserError, match="layerz"):
        load_model(str(file), "random")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "run/open_clip/open_clip_model.safetensors").unlink()
    for spec in (run, f"local-dir:{run}/open_clip"):
        with pytest.raises(UserError, match="no weights there"):
            load_model(spec, None)


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finished"):
        load_model(write_run(tmp_path / "run", finished=False), None)


def test_weights_of_another_model_are_refused(tiny: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for file in ("other.pt", "text.pt"):
        with pytest.raises(UserError, match=file):
            load_model(tiny, str(tmp_path / file))


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="pretrained=FILE"):
        load_model("ViT-B-32", "laion2b_e16")


def test_openai_weights_get_the_activation_they_were_trained_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """open_clip 3.3 builds ViT-B-32 with GELU for pretrained=openai and only warns; OpenAI trained it with QuickGELU."""
    built: dict[str, Any] = {}
    stand_in = load_model_from(VIT, tmp_path).model

    def create(name: str, pretrained: str | None = None, **how: Any) -> Any:
        built.update(how)
        return stand_in

    monkeypatch.setattr("open_clip.create_model", create)
    assert load_model("ViT-B-32", "openai").config["quick_gelu"] is True
    assert built["force_quick_gelu"] is True
    load_model("ViT-B-32", "laion2b_s34b_b79k")
    assert built["force_quick_gelu"] is False
