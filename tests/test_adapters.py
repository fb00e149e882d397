"""Adapters and new last layers: what is trained, what is written, and that certify builds the same network."""

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn
from torch.nn import functional as F

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models import classifiers
from diffsmooth.pipeline.models.classifiers import Architecture, Input, resolve_classifier
from diffsmooth.pipeline.models.weights import RANDOM, build, load_weights
from diffsmooth.pipeline.smoothing import weights_ids
from diffsmooth.pipeline.spec import Normalize, identity, load_spec, votes_id
from diffsmooth.pipeline.storage.store import MemoryStore, open_store
from diffsmooth.pipeline.training import loop
from diffsmooth.pipeline.training.settings import load_training
from tests.test_training import CPU, Killed, assert_equal, die_after, raw_training, train, weights, write_images

timm = pytest.importorskip("timm")

VIT = "vit_tiny_patch16_224"
SIZES = {"img_size": 28, "patch_size": 7, "depth": 1, "embed_dim": 8, "num_heads": 2, "in_chans": 1}
MNIST = {"arch": "mnist_cnn", "checkpoint": "embedded:mnist.safetensors#classifier-0.00"}
IDENTITY = Input(Normalize(mean=[0.0], std=[1.0]))


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "train.parquet", [0, 1] * 30)


@pytest.fixture
def backbone(tmp_path):
    """The file of a tiny transformer with three classes, which is frozen."""
    network = build(lambda: timm.create_model(VIT, num_classes=3, **SIZES), f"{RANDOM}0", CPU)
    save_file(network.state_dict(), tmp_path / "backbone.safetensors")
    return str(tmp_path / "backbone.safetensors")


def adapter_training(images, backbone, adapter, **changes):
    classifier = {"arch": f"timm:{VIT}", "options": SIZES, "normalize": "none", "checkpoint": backbone}
    raw = raw_training(images, classifier={**classifier, "adapter": adapter}, **changes)
    raw["training"] = {"steps": 3, "batch": 8, "shards": 2, "warmup": 1, "checkpoints": 3, "learning_rate": 0.1,
                       "new_last_layer": True, **changes.get("training", {})}  # fmt: skip
    return raw


def literal_logits(backbone, file, adapter, x_BCHW):
    """The logits by the formulas of the papers, with the tensors of the two files."""
    network = timm.create_model(VIT, num_classes=2, **SIZES).eval()
    frozen, added = load_file(backbone), load_file(file)
    network.load_state_dict({**frozen, "head.weight": added["head.weight"], "head.bias": added["head.bias"]})

    def lora(name):
        A, B = (added[f"{name}.lora_{one}.default.weight"] for one in "AB")
        return lambda _, inputs, y: y + adapter["alpha"] / adapter["rank"] * inputs[0] @ A.T @ B.T

    def bottleneck(name):
        D, c, U, e = (added[f"{name}.{one}"] for one in ("down.weight", "down.bias", "up.weight", "up.bias"))
        return lambda _, inputs, y: y + F.relu(y @ D.T + c) @ U.T + e

    for name, layer in network.named_modules():
        if any(key.startswith(f"{name}.") for key in added) and isinstance(layer, nn.Linear) and name != "head":
            layer.register_forward_hook({"lora": lora, "bottleneck": bottleneck}[adapter["kind"]](name))
    with torch.no_grad():
        return network(x_BCHW)


LORA = {"kind": "lora", "rank": 2, "alpha": 3.0, "targets": ["*.qkv", "*.fc1"]}
BOTTLENECK = {"kind": "bottleneck", "rank": 3}
ADAPTERS = pytest.mark.parametrize(
    ("adapter", "keys"),
    [
        (LORA, {f"blocks.0.{layer}.lora_{one}.default.weight" for layer in ("attn.qkv", "mlp.fc1") for one in "AB"}),
        (
            BOTTLENECK,
            {
                f"blocks.0.{layer}.{part}.{one}"
                for layer in ("attn.proj", "mlp.fc2")
                for part in ("down", "up")
                for one in ("weight", "bias")
            },
        ),
    ],
    ids=["lora", "bottleneck"],
)


