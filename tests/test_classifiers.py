"""Classifiers: published architectures compared with independent ones, and the input that each network expects."""

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, resnet18

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.classifiers import (
    CifarResNet,
    Input,
    Prepared,
    fold_batch_norms,
    resolve_classifier,
)
from diffsmooth.pipeline.spec import Normalize, load_spec

CPU, FP32 = torch.device("cpu"), torch.float32


def uniform(network):
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if "var" in name else -0.2
            tensor.uniform_(low, low + 0.4, generator=generator)
    return network.eval()


def classifier_spec(raw_spec, **section):
    return load_spec({**raw_spec, "classifier": section})


@pytest.mark.parametrize("depth", [20, 110])
def test_cifar_resnet_equals_one_built_from_torchvisions_blocks(depth):
    """It has the same keys and logits as an independent network made of torchvision's basic blocks."""
    network, n = uniform(CifarResNet(depth, 10)), (depth - 2) // 6

    def layer(width, out_width, stride):
        down = nn.Sequential(nn.Conv2d(width, out_width, 1, stride, bias=False), nn.BatchNorm2d(out_width))
        first = BasicBlock(width, out_width, stride, down if stride > 1 else None)
        return nn.Sequential(first, *(BasicBlock(out_width, out_width) for _ in range(n - 1)))

    other = nn.ModuleDict(
        {"conv1": nn.Conv2d(3, 16, 3, padding=1, bias=False), "bn1": nn.BatchNorm2d(16), "layer1": layer(16, 16, 1),
         "layer2": layer(16, 32, 2), "layer3": layer(32, 64, 2), "fc": nn.Linear(64, 10)}
    )  # fmt: skip
    other.load_state_dict(network.state_dict())
    other.eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    h = other["layer3"](other["layer2"](other["layer1"](F.relu(other["bn1"](other["conv1"](x))))))
    with torch.no_grad():
        assert torch.allclose(network(x), other["fc"](h.mean(dim=(2, 3))), rtol=1e-4, atol=1e-5)


def test_resnet110_has_its_published_size():
    with torch.device("meta"):
        assert sum(one.numel() for one in CifarResNet(110, 10).parameters()) == pytest.approx(1.73e6, rel=2e-3)


class Echo(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_BCHW):
        return x_BCHW


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("none", [0.5, 0.5, 0.5]),
        ("half", [0, 0, 0]),
        ("cifar10", [(0.5 - 0.4914) / 0.2023, (0.5 - 0.4822) / 0.1994, (0.5 - 0.4465) / 0.2010]),
        ("imagenet", [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]),
        ("center-imagenet", [0.5 - 0.485, 0.5 - 0.456, 0.5 - 0.406]),
        ({"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0]}, [0.4, 0.15, 0.05]),
    ],
)
def test_normalisations(raw_spec, tmp_path, normalize, expected, monkeypatch):
    from diffsmooth.pipeline.models import classifiers

    monkeypatch.setitem(classifiers.CLASSIFIERS, "echo", classifiers.Architecture(lambda num_classes: Echo()))
    torch.save(Echo().state_dict(), tmp_path / "a.pt")
    spec = classifier_spec(raw_spec, arch="echo", checkpoint=str(tmp_path / "a.pt"), normalize=normalize)
    seen = resolve_classifier(spec).build(CPU, FP32, 3, 2)(torch.full((1, 3, 1, 1), 0.5))
    assert seen.ravel().tolist() == pytest.approx(expected, abs=1e-6)


def test_images_of_another_size_are_resized():
    expected = Input(Normalize(mean=[0.0], std=[1.0]), size=64, interpolation="bicubic")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    seen = Prepared(Echo(), expected)(x)
    assert torch.equal(seen, F.interpolate(x, (64, 64), mode="bicubic", antialias=True))
    assert torch.equal(Prepared(Echo(), expected)(seen), seen)  # the expected size: unchanged
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)  # half-pixel centres: a ramp stays a ramp, half as steep
    steep = (ramp[..., 1:] - ramp[..., :-1]).mean()
    inner = Prepared(Echo(), expected)(ramp)[..., 8:-8]
    assert torch.allclose(inner[..., 1:] - inner[..., :-1], steep / 2, atol=1e-5)


