"""Checkpoints in all common layouts; other files are refused, and code in a checkpoint is never run."""

import argparse
import json
import os
import pickle
import struct
import zipfile
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.files import load_json, weights_id
from diffsmooth.pipeline.models.weights import build, load_weights
from diffsmooth.pipeline.smoothing import build_base_classifier, weights_ids

CPU = torch.device("cpu")


def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()


@pytest.fixture
def trained():
    network, generator = make(), torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1, generator=generator)
    return network


def prefixed(network, prefix):
    return {f"{prefix}{key}": value for key, value in network.state_dict().items()}


def same(trained, path):
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.equal(build(make, str(path), CPU)(x), trained(x))


LAYOUTS = {
    "plain": lambda network: network.state_dict(),
    "module": lambda network: prefixed(network, "module."),
    "Cohen's CIFAR-10": lambda network: {"epoch": 90, "arch": "x", "state_dict": prefixed(network, "1."),
                                         "optimizer": {"state": {0: {"momentum": torch.ones(1)}}, "param_groups": []}},
    "Cohen's ImageNet": lambda network: {"state_dict": prefixed(network, "1.module."), "best": np.float64(0.5)},
    "robustness": lambda network: {"model": prefixed(network, "module.model.") | {"module.std": torch.ones(1)},
                                   "args": argparse.Namespace(lr=0.1)},
    "net": lambda network: {"net": network.state_dict(), "acc": np.float32(0.5), "epoch": 3},
    "without counters": lambda network: {
        key: value for key, value in network.state_dict().items() if "num_batches" not in key
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts(tmp_path, trained, layout, zipped):
    torch.save(LAYOUTS[layout](trained), tmp_path / "a.pth.tar", _use_new_zipfile_serialization=zipped)
    assert same(trained, tmp_path / "a.pth.tar")


def test_safetensors(tmp_path, trained):
    save_file(prefixed(trained, "1."), tmp_path / "a.safetensors")
    assert same(trained, tmp_path / "a.safetensors")


def test_several_networks_in_one_file_need_a_name(tmp_path, trained):
    other = {key: torch.zeros_like(value) for key, value in trained.state_dict().items()}
    torch.save({"model": other, "model_ema": prefixed(trained, "module.")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"holds model, model_ema; choose one, for example '#model'"):
        build(make, f"{tmp_path}/a.pt", CPU)
    assert same(trained, f"{tmp_path}/a.pt#model_ema")
    save_file(
        prefixed(trained, "b.") | {f"a.{key}": value for key, value in other.items()}, tmp_path / "two.safetensors"
    )
    assert same(trained, f"{tmp_path}/two.safetensors#b")


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name, zipped in (("a.pt", True), ("b.pt", False)):
        torch.save(
            {"state_dict": {"0.weight": torch.ones(1)}, "x": Evil()},
            tmp_path / name,
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(
            UserError, match=r"holds Python objects besides tensors, which are never executed .*mkdir"
        ) as error:
            load_weights(f"{tmp_path}/{name}")
        assert "weights_only" not in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a file of weights"):
        load_weights(f"{tmp_path}/plain.pt")
    assert not (tmp_path / "ran").exists()


def test_tensors_that_do_not_fit_are_named(tmp_path, trained):
    state = trained.state_dict()
    cases = {
        "shape": (
            {**state, "3.weight": torch.zeros(5, 16)},
            r"3\.weight has shape \(5, 16\).* expects \(3, 16\); use a file of this",
        ),
        "missing": ({key: state[key] for key in state if key != "1.bias"}, r"1\.bias \(4,\) is missing"),
        "superfluous": ({**state, "4.weight": torch.zeros(2)}, r"4\.weight \(2,\) is not part of the architecture"),
    }
    for name, (changed, message) in cases.items():
        torch.save(changed, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=message):
            build(make, f"{tmp_path}/{name}.pt", CPU)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        build(make, f"{tmp_path}/list.pt", CPU)


def test_a_file_may_contain_computed_buffers(tmp_path):
    """Early timm files contain BEiT's relative_position_index, which timm now computes."""
    beit = pytest.importorskip("timm").models.beit.Beit

    def tiny():
        return beit(
            img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=3, use_rel_pos_bias=True
        )

    network, generator = tiny().eval(), torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=generator)
    index = network.blocks[0].attn.relative_position_index
    state = prefixed(network, "1.") | {"1.blocks.0.attn.relative_position_index": torch.zeros_like(index)}
    torch.save({"arch": "beit", "state_dict": state}, tmp_path / "a.pt")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    loaded = build(tiny, f"{tmp_path}/a.pt", CPU)
    assert torch.equal(loaded.blocks[0].attn.relative_position_index, index)
    with torch.no_grad():
        assert torch.allclose(loaded(x), network(x), rtol=1e-5)


def test_initial_weights_are_never_generated(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    before = torch.get_rng_state()
    build(make, f"{tmp_path}/a.pt", CPU)
    assert torch.equal(torch.get_rng_state(), before)
    make()
    assert not torch.equal(torch.get_rng_state(), before)


def test_damaged_and_foreign_checkpoints(tmp_path):
    whole = (files("diffsmooth.pipeline.embedded") / "mnist.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    (tmp_path / "page.pt").write_bytes(b"<!DOCTYPE html><html>sign in</html>")
    cases = {
        f"{tmp_path}/nowhere.pt": "no such file",
        f"{tmp_path}/cut.safetensors": "damaged",
        f"{tmp_path}/cut.pt": "damaged",
        f"{tmp_path}/page.pt": "not a file of weights",
        "embedded:mnist.safetensors#denoiser": r"missing; the architecture is mnist_cnn with the data set's 10 classes",
        "embedded:mnist.safetensors#nothing": r"no keys that begin with 'nothing\.'",
    }
    for location, message in cases.items():
        with pytest.raises(UserError, match=message):
            build_base_classifier(load_named("mnist", [f"classifier.checkpoint='{location}'"]), "cpu")
    with pytest.raises(UserError, match=r"its sha256 is [0-9a-f]{64}, but the spec expects 0{64}"):
        weights_ids(load_named("mnist", [f"classifier.sha256='{'0' * 64}'"]))


def zipped_pickle(path, content: bytes):
    """Write a torch file whose pickle is `content`."""
    torch.save({"a": torch.ones(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, old in entries.items():
            archive.writestr(name, content if name.endswith("data.pkl") else old)


def test_a_compressed_archive_is_refused(tmp_path, trained):
    """Mapped into memory, its compressed bytes would be taken for weights."""
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        for name, content in entries.items():
            kind = zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED
            archive.writestr(name, content, kind)
    with pytest.raises(UserError, match=r"data/0 is compressed"):
        load_weights(str(tmp_path / "b.pt"))


def test_a_flipped_byte_of_the_weights_is_found(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    assert same(trained, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    weight = trained.state_dict()["3.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"the checksum of .*data/\d+ differs"):
        load_weights(str(tmp_path / "a.pt"))


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def tensor_of(**changes) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}).encode()


PICKLES = {
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "empty stack": b"\x80\x02.",
    "unknown memo": b"\x80\x02h\x07.",
    "no such opcode": b"\x80\x02\xff.",
    "cut string": b"\x80\x02X\xff\xff\xff\x7fabc",
    "not utf-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "persistent id": b"\x80\x02K\x01Q.",
    "integer keys": b"\x80\x02}K\x01K\x02s.",
    "empty": b"",
}
HEADERS = {
    "no header": b"",
    "endless header": safetensors(b"{}", 2**63),
    "not json": safetensors(b"{not json}"),
    "a list": safetensors(b"[1, 2]"),
    "deep json": safetensors(b"[" * 50_000 + b"]" * 50_000),
    "unknown type": safetensors(tensor_of(dtype="F33")) + bytes(4),
    "offsets outside": safetensors(tensor_of(data_offsets=[0, 400])) + bytes(4),
    "negative shape": safetensors(tensor_of(shape=[-1])) + bytes(4),
    "huge shape": safetensors(tensor_of(shape=[10**18])) + bytes(4),
}


@pytest.mark.parametrize("kind", [*PICKLES, *HEADERS])
def test_hostile_checkpoints_give_one_line(tmp_path, kind):
    if kind in PICKLES:
        path = tmp_path / "a.pt"
        zipped_pickle(path, PICKLES[kind])
    else:
        path = tmp_path / "a.safetensors"
        path.write_bytes(HEADERS[kind])
    with pytest.raises(UserError, match=r"^checkpoint /.*(damaged|not a file of weights|holds|cannot)") as error:
        load_weights(str(path))
    assert "\n" not in str(error.value)


def test_any_damage_to_a_checkpoint_gives_one_line(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    torch.save(trained.state_dict(), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    generator, lines = np.random.default_rng(2), []
    for name in ("a.safetensors", "a.pt", "b.pt"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(whole[: generator.integers(len(whole))] if generator.random() < 0.2 else whole)
            for _ in range(3):
                if damaged:
                    damaged[generator.integers(len(damaged)) % 2000] ^= 1 << generator.integers(8)
            path = tmp_path / f"damaged.{name}"
            path.write_bytes(damaged)
            try:
                build(make, str(path), CPU)
            except UserError as error:
                lines.append(str(error))
    assert len(lines) > 60
    assert not any("\n" in line for line in lines)


def test_only_regular_files_are_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    for name in ("fifo.pt", "folder.pt", "loop.pt", "zero.pt", "n" * 300, "embedded:../errors.py", "embedded:nothing"):
        location = name if name.startswith("embedded") else f"{tmp_path}/{name}"
        for read in (load_weights, weights_id):
            with pytest.raises(UserError, match=r"; (give|use)") as error:
                read(location)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, dtype=torch.int64), torch.ones(4).to_sparse(), torch.ones(4, device="meta")],
    ids=["integers", "sparse", "without memory"],
)
def test_tensors_of_an_unsuitable_kind_are_refused(tmp_path, trained, tensor):
    torch.save({**trained.state_dict(), "1.bias": tensor}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"1\.bias is a tensor of .*, the architecture expects torch\.float32; use a"):
        build(make, f"{tmp_path}/a.pt", CPU)


def test_a_network_that_cannot_be_allocated_is_refused():
    with pytest.raises(UserError, match=r"its network cannot be allocated .*; use a smaller network"):
        build(lambda: nn.Linear(2**31, 2**31), "embedded:mnist.safetensors", CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "holds a JSON list, not an object"), ("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"),
     ("\udcff", "not valid JSON")],
)  # fmt: skip
def test_configuration_files_that_are_not_objects_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        load_json(str(tmp_path / "config.json"))