@ADAPTERS
def test_an_adapter_is_trained_alone_and_certify_builds_the_same_network(
    images, backbone, tmp_path, monkeypatch, adapter, keys
):
    if adapter is LORA:
        pytest.importorskip("peft")
    made, make_task = [], loop.make_task
    monkeypatch.setattr(loop, "make_task", lambda *given: made.append(make_task(*given)) or made[-1])
    file = tmp_path / "out" / "weights.safetensors"
    before = torch.random.get_rng_state()
    train(adapter_training(images, backbone, adapter), open_store(str(tmp_path / "out")))
    assert torch.equal(torch.random.get_rng_state(), before)

    assert load_file(file).keys() == keys | {"head.weight", "head.bias"}
    assert all(tensor.any() for tensor in load_file(file).values())  # those that start as 0 have been trained
    frozen = {
        name.replace(".base_layer", ""): one
        for name, one in made[0].network.state_dict().items()
        if name not in load_file(file)
    }
    assert_equal(frozen, {name: one for name, one in load_file(backbone).items() if not name.startswith("head.")})

    spec = load_spec(tmp_path / "out" / "certify.toml")
    classifier = resolve_classifier(spec).build(CPU, torch.float32, 1, 2)
    x_BCHW = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classifier(x_BCHW), literal_logits(backbone, file, adapter, x_BCHW))
    assert not any(one.requires_grad for one in classifier.parameters())
    meta = resolve_classifier(spec).build(torch.device("meta"), torch.float32, 1, 2)
    assert meta.network.state_dict().keys() == classifier.network.state_dict().keys()