def test_normalisation_is_required_if_the_files_do_not_contain_it(raw_spec):
    for arch in ("cifar_resnet110", "resnet50"):
        with pytest.raises(UserError, match=r"classifier\.normalize is missing.*'center-imagenet'"):
            resolve_classifier(classifier_spec(raw_spec, arch=arch, checkpoint="a.pt"))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet18", r"'resnet18' is unknown; choose one of mnist_cnn, .*torchvision:NAME"),
        ("torchvision:resnet99", r"torchvision:resnet99"),
        ("torchvision:googlenet", r"torchvision:googlenet"),
        ("timm:resnet99", r"is not a model of the installed timm"),
    ],
)
def test_unknown_architectures(raw_spec, arch, message):
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        resolve_classifier(classifier_spec(raw_spec, arch=arch))


@pytest.mark.parametrize("arch", ["rrcm", "rrcm-b4", "diffusion", "transformers"])
def test_ignored_keys_are_refused_where_they_would_not_be_applied(raw_spec, arch):
    with pytest.raises(UserError, match=rf"'decoder\*'.* is not applied to arch = '{arch}'"):
        resolve_classifier(classifier_spec(raw_spec, arch=arch, ignore=["decoder*"]))


def test_torchvision_models_use_the_input_of_their_metadata(raw_spec, tmp_path):
    from torchvision.models import ResNet18_Weights, resnet18

    network = uniform(resnet18(num_classes=7))
    torch.save(network.state_dict(), tmp_path / "a.pt")
    spec = classifier_spec(raw_spec, arch="torchvision:resnet18", checkpoint=str(tmp_path / "a.pt"))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    metadata = ResNet18_Weights.DEFAULT.transforms()
    resized = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(one)[:, None, None] for one in (metadata.mean, metadata.std))
    with torch.no_grad():
        expected = network((resized - mean) / std)
        assert torch.allclose(resolve_classifier(spec).build(CPU, FP32, 3, 7)(x), expected, atol=1e-4)
    ids = resolve_classifier(spec).ids()
    assert "bilinear" in ids["classifier.input"]
    overridden = spec.model_copy(update={"classifier": spec.classifier.model_copy(update={"normalize": "half"})})
    assert resolve_classifier(overridden).ids()["classifier.input"] != ids["classifier.input"]
    with pytest.raises(UserError, match=r"fc\.weight has shape \(7, 512\).*\(10, 512\).*10 classes"):
        resolve_classifier(spec).build(CPU, FP32, 3, 10)
    with pytest.raises(UserError, match=r"3 channels|has 3"):
        resolve_classifier(spec).build(CPU, FP32, 1, 7)


