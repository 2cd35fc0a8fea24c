"""Names of models -> open_clip models, and models to train: what loads, what is refused and with which words."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

from raysys.config import LoopConfig, TowersConfig, TrainConfig
from raysys.errors import UserError
from raysys.models import LoadedModel, load_model, model_config, model_name, save_open_clip_folder
from raysys.storage import join, read_json
from raysys.training.model import check_training_model, count_parameters, training_model

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
    save(str(folder / "open_clip"), loaded)
    if finished:
        (folder / "manifest.json").write_text("{}")
    return str(folder)


def save(folder: str, loaded: LoadedModel) -> str:
    save_open_clip_folder(folder, loaded, state_dict=loaded.model.state_dict(), card="# A model\n")
    return folder


def load_model_from(config: dict[str, Any], folder: Path) -> Any:
    file = folder / "from.json"
    file.write_text(json.dumps(config))
    return load_model(str(file), "random")


@pytest.mark.parametrize("config", [VIT, TIMM], ids=["vit", "timm"])
def test_saved_folder_loads_with_plain_open_clip_and_gives_the_same_embeddings(config: dict[str, Any], tmp_path: Path) -> None:
    ours = load_model_from(config, tmp_path)
    folder = str(tmp_path / "saved")
    save(folder, replace(ours, preprocess_cfg=ours.preprocess_cfg | {"mean": (0.5, 0.5, 0.5)}))
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
    save(str(tmp_path), ours)
    saved = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert saved["model_cfg"]["vision_cfg"]["timm_model_pretrained"] is False


def test_saved_folder_has_its_config_last_and_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, written = load_model_from(VIT, tmp_path), []
    for name in ("write_bytes", "write_json"):
        monkeypatch.setattr(f"raysys.models.{name}", lambda path, content: written.append(Path(path).name))
    save(str(tmp_path / "saved"), ours)
    assert written == ["open_clip_model.safetensors", "README.md", "open_clip_config.json"]
    monkeypatch.undo()
    assert (Path(save(str(tmp_path / "saved"), ours)) / "README.md").read_text() == "# A model\n"


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    ours = load_model_from(VIT, tmp_path)
    state = ours.model.state_dict()
    state["ln_final.bias"] = state["ln_final.weight"]
    save_open_clip_folder(str(tmp_path), ours, state_dict=state, card="")
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


@pytest.mark.parametrize(("part", "key", "value"), [("vision_cfg", "image_size", 64), ("text_cfg", "context_length", 20)])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_of_another_image_size_or_context_are_stretched_only_to_train(
    part: str, key: str, value: int, kind: str, tiny: str, tmp_path: Path
) -> None:
    state = load_model(tiny, "random").model.state_dict()
    weights = tmp_path / f"weights.{kind}"
    if kind == "pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, weights)  # as open_clip_train saves
    else:
        safetensors.torch.save_file(state, weights)
    (tmp_path / "other.json").write_text(json.dumps(VIT | {part: VIT[part] | {key: value}}))
    with pytest.raises(UserError, match="image size" if key == "image_size" else "context length"):
        load_model(str(tmp_path / "other.json"), str(weights))
    load_model(str(tmp_path / "other.json"), str(weights), stretch=True)
    load_model(tiny, str(weights))


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


# ---- towers and tokenizers of Hugging Face, without a hub -------------------------------------------------------------


@pytest.fixture
def hf_tokenizer(tmp_path: Path) -> str:
    """A folder with a tokenizer of six words."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ["<pad>", "<unk>", "</s>", "a", "dog", "cat"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def hf_tower(tmp_path: Path) -> str:
    """A folder with the configuration of a tiny RoBERTa."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tower = pytest.importorskip("transformers").RobertaConfig(vocab_size=6, max_position_embeddings=32, pad_token_id=0, **size)
    tower.save_pretrained(tmp_path / "tower")
    return str(tmp_path / "tower")


def siglip_config(hf_tokenizer: str) -> dict[str, Any]:
    """As open_clip's ViT-B-16-SigLIP, small."""
    text = {
        "context_length": 16,
        "vocab_size": 32,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "pool_type": "last",
    }
    hf = {"hf_tokenizer_name": hf_tokenizer, "tokenizer_kwargs": {"clean": "canonicalize"}}
    return VIT | {"init_logit_bias": -10, "custom_text": True, "text_cfg": text | hf}


def hf_config(hf_tokenizer: str, hf_tower: str) -> dict[str, Any]:
    """As open_clip's roberta-ViT-B-32, small."""
    text = {"hf_model_name": hf_tower, "hf_tokenizer_name": hf_tokenizer, "hf_pooler_type": "mean_pooler", "context_length": 16}
    return VIT | {"text_cfg": text}


def hide(*folders: str) -> None:
    for folder in folders:
        Path(folder).rename(folder + "-hidden")


