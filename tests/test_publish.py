"""Publishing: a published run reads as the original does, on the Hub, from a web server and from a folder."""

import hashlib
import json
import re
import shutil
import subprocess
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import diffsmooth as ds
from diffsmooth.jobs.cli import main
from diffsmooth.jobs.publish import publish
from diffsmooth.pipeline.audit.files import Published
from diffsmooth.pipeline.audit.redraw import Effort, audit
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.data.sets import DATASETS
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.results.stored import StoredRun, read_result
from diffsmooth.pipeline.show.card import results_file
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import block_key
from diffsmooth.pipeline.votes.seal import read_seals
from tests.attacking import attack_alone
from tests.conftest import half_space_spec, write_images
from tests.hub_server import TOKEN
from tests.models import make_run, to_toml

PLACE = "hf://datasets/org/run"
KEY = block_key(Block(3, "estimation", 100, 200))


def invoke(*arguments):
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with a run, and with what a dry run publishes of it."""
    folder = tmp_path_factory.mktemp("originals")
    make_run(half_space_spec(write_images(folder / "images.parquet")), folder / "run")
    publish(str(folder / "run"), PLACE, dry_run=str(folder / "published"))
    return folder


@pytest.fixture
def spec(originals):
    return half_space_spec(originals / "images.parquet")


@pytest.fixture
def home(originals, tmp_path):
    return str(shutil.copytree(originals / "run", tmp_path / "run"))


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals / "published", tmp_path / "published")


@pytest.fixture
def web(folder, tmp_path, monkeypatch):
    """The published run on a plain web server without listings."""

    class Handler(SimpleHTTPRequestHandler):
        def list_directory(self, path):
            self.send_error(403)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/published"
    server.shutdown()
    server.server_close()


@pytest.fixture
def on_hub(folder, hub):
    """The published run on the Hub, merged."""
    files = {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
    hub.repositories["datasets/org/run"] = {"main": files}
    return PLACE


@pytest.fixture(params=["folder", "web", "on_hub"])
def published(request):
    return str(request.getfixturevalue(request.param))


def status_of(place):
    found = StoredRun.open(place).status().to_json()
    orders = {name: {**order, "run": ""} for name, order in found["orders"].items()}
    return {**found, "orders": orders, "run": ""}


def test_a_published_run_reads_as_the_original(home, published):
    original, read = status_of(home), status_of(published)
    assert 0 <= original.pop("last_write") - read.pop("last_write") < 2  # the archive has even seconds
    assert read == original
    one, other = (invoke("curve", f"x={place}", "--format", "csv") for place in (home, published))
    assert one.output == other.output != ""
    assert audit(published, spec=None, effort=Effort()).findings == []
    found = ds.open_run(published)
    assert found.votes().equals(ds.open_run(home).votes())
    assert not ds.compare(f"a={home}", f"b={published}").pairs[0].radii[0].first_only


def test_the_report_of_a_published_run_is_that_of_the_original(home, folder, tmp_path):
    texts = []
    for place in (str(folder), home):
        assert invoke("report", f"x={place}", "--samples", 0, "--output", tmp_path / "r.html").exit_code == 0
        texts.append((tmp_path / "r.html").read_text().replace(place, ""))
    assert texts[0] == texts[1]
    assert "a published report shows no images of the data set" in (folder / "report.html").read_text()


def test_a_stranger_audits_a_published_run_with_its_root_and_casts_blocks_again(home, published, spec):
    root = read_seals(open_store(home))["001"].root
    found = audit(published, spec=spec, effort=Effort(blocks=5, seed=0), published=Published(root=root))
    assert (found.findings, found.redrawn.equal, found.redrawn.blocks) == ([], 5, 5)
    wrong = audit(published, spec=None, effort=Effort(), published=Published(root="0" * 64))
    assert "has no seal with the root" in wrong.findings[0]


def repacked(folder, change):
    """Write the archive and the index again, as someone would who may change the repository."""
    with zipfile.ZipFile(folder / "objects.zip") as archive:
        objects = {one.filename: archive.read(one) for one in archive.infolist()}
    change(objects)
    with zipfile.ZipFile(folder / "objects.zip", "w") as archive:
        for key, data in objects.items():
            archive.writestr(key, data)
    index = json.loads((folder / "index.json").read_text())
    data = (folder / "objects.zip").read_bytes()
    index["files"]["objects.zip"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))


def test_a_changed_byte_is_found(folder, web):
    assert audit(web, spec=None, effort=Effort()).findings == []
    path = folder / "objects.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for place in (folder, web):
        shutil.rmtree(folder.parent / "cache", ignore_errors=True)
        result = invoke("audit", place)
        assert (result.exit_code, result.output.count("\n")) == (1, 1)
        assert "objects.zip: its size or sha256 is not the one in index.json; publish" in result.output
    index = json.loads((folder / "index.json").read_text())
    index["files"]["objects.zip"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    result = invoke("audit", web)
    assert result.exit_code == 1
    assert "damaged" in result.output


def test_a_block_that_was_replaced_together_with_the_index_is_found(folder, web, home):
    before = audit(web, spec=None, effort=Effort())  # fills the cache
    other = block_key(Block(3, "estimation", 0, 100))

    def swap(objects):
        objects[KEY] = objects[KEY].replace(b'"seconds"', b'"SECONDS"')
        del objects[other]

    repacked(folder, swap)
    found = audit(web, spec=None, effort=Effort()).findings
    assert before.findings == []
    assert any(KEY in one and "damaged" in one for one in found)
    assert any(f"{other} is missing after seal 001" in one for one in found)


@pytest.mark.parametrize("key", ["run.json", "orders/001.json", "votes.parquet", "seals/001.sha256"])
def test_a_changed_file_is_found(folder, key):
    path = folder / key
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    result = invoke("audit", folder)
    assert result.exit_code == 1
    assert f"{key}: its size or sha256 is not the one in index.json" in result.output
    path.unlink()
    assert f"{key}: listed in index.json, but missing; publish" in invoke("audit", folder).output


@pytest.mark.parametrize("name", ["../run.json", "/etc/passwd", "votes//x", "votes/x\x1b[2J"])
def test_hostile_names_are_refused(folder, name):
    def add(objects):
        objects[name] = b""

    repacked(folder, add)
    with pytest.raises(RunError, match=r"objects\.zip is damaged: .* not a valid key, or occurs twice; ask") as error:
        StoredRun.open(str(folder)).status()
    assert "\x1b" not in str(error.value)
    index = json.loads((folder / "index.json").read_text())
    index["files"][name] = {"size": 0, "sha256": "0" * 64}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"index\.json is damaged \(files\..*; ask"):
        StoredRun.open(str(folder))


def test_a_commit_holds_what_a_dry_run_writes(home, hub, on_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    written = hub.repositories["datasets/org/run"]["main"]
    hub.repositories["datasets/org/run"] = {"main": {}}
    assert invoke("publish", home, PLACE, "--no-pr").exit_code == 0
    assert hub.repositories["datasets/org/run"] == {"main": written}
    assert {"run.json", "votes.parquet", "report.html", "README.md", "index.json", "objects.zip"} < written.keys()


def test_a_pull_request_is_opened_by_default(home, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["datasets/org/run"] = {"main": {"README.md": b"mine"}}
    result = invoke("publish", home, f"{PLACE}/a", "--json")
    found = json.loads(result.stdout)
    assert found["pages"] == [f"{hub.url}/datasets/org/run/discussions/1"]
    assert hub.repositories["datasets/org/run"]["main"] == {"README.md": b"mine"}
    assert {"README.md", "a/README.md", "a/run.json"} < hub.repositories["datasets/org/run"]["refs/pr/1"].keys()
    place = "hf://datasets/org/run@refs/pr/1/a"
    assert audit(place, spec=None, effort=Effort(), published=Published(root=found["root"])).findings == []


def test_results_are_added_to_the_page_of_the_model(home, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setitem(DATASETS, "parquet", replace(DATASETS["parquet"], benchmark="org/images"))
    hub.repositories |= {"datasets/org/run": {"main": {}}, "org/net": {"main": {"model.safetensors": b"x"}}}
    result = invoke("publish", home, PLACE, "--model", "hf://org/net")
    assert result.exit_code == 0
    file = ".eval_results/certified-l2-half-space.yaml"
    added = hub.repositories["org/net"]["refs/pr/1"]
    assert added.keys() == {"model.safetensors", file}
    assert hub.repositories["datasets/org/run"]["refs/pr/1"][file] == added[file]
    assert f"{hub.url}/org/net/discussions/1" in result.output


def test_a_card_says_how_to_audit(folder, home):
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    described = yaml.safe_load(header)
    assert all((folder / one["data_files"]).is_file() for one in described["configs"])
    root = read_seals(open_store(home))["001"].root
    assert f"diffsmooth audit {PLACE} --root {root}\n" in body
    assert f"{read_result(home).result.curve.at([0.0])[0] * 100:.1f}" in body


def test_seals_are_checked_without_this_package(folder):
    with zipfile.ZipFile(folder / "objects.zip") as archive:
        archive.extractall(folder)
    subprocess.run(["sha256sum", "--check", "--quiet", "seals/001.sha256"], cwd=folder, check=True)


def test_results_file_has_the_layout_of_the_hub(home):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    one = read_result(home)
    assert results_file(one, "https://huggingface.co/datasets/org/run") is None  # no benchmark has these images
    identity = one.result.run.spec
    spec = identity.model_copy(update={"data": identity.data.model_copy(update={"name": "imagenet"})})
    run = one.result.run.model_copy(update={"spec": spec})
    known = one.__class__(**{**vars(one), "result": one.result.__class__(**{**vars(one.result), "run": run})})
    written = yaml.safe_load(results_file(known, "https://huggingface.co/datasets/org/run"))
    entries = huggingface_hub.parse_eval_result_entries(written)
    accuracies = one.result.summary().certified_accuracy
    assert {entry.task_id: entry.value for entry in entries} == {
        f"certified_l2_{radius}": pytest.approx(100 * accuracy, abs=0.005) for radius, accuracy in accuracies.items()
    }
    assert {entry.dataset_id for entry in entries} == {"ILSVRC/imagenet-1k"}


def test_attacks_are_published_unless_they_are_left_out(spec, home, tmp_path):
    attack, samples = attack_alone(spec, open_store(home), range(2))
    publish(home, PLACE, dry_run=str(tmp_path / "with"))
    publish(home, PLACE, attacks=False, dry_run=str(tmp_path / "without"))
    found = StoredRun.open(str(tmp_path / "with")).attacks()
    assert [one.sample for one in found.samples[attack.id]] == [one.sample for one in samples]
    assert audit(str(tmp_path / "with"), spec=spec, effort=Effort(blocks=2, seed=0)).findings == []
    assert StoredRun.open(str(tmp_path / "without")).attacks() is None
    assert "attack" not in (tmp_path / "without" / "README.md").read_text()


SECRET = "planted-5ecret"


def test_no_secret_is_published(home, originals, hub, monkeypatch, tmp_path):
    """Files beside the run's, environment variables and the token stay here."""
    for name in ("notes.txt", "progress.json", "orders/x.txt", "seals/key", "attacks/x.txt", ".env"):
        (Path(home) / name).parent.mkdir(exist_ok=True)
        (Path(home) / name).write_text(SECRET)
    for name in ("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN", "DIFFSMOOTH_MODELS"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["datasets/org/run"] = {"main": {}}
    result = invoke("publish", home, PLACE)
    assert result.exit_code == 0
    sent = b"".join(hub.received + list(hub.repositories["datasets/org/run"]["refs/pr/1"].values()))
    assert not any(word.encode() in sent for word in (SECRET, TOKEN, home, str(tmp_path), str(originals)))
    assert not any(word in result.output for word in (SECRET, TOKEN))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["{tmp}/none", PLACE], 2, "no run here"),
        (
            ["{home}", "hf://org/model"],
            2,
            "hf://org/model: not the repository of a data set; write hf://datasets",
        ),
        (["{home}", "runs/b"], 2, "not a place on the Hub; write hf://"),
        (["{home}", PLACE, "--dry-run", "{home}"], 2, "the folder is not empty; give a new folder"),
        (["{home}", PLACE, "--model", "hf://org/net"], 2, "no benchmark on the Hub for data.name = 'parquet'"),
        (["{home}", "hf://datasets/org/none"], 2, "no dataset org/none, or .* create it .hf repos create org/none"),
        (["{home}", "hf://datasets/org/run"], 2, "access denied .403.; set HF_TOKEN"),
    ],
)
def test_refusals_are_one_line(home, hub, tmp_path, arguments, status, words):
    hub.repositories["datasets/org/run"] = {"main": {}}
    result = invoke("publish", *(one.format(home=home, tmp=tmp_path) for one in arguments))
    assert (result.exit_code, result.output.count("\n")) == (status, 1)
    assert re.search(words, result.output)