def test_timm_models_use_the_input_of_their_metadata(raw_spec, tmp_path):
    timm = pytest.importorskip("timm")
    network = uniform(timm.create_model("test_vit", num_classes=3))
    torch.save({"state_dict": {f"1.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "a.pt")
    spec = classifier_spec(raw_spec, arch="timm:test_vit", checkpoint=str(tmp_path / "a.pt"))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    metadata = timm.models.get_pretrained_cfg("test_vit")
    resized = F.interpolate(x, metadata.input_size[1:], mode=metadata.interpolation, antialias=True)
    mean, std = (torch.tensor(one)[:, None, None] for one in (metadata.mean, metadata.std))
    with torch.no_grad():
        assert torch.allclose(
            resolve_classifier(spec).build(CPU, FP32, 3, 3)(x), network((resized - mean) / std), atol=1e-4
        )


@pytest.fixture
def vit_folder(tmp_path):
    """A ViT in the layout that transformers saves and the hub serves, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        num_labels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
        patch_size=16,
    )  # fmt: skip
    network = uniform(transformers.ViTForImageClassification(config))
    network.save_pretrained(tmp_path / "vit")
    metadata = {"size": 32, "resample": 2, "do_normalize": True, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(metadata))
    return tmp_path / "vit", network


def test_transformers_folder(raw_spec, vit_folder):
    folder, network = vit_folder
    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    section = {"arch": "transformers", "checkpoint": str(folder)}
    for given, mode, mean, std in (({}, "bilinear", 0.4, 0.3), (DDS, "bicubic", 0.5, 0.5)):
        spec = classifier_spec(raw_spec, **section, **given)
        resized = F.interpolate(x, (32, 32), mode=mode, antialias=True)
        with torch.no_grad():
            expected = network((resized - mean) / std).logits
            assert torch.allclose(resolve_classifier(spec).build(CPU, FP32, 3, 3)(x), expected, atol=1e-5)
    assert set(resolve_classifier(spec).ids()) == {
        "classifier", "classifier.config", "classifier.preprocessor_config", "classifier.input"
    }  # fmt: skip
    resolve_classifier(spec).build(torch.device("meta"), FP32, 3, 3)
    with pytest.raises(UserError, match="the classifier has 3 classes, but the data set has 10"):
        resolve_classifier(spec).build(torch.device("meta"), FP32, 3, 10)
    state = load_file(folder / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"classifier\.weight and 0 more keys are missing or unexpected"):
        resolve_classifier(spec).build(CPU, FP32, 3, 3)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        resolve_classifier(spec)


PROCESSORS = [
    ([], "holds a JSON list, not an object"),
    ({}, r"image_mean = \[\] and image_std = \[\] are no normalisation"),
    ({"image_mean": [0.5], "image_std": [0.0]}, r"image_std = \[0\.0\] are no normalisation"),
    ({"image_mean": "0.5", "image_std": [0.5]}, "image_mean: Input should be a valid list"),
    ({"image_mean": [0.5], "image_std": [0.5], "size": "224"}, r"size\."),
    ({"image_mean": [0.5], "image_std": [0.5], "size": {"height": -1}}, r"size\."),
    ({"image_mean": [0.5], "image_std": [0.5], "resample": "cubic"}, "resample: Input should be a valid integer"),
    ({"image_mean": [0.5], "image_std": [0.5], "resample": 0}, "'resample = 0', but only bicubic and bilinear"),
    ({"image_mean": [0.5], "image_std": [0.5], "do_normalize": "no"}, "do_normalize: Input should be a valid boolean"),
]


@pytest.mark.parametrize(("content", "message"), PROCESSORS)
def test_hostile_preprocessor_configurations_give_one_line(raw_spec, vit_folder, content, message):
    (vit_folder[0] / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        resolve_classifier(classifier_spec(raw_spec, arch="transformers", checkpoint=str(vit_folder[0])))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"model_type": "nothing"}, {"model_type": "vit", "hidden_size": "x"}, [1]])
def test_hostile_transformers_configurations_give_one_line(raw_spec, vit_folder, content):
    (vit_folder[0] / "config.json").write_text(json.dumps(content))
    spec = classifier_spec(raw_spec, arch="transformers", checkpoint=str(vit_folder[0]))
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match=r"(vit|config\.json): ") as error:
            resolve_classifier(spec).build(torch.device(device), FP32, 3, 2)
        assert "\n" not in str(error.value)


DDS = {"normalize": "half", "interpolation": "bicubic"}


class _Hub(SimpleHTTPRequestHandler):
    requested: ClassVar[list[str]] = []

    def do_GET(self):
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


def test_a_timm_model_without_a_checkpoint_comes_from_the_hub(raw_spec, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    classes = timm.models.get_pretrained_cfg("test_resnet").num_classes
    network = uniform(timm.create_model("test_resnet", num_classes=classes))
    folder = tmp_path / "hub" / timm.models.get_pretrained_cfg("test_resnet").hf_hub_id / "resolve" / "main"
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, directory=str(tmp_path / "hub")))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    spec = classifier_spec(raw_spec, arch="timm:test_resnet")
    first = resolve_classifier(spec).ids()
    loaded = resolve_classifier(spec).build(CPU, FP32, 3, classes)
    server.shutdown()
    assert len(_Hub.requested) == 1  # identity and weights need one download
    assert resolve_classifier(spec).ids() == first
    x = torch.rand(1, 3, *timm.models.get_pretrained_cfg("test_resnet").input_size[1:])
    assert loaded(x).shape == (1, classes)
    with pytest.raises(UserError, match=r"head|fc"):
        resolve_classifier(spec).build(CPU, FP32, 3, classes + 1)


class Untraceable(nn.Module):
    """Cannot be traced, because it branches on its input."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x_BCHW):
        h_BCHW = self.bn(self.conv(x_BCHW))
        return (h_BCHW if h_BCHW.mean() > 0 else -h_BCHW).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("make", "remaining"), [(lambda: CifarResNet(20, 10), 0), (lambda: resnet18(num_classes=10), 0), (Untraceable, 1)]
)
def test_batch_norms_are_merged_if_the_network_can_be_traced(make, remaining):
    network, generator = uniform(make()), torch.Generator().manual_seed(7)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
    folded = fold_batch_norms(network)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == remaining
    x = torch.rand(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        assert torch.allclose(folded(x), network(x), rtol=1e-4, atol=1e-5)