def test_saved_siglip_folder_has_its_tokenizer(hf_tokenizer: str, tmp_path: Path) -> None:
    ours = load_model_from(siglip_config(hf_tokenizer), tmp_path)
    folder = save(str(tmp_path / "saved"), ours)
    hide(hf_tokenizer)
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["A dog,", "bird"])
    assert tokens[:, :3].tolist() == [[3, 4, 0], [1, 0, 0]] and tokens.shape == (2, 16)  # a dog; unknown
    assert torch.equal(load_model(f"local-dir:{folder}", None).tokenizer(["A dog,", "bird"]), tokens)
    assert torch.equal(embeddings(plain), embeddings(ours.model))


def test_saved_hugging_face_tower_loads_wherever_the_folder_goes(hf_tokenizer: str, hf_tower: str, tmp_path: Path) -> None:
    ours = load_model_from(hf_config(hf_tokenizer, hf_tower), tmp_path)
    folder = Path(save(str(tmp_path / "saved"), ours))
    tokens = ours.tokenizer(["a dog", "a cat"])
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    hide(hf_tokenizer, hf_tower)
    moved = folder.rename(tmp_path / "moved")
    again = load_model(f"local-dir:{moved}", None)
    text_cfg = read_json(str(moved / "open_clip_config.json"))["model_cfg"]["text_cfg"]
    other = open_clip.create_model(f"local-dir:{moved}", text_cfg=text_cfg | {"hf_model_name": str(moved / "hf_text_tower")})
    with torch.no_grad():
        for model in (plain, again.model, other.eval()):
            assert torch.equal(model.eval().encode_text(tokens), ours.model.encode_text(tokens))
    assert again.config == ours.config | {"text_cfg": ours.config["text_cfg"] | {"hf_model_pretrained": False}}


def test_folder_on_an_object_store_with_a_hugging_face_tower(
    hf_tokenizer: str, hf_tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_model_from(hf_config(hf_tokenizer, hf_tower), tmp_path)
    folder = save("memory://run/open_clip", ours)
    hide(hf_tokenizer, hf_tower)
    tokens, read = ours.tokenizer(["a dog", "a cat"]), []
    again = load_model(f"local-dir:{folder}", None)
    plain_open = MemoryFileSystem._open
    monkeypatch.setattr(
        MemoryFileSystem, "_open", lambda fs, path, *how, **more: read.append(path) or plain_open(fs, path, *how, **more)
    )
    fresh = load_model(f"local-dir:{folder}", "random")
    assert any(path.endswith("tokenizer.json") for path in read) and not any(path.endswith(".safetensors") for path in read)
    with torch.no_grad():
        assert torch.equal(again.model.encode_text(tokens), ours.model.encode_text(tokens))
        assert not torch.equal(fresh.model.encode_text(tokens), ours.model.encode_text(tokens))
    assert torch.equal(fresh.tokenizer(["a dog", "a cat"]), tokens)


def test_tokenizer_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="its tokenizer comes from Hugging Face and cannot be had") as caught:
        load_model_from(siglip_config(str(tmp_path / "nowhere")), tmp_path)
    assert "\n" not in str(caught.value) and "hf_tokenizer_name" in str(caught.value)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'raysys\[hf\]'"):
        load_model_from(siglip_config("any"), tmp_path)


# ---- a model to train -------------------------------------------------------------------------------------------------


RN = VIT | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}
TIMM_VIT = TIMM | {"vision_cfg": TIMM["vision_cfg"] | {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}}


def train_config(config: dict[str, Any] | str, folder: Path, *, grad_checkpointing: bool = False, **words: Any) -> TrainConfig:
    """Of a config, or of a folder in open_clip's format."""
    model = f"local-dir:{config}" if isinstance(config, str) else str(folder / "to-train.json")
    if not isinstance(config, str):
        Path(model).write_text(json.dumps(config))
    towers = TowersConfig(**words.pop("towers", {}))
    return TrainConfig(model=model, towers=towers, train=LoopConfig(steps=1, grad_checkpointing=grad_checkpointing), **words)