def test_a_run_that_is_not_complete_is_refused(home, tmp_path):
    stored = StoredRun.open(home)
    stored.place(stored.orders["001"].changed(n=400))
    result = invoke("publish", home, PLACE, "--dry-run", tmp_path / "x")
    assert result.exit_code == 2
    assert "order 002 is not complete (8 samples lack draws); run certify again" in result.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("write", ["prepare", "put_if_absent", "replace"])
def test_a_published_run_is_read_only(folder, write):
    arguments = [] if write == "prepare" else ["run.json", b""]
    with pytest.raises(UserError, match="a published run is read-only; use"):
        getattr(open_store(folder), write)(*arguments)


def test_commands_that_write_are_refused_in_one_line(folder, spec, tmp_path):
    (tmp_path / "a.toml").write_text(to_toml(spec))
    for command in (["analyze", folder, "--alpha", "0.01"], ["certify", tmp_path / "a.toml", "--out", folder]):
        result = invoke(*command)
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
        assert f"{folder}: a published run is read-only; use" in result.output
    assert invoke("seal", folder).exit_code == 0  # it is sealed already


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/x?sig=s3cret", "https://me:s3cret@host/x"])
def test_a_url_with_a_secret_is_refused(place):
    result = invoke("status", place)
    assert "must have no user, password, query or fragment" in result.output
    assert "s3cret" not in result.output


