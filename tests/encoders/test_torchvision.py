"""The torchvision encoder: the map of torchvision's own models, their files, their names."""

from __future__ import annotations

import pytest
import torch
import torchvision

from capdistill.encoders.torchvision import TorchvisionEncoder
from capdistill.errors import ConfigError, UnknownName


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), ("mobilenet_v3_small", 576), ("shufflenet_v2_x0_5", 1024), ("swin_t", 768)],
)
def test_pooled_tokens_classify_as_torchvision_does(name, width, pictures):
    model = torchvision.models.get_model(name, weights=None).eval()
    encoder = TorchvisionEncoder(name, weights=False, image_size=64)
    own = encoder.backbone.state_dict()
    encoder.backbone.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    images = pictures(64)

    tokens = encoder.trunk(images)

    assert tokens.shape == (2, encoder.tokens, width)
    last = {"resnet18": "fc", "shufflenet_v2_x0_5": "fc", "swin_t": "head"}.get(name, "classifier")
    with torch.no_grad():
        logits = model.get_submodule(last)(tokens.mean(1))
        torch.testing.assert_close(logits, model(encoder.normalise(images)), rtol=1e-3, atol=1e-4)


def test_resnet50_gives_49_tokens_and_imagenet_statistics():
    with torch.device("meta"):
        encoder = TorchvisionEncoder("resnet50", weights=False, dim=256, refine="pre")

    told = (encoder.tokens, encoder.token_dim, encoder.dim, encoder.grid, encoder.image_size)
    assert told == (49, 2048, 256, (7, 7), 224)
    assert encoder.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvisions_files_fit_without_their_classifier(name, prefix, tmp_path):
    state = torchvision.models.get_model(name, weights=None).state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pth")

    encoder = TorchvisionEncoder(name, weights=tmp_path / "w.pth", image_size=64)

    own = encoder.backbone.state_dict()
    assert own
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_default_weights_in_torchs_cache_need_no_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("capdistill.encoders.torchvision.reachable", lambda url: False)
    url = torchvision.models.get_model_weights("resnet18").DEFAULT.url
    state = torchvision.models.resnet18().state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / url.rsplit("/", 1)[1])

    encoder = TorchvisionEncoder("resnet18", image_size=64)

    assert torch.equal(encoder.backbone.conv1.weight, state["conv1.weight"])


def test_the_last_stage_of_a_resnet_is_layer4():
    encoder = TorchvisionEncoder("resnet18", weights=False, trainable=1, image_size=64)

    trained = {k.split(".")[0] for k, p in encoder.backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer4"}
    assert not encoder.backbone.layer3.training
    assert encoder.backbone.layer4.training


def test_an_unknown_model_is_named_with_the_nearest():
    with pytest.raises(UnknownName, match=r"'resnet5O'. Did you mean 'resnet50'"):
        TorchvisionEncoder("resnet5O", weights=False)


@pytest.mark.parametrize("name", ["vit_b_16", "googlenet"])
def test_models_without_a_map_point_at_timm(name):
    with pytest.raises(ConfigError, match="Use the timm encoder"):
        TorchvisionEncoder(name, weights=False)