def trained_names(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def scale_and_bias(model: Any) -> tuple[float, float]:
    return model.logit_scale.item(), model.logit_bias.item()


def test_without_pretrained_a_folder_gives_its_weights_and_a_config_random_ones(tmp_path: Path) -> None:
    ours = load_model_from(VIT, tmp_path)
    folder = save(str(tmp_path / "saved"), ours)
    assert torch.equal(embeddings(training_model(train_config(folder, tmp_path)).model), embeddings(ours.model))
    torch.manual_seed(3)
    fresh = training_model(train_config(VIT, tmp_path))
    torch.manual_seed(3)
    assert torch.equal(
        embeddings(fresh.model), embeddings(training_model(train_config(folder, tmp_path, pretrained="random")).model)
    )
    assert fresh.pretrained == "random" and count_parameters(fresh.model)[0] == count_parameters(fresh.model)[1]


def test_siglip_starts_as_open_clips_trainer_and_its_folder_loads_with_the_bias(tmp_path: Path) -> None:
    ours = training_model(train_config(VIT, tmp_path, loss="siglip"))
    assert scale_and_bias(ours.model) == pytest.approx((math.log(10), -10))  # open_clip_train/main.py
    with torch.no_grad():
        ours.model.logit_bias.fill_(-3)  # type: ignore[operator]
    folder = save(str(tmp_path / "saved"), ours)
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert scale_and_bias(plain) == pytest.approx((math.log(10), -3))
    assert torch.equal(embeddings(plain), embeddings(ours.model))
    for loss in ("siglip", "clip"):  # own weights with a bias
        assert scale_and_bias(training_model(train_config(folder, tmp_path, loss=loss)).model) == pytest.approx((math.log(10), -3))
    assert training_model(train_config(VIT, tmp_path)).model.logit_bias is None


def test_siglip_takes_what_the_models_config_names(tmp_path: Path) -> None:
    cfg = train_config(VIT | {"init_logit_bias": -5.0}, tmp_path, loss="siglip")
    assert scale_and_bias(training_model(cfg).model) == pytest.approx((math.log(10), -5))


@pytest.mark.parametrize("from_file", [False, True])
def test_siglip_from_weights_of_clip_starts_scale_and_bias_anew(from_file: bool, tmp_path: Path) -> None:
    clip = load_model_from(VIT, tmp_path)
    with torch.no_grad():
        clip.model.logit_scale.fill_(math.log(100))
    folder = save(str(tmp_path / "saved"), clip)
    cfg = train_config(folder, tmp_path, loss="siglip")
    if from_file:
        cfg = train_config(VIT, tmp_path, loss="siglip", pretrained=join(folder, "open_clip_model.safetensors"))
    ours = training_model(cfg)
    assert scale_and_bias(ours.model) == pytest.approx((math.log(10), -10))
    assert torch.equal(embeddings(ours.model), embeddings(clip.model))


def test_locked_image_tower_is_open_clips_and_its_folder_loads(tmp_path: Path) -> None:
    cfg = train_config(VIT, tmp_path, towers={"lock_image": True, "lock_image_unlocked_groups": 1})
    ours = training_model(cfg)
    plain = load_model_from(VIT, tmp_path).model
    plain.lock_image_tower(unlocked_groups=1)
    assert trained_names(ours.model) == trained_names(plain)
    assert {name for name in trained_names(ours.model) if name.startswith("visual")} == {"visual.proj"}
    assert count_parameters(ours.model)[0] == count_parameters(ours.model)[1] - sum(
        p.numel() for name, p in plain.named_parameters() if name.startswith("visual.") and name != "visual.proj"
    )
    folder = save(str(tmp_path / "saved"), ours)
    assert torch.equal(embeddings(open_clip.create_model_and_transforms(f"local-dir:{folder}")[0]), embeddings(ours.model))


def test_locked_batch_norm_keeps_the_names_of_its_weights(tmp_path: Path) -> None:
    ours = training_model(train_config(TIMM, tmp_path, towers={"lock_image": True}))
    plain = load_model_from(TIMM, tmp_path).model
    assert ours.model.state_dict().keys() == plain.state_dict().keys()
    assert not any(name.startswith("visual.trunk") for name in trained_names(ours.model))
    ours.model.train()
    ours.model.encode_image(torch.rand(4, 3, 32, 32))  # type: ignore[operator]
    folder = save(str(tmp_path / "saved"), ours)
    assert torch.equal(embeddings(open_clip.create_model_and_transforms(f"local-dir:{folder}")[0]), embeddings(ours.model))


def test_locked_text_tower(tmp_path: Path) -> None:
    whole = trained_names(training_model(train_config(VIT, tmp_path, towers={"lock_text": True})).model)
    last = trained_names(
        training_model(train_config(VIT, tmp_path, towers={"lock_text": True, "lock_text_unlocked_layers": 1})).model
    )
    assert {name for name in whole if not name.startswith("visual")} == {"logit_scale"}
    assert last - whole == {"text_projection"}


def test_locked_hugging_face_tower(hf_tokenizer: str, hf_tower: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def trained(**towers: Any) -> set[str]:
        cfg = train_config(hf_config(hf_tokenizer, hf_tower), tmp_path, towers={"lock_text": True} | towers)
        check_training_model(cfg)
        return {name for name in trained_names(training_model(cfg).model) if name.startswith("text")}

    assert trained() == {"text.proj.0.weight", "text.proj.2.weight"}
    more = trained(lock_text_unlocked_layers=1) - trained()
    assert more and all(name.startswith("text.transformer.encoder.layer.1.") for name in more)
    assert capfd.readouterr().out == ""  # open_clip prints
    with pytest.raises(UserError, match="lock_text_unlocked_layers=3 leaves nothing"):
        trained(lock_text_unlocked_layers=3)


def test_patch_dropout_is_the_runs_and_the_saved_config_keeps_the_models_own(tmp_path: Path) -> None:
    own = VIT | {"vision_cfg": VIT["vision_cfg"] | {"patch_dropout": 0.25}}
    assert training_model(train_config(own, tmp_path)).model.visual.patch_dropout.prob == 0.25  # type: ignore[union-attr]
    ours = training_model(train_config(own, tmp_path, towers={"patch_dropout": 0.5}))
    assert ours.model.visual.patch_dropout.prob == 0.5  # type: ignore[union-attr]
    folder = save(str(tmp_path / "saved"), ours)
    assert read_json(join(folder, "open_clip_config.json"))["model_cfg"]["vision_cfg"]["patch_dropout"] == 0.25
    trunk: Any = training_model(train_config(TIMM_VIT, tmp_path, towers={"patch_dropout": 0.5})).model
    assert trunk.visual.trunk.patch_drop.prob == 0.5


@pytest.mark.parametrize("config", [VIT, TIMM, TIMM_VIT], ids=["vit", "timm", "timm-vit"])
@pytest.mark.parametrize("bf16", [False, True])
def test_grad_checkpointing_changes_no_loss_and_no_gradient(config: dict[str, Any], bf16: bool, tmp_path: Path) -> None:
    def run(grad_checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, int]]:
        torch.manual_seed(1)
        model: Any = training_model(train_config(config, tmp_path, grad_checkpointing=grad_checkpointing)).model.train()
        side = config["vision_cfg"]["image_size"]
        calls = {"visual": 0, "transformer": 0}
        for tower in calls:
            for module in getattr(model, tower).modules():
                module.register_forward_pre_hook(lambda *_, tower=tower: calls.update({tower: calls[tower] + 1}))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image, text, scale = model(torch.rand(4, 3, side, side), torch.arange(64).reshape(4, 16))
            loss = open_clip.loss.ClipLoss()(image, text, scale)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, calls

    (loss, grads, calls), (checkpointed_loss, checkpointed_grads, more_calls) = run(False), run(True)
    assert all(more_calls[tower] > calls[tower] for tower in calls)  # computed anew going backward
    assert torch.equal(loss, checkpointed_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed_grads[name], grad, msg=name)


def test_grad_checkpointing_of_a_hugging_face_tower(hf_tokenizer: str, hf_tower: str, tmp_path: Path) -> None:
    cfg = train_config(hf_config(hf_tokenizer, hf_tower), tmp_path, grad_checkpointing=True)
    check_training_model(cfg)
    model: Any = training_model(cfg).model.train()
    model.encode_text(torch.tensor([[3, 4] + 14 * [0]])).sum().backward()
    assert model.text.transformer.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        (VIT, {"towers": {"lock_image": True, "lock_image_unlocked_groups": 3}}, "lock_image_unlocked_groups=3 leaves nothing"),
        (VIT, {"towers": {"lock_text": True, "lock_text_unlocked_layers": 9}}, "lock_text_unlocked_layers=9 leaves nothing"),
        (VIT, {"towers": {"lock_image": True, "lock_text": True}}, "leave nothing to train"),
        (RN, {"towers": {"lock_image": True, "lock_image_unlocked_groups": 1}}, "can only be locked as a whole"),
        (RN, {"towers": {"patch_dropout": 0.5}}, "towers.patch_dropout=0.5"),
        (TIMM, {"towers": {"patch_dropout": 0.5}}, "towers.patch_dropout=0.5"),
        (RN, {"grad_checkpointing": True}, "train.grad_checkpointing=true"),
        (VIT | {"multimodal_cfg": TEXT}, {}, "CoCa"),
        (VIT | {"text_cfg": TEXT | {"layerz": 1}}, {}, "layerz"),
        (VIT, {"pretrained": "laion400m_e32"}, "pretrained=laion400m_e32"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_start(
    config: dict[str, Any], words: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        check_training_model(train_config(config, tmp_path, **words))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [VIT, TIMM, RN, TIMM_VIT], ids=["vit", "timm", "resnet", "timm-vit"])
def test_check_loads_no_weights(config: dict[str, Any], tmp_path: Path) -> None:
    folder = save(str(tmp_path / "saved"), load_model_from(config, tmp_path))
    (tmp_path / "saved/open_clip_model.safetensors").write_bytes(b"")
    check_training_model(train_config(folder, tmp_path, loss="siglip", towers={"lock_image": True}))