def test_a_new_adapter_changes_no_output(images, backbone):
    raw = adapter_training(images, backbone, {**BOTTLENECK, "targets": ["*"]})
    task = loop.make_task(load_training(raw), CPU, (1, 28, 28), 2)
    plain = timm.create_model(VIT, num_classes=2, **SIZES).eval()
    head = {name: one for name, one in task.network.state_dict().items() if name.startswith("head.")}
    plain.load_state_dict({**load_file(backbone), **head})
    x_BCHW = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(task.network(x_BCHW), plain(x_BCHW))


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_an_adapter_of_convolutions(images, tmp_path, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    raw = adapter_training(images, None, {"kind": kind, "rank": 2, "targets": ["conv2"]})
    raw["classifier"] = {**MNIST, "adapter": raw["classifier"]["adapter"]}
    train(raw, open_store(str(tmp_path)))
    certified = resolve_classifier(load_spec(tmp_path / "certify.toml")).build(CPU, torch.float32, 1, 2)

    added = load_file(tmp_path / "weights.safetensors")
    plain = classifiers.MnistCNN(2).eval()
    shipped = {key: one for key, one in load_weights(MNIST["checkpoint"]).items() if not key.startswith("fc.")}
    plain.load_state_dict({**shipped, "fc.weight": added["fc.weight"], "fc.bias": added["fc.bias"]})

    def lora(_, inputs, y):
        inner = F.conv2d(inputs[0], added["conv2.lora_A.default.weight"], stride=2, padding=1)
        return y + F.conv2d(inner, added["conv2.lora_B.default.weight"])

    def bottleneck(_, inputs, y):
        inner = F.relu(F.conv2d(y, added["conv2.down.weight"], added["conv2.down.bias"]))
        return y + F.conv2d(inner, added["conv2.up.weight"], added["conv2.up.bias"])

    plain.conv2.register_forward_hook({"lora": lora, "bottleneck": bottleneck}[kind])
    x_BCHW = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(certified(x_BCHW), plain(x_BCHW))
    assert all(one.any() for one in added.values())


def test_an_adapter_training_that_was_killed_ends_with_the_same_weights(images, backbone):
    whole, cut = MemoryStore(), MemoryStore()
    train(adapter_training(images, backbone, BOTTLENECK), whole)
    with pytest.raises(Killed):
        train(adapter_training(images, backbone, BOTTLENECK), cut, on_step=die_after(2))
    assert len(cut.read("checkpoints/000000001.safetensors")) < 4 * len(whole.read("weights.safetensors")) + 5000
    train(adapter_training(images, backbone, BOTTLENECK), cut)
    assert_equal(weights(whole), weights(cut))


def test_the_identity_covers_both_files_and_the_adapters_settings(raw_spec, backbone, tmp_path):
    def found(adapter, content="one", **section):
        (tmp_path / "adapter.safetensors").write_text(content)
        raw = {**raw_spec, "classifier": {"arch": f"timm:{VIT}", "options": SIZES, "checkpoint": backbone, **section}}
        if adapter is not None:
            raw["classifier"]["adapter"] = {"checkpoint": str(tmp_path / "adapter.safetensors"), **adapter}
        spec = load_spec(raw)
        assert ("adapter" in identity(spec, {}).model_dump(exclude_defaults=True)["classifier"]) == (
            adapter is not None
        )
        return votes_id(spec, weights_ids(spec))

    assert found(BOTTLENECK) == found(BOTTLENECK)
    other = str(tmp_path / "other.safetensors")
    save_file({"other": torch.zeros(1)}, other)
    names = [found(None), found(BOTTLENECK), found(BOTTLENECK, "two"), found(BOTTLENECK, checkpoint=other),
             found({**BOTTLENECK, "rank": 4}), found({**BOTTLENECK, "targets": ["*"]}), found(LORA)]  # fmt: skip
    assert len(set(names)) == len(names)


def certified(raw):
    source = resolve_classifier(load_training(raw).run_spec(0.5))
    source.ids()
    return source.load(CPU, 1, 2)


def test_an_adapters_file_that_does_not_fit_is_refused_in_one_line(images, backbone, tmp_path):
    train(adapter_training(images, backbone, BOTTLENECK), open_store(str(tmp_path / "out")))
    file = str(tmp_path / "out" / "weights.safetensors")
    for adapter, message in (
        ({"rank": 4, "checkpoint": file}, r"shape \(3, 8\), the architecture expects \(4, 8\); .* with rank = 4"),
        ({"targets": ["*.fc1"], "checkpoint": file}, r"fc1.down.weight \(3, 32\) is missing; it must be an adapter"),
        ({"checkpoint": backbone}, r"is not part of the adapter; it must be an adapter of kind = 'bottleneck'"),
        ({"checkpoint": None}, r"classifier.adapter.checkpoint is missing"),
        ({"checkpoint": file, "sha256": "0" * 64}, r"sha256 is .*, but the spec expects"),
    ):
        raw = adapter_training(images, backbone, {**BOTTLENECK, **adapter})
        with pytest.raises(UserError, match=message) as caught:
            certified(raw)
        assert "\n" not in str(caught.value)


class Uncalled(nn.Module):
    """Uses the weights of a linear layer without calling it."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.proj, self.fc = nn.Linear(784, 4), nn.Linear(4, num_classes)

    def forward(self, x_BCHW):
        return self.fc(F.linear(x_BCHW.flatten(1), self.proj.weight))


class Grouped(nn.Module):
    """Has a grouped convolution, into which no lora can be merged."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.grouped, self.plain, self.fc = nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3), nn.Linear(4, num_classes)


class Attention(nn.Module):
    """Has its only linear layer but the last inside PyTorch's attention."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(28, 2), nn.Linear(28, num_classes)


@pytest.mark.parametrize(
    ("classifier", "adapter", "message"),
    [
        (
            {},
            {"targets": ["*.fc1", "*.fc9"]},
            r"targets = \['\*.fc9'\] match no layer of .*; choose from .*blocks",
        ),
        (
            {"arch": "mnist_cnn"},
            {},
            r"targets is missing, but arch = 'mnist_cnn' has no .*; set targets to .*, conv1, ",
        ),
        ({"arch": "attention"}, {}, r"targets is missing, but arch = 'attention' has no linear .*; use another arch"),
        ({"arch": "grouped"}, {"kind": "lora", "targets": ["grouped"]}, r"match no layer of .*; choose from plain"),
        ({"arch": "uncalled"}, {"targets": ["proj"]}, r"adapter.targets: .*proj.* has no effect, .*; set targets"),
        ({"arch": "rrcm-b4"}, {}, r"classifier.adapter is given, but it is not applied to arch = 'rrcm-b4'; remove"),
        ({"arch": "tests.models:half_space"}, {}, r"classifier.adapter is given, but it is not applied to arch"),
        ({}, {"alpha": 1.0}, r"alpha = 1.0 belongs to kind = 'lora'"),
        ({}, {"rank": 0}, r"classifier.adapter.rank = 0: .* greater than or equal to 1"),
        ({}, {"kind": "prefix"}, r"classifier.adapter.kind = 'prefix'"),
    ],
)
def test_impossible_adapters_are_refused_in_one_line(images, backbone, monkeypatch, classifier, adapter, message):
    for network in (Uncalled, Attention, Grouped):
        monkeypatch.setitem(classifiers.CLASSIFIERS, network.__name__.lower(), Architecture(network, IDENTITY))
    raw = adapter_training(images, backbone, {**BOTTLENECK, **adapter})
    if classifier:
        raw["classifier"] = {**classifier, "adapter": raw["classifier"]["adapter"]}
        if classifier["arch"] in classifiers.CLASSIFIERS:
            made = classifiers.CLASSIFIERS[classifier["arch"]].make(2)
            save_file(made.state_dict(), backbone)
            raw["classifier"]["checkpoint"] = backbone
    with pytest.raises(UserError, match=message) as caught:
        train(raw, MemoryStore())
    assert "\n" not in str(caught.value)


def test_a_network_of_other_classes_starts_with_a_new_last_layer_if_the_training_says_so(images):
    with pytest.raises(UserError, match=r"fc.weight has shape \(10, .*, or set training.new_last_layer = true"):
        train(raw_training(images, classifier=MNIST), MemoryStore())
    spec = load_training(raw_training(images, classifier=MNIST, training={"new_last_layer": True}))
    begun = loop.make_task(spec, CPU, (1, 28, 28), 2).network.state_dict()
    old = classifiers.resolve_classifier(spec.run_spec(0.5)).load(CPU, 1, 10).network.state_dict()
    assert_equal(*({name: one for name, one in state.items() if "fc" not in name} for state in (begun, old)))
    assert begun["fc.weight"].std() > 0
    store = MemoryStore()
    train(raw_training(images, classifier=MNIST, training={"new_last_layer": True}), store)
    assert weights(store)["fc.weight"].shape == (2, 288)


@pytest.mark.parametrize("location", [None, "hf://diffsmooth/tiny/model.safetensors"], ids=["published", "hf"])
def test_weights_of_the_hub_start_a_training(images, tmp_path, monkeypatch, hub, location):
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    network = build(lambda: timm.create_model(VIT, num_classes=3, **SIZES), f"{RANDOM}0", CPU)
    repository = "diffsmooth/tiny" if location else timm.models.get_pretrained_cfg(VIT).hf_hub_id
    hub.repositories[repository] = {"main": {"model.safetensors": save(network.state_dict())}}
    training = {"new_last_layer": True, "pretrained": location is None, "steps": 1, "checkpoints": 1}
    raw = raw_training(images, training={**training, "learning_rate": 1e-30, "weight_decay": 0.0})
    raw["classifier"] = {"arch": f"timm:{VIT}", "options": SIZES, "normalize": "none"}
    if location:
        raw["classifier"]["checkpoint"] = location
    store = MemoryStore()
    train(raw, store)
    for name, one in network.state_dict().items():
        if not name.startswith("head."):
            torch.testing.assert_close(weights(store)[name], one, rtol=0, atol=1e-20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"new_last_layer": True}}, "new_last_layer = true, but all weights are new; remove it"),
        ({"training": {"pretrained": True}, "classifier": MNIST}, "pretrained = true, but classifier.checkpoint is "),
        ({"training": {"pretrained": True}}, "classifier.checkpoint is missing, but arch = 'mnist_cnn' needs weights"),
        ({"training": {"pretrained": True}, "task": "denoiser", "denoiser": {"arch": "edm"}, "classifier_loss": None},
         "training.pretrained = true, but task = 'denoiser'"),
    ],
)  # fmt: skip
def test_impossible_starts_are_refused_in_one_line(images, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        train(raw_training(images, **changes), MemoryStore())
    assert "\n" not in str(caught.value)