def test_a_place_without_a_published_run_is_named(web, hub):
    hub.repositories["datasets/org/run"] = {"main": {}}
    for place in (f"{web}/none", PLACE):
        result = invoke("status", place)
        assert (result.exit_code, result.output.count("\n")) == (2, 1)
        assert f"{place}: no published run here (no index.json); give the place" in result.output


def test_a_cache_that_others_can_write_is_named(web, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert "other users can change the files of this cache folder" in invoke("status", web).output


def test_objects_that_decode_to_far_more_than_their_size_are_refused(folder):
    def bomb(objects):
        objects[KEY] = b"\0" * 10

    repacked(folder, bomb)
    with zipfile.ZipFile(folder / "objects.zip") as archive:
        assert archive.getinfo(KEY).file_size == 10
    with pytest.raises(RunError, match=r"at most 5 are expected"):
        open_store(folder).read(KEY, limit=5)


def test_a_published_run_is_published_again_with_the_same_bytes(folder, tmp_path):
    publish(str(folder), PLACE, dry_run=str(tmp_path / "again"))
    for name in ("index.json", "objects.zip"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_more_than_one_seal_and_order_is_published(spec, tmp_path):
    make_run(spec, tmp_path / "run", samples=4)
    make_run(spec, tmp_path / "run", samples=8)
    publish(str(tmp_path / "run"), PLACE, dry_run=str(tmp_path / "published"))
    stored = StoredRun.open(str(tmp_path / "published"))
    assert list(stored.orders) == ["001", "002"]
    assert list(read_seals(stored.store)) == ["001", "002"]


def test_a_run_in_planned_mode_is_published_with_its_plan(spec, tmp_path):
    planned = spec.model_copy(
        update={
            "smoothing": spec.smoothing.model_copy(update={"n": 2000, "n0": 200}),
            "sampling": spec.sampling.model_copy(update={"mode": "planned", "max_acr_loss": 0.05}),
        }
    )
    make_run(planned, tmp_path / "run")
    publish(str(tmp_path / "run"), PLACE, dry_run=str(tmp_path / "published"))
    assert StoredRun.open(str(tmp_path / "published")).plans == StoredRun.open(str(tmp_path / "run")).plans != {}
    assert audit(str(tmp_path / "published"), spec=None, effort=Effort()).findings == []
