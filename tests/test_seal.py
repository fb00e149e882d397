"""Seals: every change to a run is named, a proof of one sample is enough, and signatures are those of ssh-keygen."""

import hashlib
import json
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsmooth.jobs.analyze import Request, analyze
from diffsmooth.jobs.cli import main
from diffsmooth.pipeline.audit.files import Published
from diffsmooth.pipeline.audit.redraw import Effort, audit
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.results.stored import StoredRun
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import FolderStore, MemoryStore
from diffsmooth.pipeline.votes.blocks import encode_block, read_votes
from diffsmooth.pipeline.votes.seal import SampleProof, Seal, _path, _tree, add_seal, prove, read_seals
from tests.models import make_run

BLOCK, OTHER = "votes/estimation/3-100.parquet", "votes/estimation/3-0.parquet"


@pytest.fixture
def home(raw_spec, tmp_path):
    make_run(load_spec(raw_spec), tmp_path / "run")
    return tmp_path / "run"


def last(home) -> Seal:
    return list(read_seals(FolderStore(str(home))).values())[-1]


def found(home, root, **published):
    effort = Effort(blocks=0, seed=0)
    return audit(str(home), spec=None, effort=effort, published=Published(root=root, **published)).findings


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def reference(leaves):
    """The root as RFC 6962 defines it, by recursion."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + reference(leaves[:split]) + reference(leaves[split:])).digest()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=70))
def test_the_tree_is_that_of_rfc_6962(leaves):
    assert _tree(leaves) == reference(leaves)
    assert all(len(_path(index, leaves)) <= 7 for index in range(len(leaves)))


def test_a_finished_run_is_sealed_once_and_passes(home):
    sealed = last(home)
    assert [path.name for path in (home / "seals").iterdir()] == ["001.sha256"]
    assert len(sealed.entries) == 2 + 8 * 3  # run.json, the order, and the blocks of 8 samples
    assert found(home, sealed.root) == found(home, sealed.root.upper()) == []
    again = run("seal", home, "--json")
    assert json.loads(again.stdout) == {
        "run": str(home), "seal": "001", "root": sealed.root, "objects": 26, "signed": False
    }  # fmt: skip
    assert len(list((home / "seals").iterdir())) == 1


def test_the_seal_is_read_by_sha256sum(home):
    checked = subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "seals/001.sha256"], cwd=home)
    assert checked.returncode == 0


def test_a_tampered_missing_extra_or_swapped_block_is_named(home):
    root, first, second = last(home).root, (home / BLOCK).read_bytes(), (home / OTHER).read_bytes()

    def named():
        (line,) = [one for one in found(home, root) if "after seal 001" in one]
        return line

    (home / BLOCK).write_bytes(first[:-1] + b"x")
    assert f"{BLOCK} was changed after seal 001" in named()
    (home / BLOCK).unlink()
    assert f"{BLOCK} is missing after seal 001" in named()
    (home / BLOCK).write_bytes(first)
    extra = home / "votes" / "estimation" / "3-200.parquet"
    extra.write_bytes(first)
    assert "votes/estimation/3-200.parquet was added after seal 001" in named()
    extra.unlink()
    (home / BLOCK).write_bytes(second)
    (home / OTHER).write_bytes(first)
    lines = "\n".join(found(home, root))
    assert f"{BLOCK} has the contents that the seal lists for {OTHER}" in lines
    assert f"{OTHER} has the contents that the seal lists for {BLOCK}" in lines


def test_a_changed_order_run_json_or_seal_is_named(home):
    root = last(home).root
    for key in ("orders/001.json", "run.json"):
        text = (home / key).read_text()
        (home / key).write_text(text + "\n")
        assert any(f"{key} was changed after seal 001" in one for one in found(home, root))
        (home / key).write_text(text)
    assert found(home, root) == []
    seal = home / "seals" / "001.sha256"
    seal.write_text(seal.read_text().replace(last(home).entries[BLOCK], "0" * 64))
    assert found(home, root) == [f"{home} has no seal with the root {root}; ask its author"]


def test_a_run_that_grew_has_a_chain_of_seals(home):
    root = last(home).root
    analyze(str(home), Request(alpha=0.01), quiet=True)
    grown = last(home)
    assert grown.name == "002"
    assert "seals/001.sha256" in grown.entries
    assert found(home, grown.root) == []
    assert found(home, root) == [f"{home}: orders/002.json was added after seal 001; check the run with a later root"]
    text = (home / "seals" / "001.sha256").read_text()
    (home / "seals" / "001.sha256").write_text(text.replace(text[:64], "0" * 64, 1))
    assert any("seals/001.sha256 was changed after seal 002" in one for one in found(home, grown.root))


def test_without_a_root_the_last_seal_is_checked_and_growth_is_no_finding(home):
    shutil.copy(home / "orders" / "001.json", home / "orders" / "002.json")
    assert not any("seal" in one for one in found(home, None))
    (home / "run.json").write_text((home / "run.json").read_text() + " ")
    assert any("run.json was changed after seal 001" in one for one in found(home, None))


def test_an_incomplete_run_is_not_sealed(home):
    shutil.rmtree(home / "seals")
    (home / BLOCK).unlink()
    assert run("analyze", home, "--alpha", "0.01").exit_code in (1, 2)
    assert not (home / "seals").exists()


def test_a_proof_of_one_sample_holds_for_its_blocks_alone(home):
    proof = SampleProof.model_validate_json(run("seal", home, "--sample", 3).stdout)
    assert proof.follows()
    assert proof.root == last(home).root
    assert sorted(proof.blocks) == sorted(key for key in last(home).entries if "/3-" in key)
    for key, sha256 in proof.blocks.items():
        assert hashlib.sha256((home / key).read_bytes()).hexdigest() == sha256
    changed = [
        {"blocks": proof.blocks | {BLOCK: "0" * 64}},
        {"blocks": {key: one for key, one in proof.blocks.items() if key != BLOCK}},
        {"blocks": proof.blocks | {"votes/estimation/3-200.parquet": "0" * 64}},
        {"blocks": proof.blocks | {"votes/estimation/4-0.parquet": "0" * 64}},
        {"sample": 4},
        {"root": "0" * 64},
        {"index": proof.index + 1},
        {"path": proof.path[:-1]},
        {"path": [*proof.path, "0" * 64]},
    ]
    for change in changed:
        assert not proof.model_copy(update=change).follows(), change
    assert "no block of sample 99" in run("seal", home, "--sample", 99).stderr


@pytest.mark.parametrize("samples", range(1, 20))
def test_every_sample_of_every_number_of_samples_has_a_proof(samples):
    entries = {f"votes/estimation/{one}-0.parquet": f"{one:064x}" for one in range(samples)} | {"run.json": "f" * 64}
    seal = Seal(name="001", entries=entries)
    for one in range(samples):
        proof = prove(seal, one)
        assert proof.follows()
        assert not proof.model_copy(update={"index": proof.index - 1}).follows()


def make_key(folder, name) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    public = (folder / f"{name}.pub").read_text().split()
    return f"{name}@example.org {public[0]} {public[1]}\n"


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is missing")
def test_a_seal_is_signed_and_the_signature_verified(home, tmp_path):
    (tmp_path / "author").write_text(make_key(tmp_path, "a"))
    (tmp_path / "stranger").write_text(make_key(tmp_path, "b"))
    root = last(home).root
    unsigned = [f"{home}: seal 001 is signed by none of {tmp_path}/author; ask its author"]
    assert found(home, root, signers=str(tmp_path / "author")) == unsigned
    signed = run("seal", home, "--sign", tmp_path / "a")
    assert signed.exit_code == 0, signed.output
    assert "signed" in signed.stdout
    assert found(home, root, signers=str(tmp_path / "author")) == []
    assert len(found(home, root, signers=str(tmp_path / "stranger"))) == 1
    assert "this seal is signed already" in run("seal", home, "--sign", tmp_path / "b").stderr
    (home / "seals" / "001.sha256.sig").write_text("no signature")
    assert found(home, root, signers=str(tmp_path / "author")) == unsigned
    assert "cannot sign with this key" in run("seal", home, "--sign", tmp_path / "a.pub.none").stderr
    assert "no such file" in run("audit", home, "--signers", tmp_path / "none").stderr


@pytest.mark.parametrize(
    "text", ["", "x", "0" * 64 + "  run.json", "0" * 64 + "  ../../etc/passwd\n", "0" * 64 + "  votes/x.parquet\n"]
)
def test_a_damaged_seal_is_refused(text):
    store = MemoryStore()
    store.put_if_absent("seals/001.sha256", text.encode() * 2)
    with pytest.raises(RunError, match=r"seals/001\.sha256 is damaged: "):
        read_seals(store)


def test_seals_of_two_drivers_are_both_kept():
    store = MemoryStore()
    store.put_if_absent("run.json", b"{}")
    first, second = add_seal(store, {}), add_seal(store, {BLOCK: "0" * 64})
    assert (first.name, second.name) == ("001", "002")
    assert add_seal(store, {BLOCK: "0" * 64}) == second
    with pytest.raises(UserError, match="no block of sample 4"):
        prove(second, 4)


def test_a_block_that_was_cast_again_after_the_seal_is_read_again(home):
    """After a sealed block was deleted and cast again, the tables say what the blocks say, in any order of calls."""
    stored = StoredRun.open(str(home))
    (before,) = stored.read_blocks([Block(3, "estimation", 100, 200)])
    (home / BLOCK).unlink()
    only_first = before.classes.tolist() == [0]
    counts_K = np.array([0, 100] if only_first else [100, 0])
    stored.store.put_if_absent(BLOCK, encode_block(before.block, before.label, counts_K, before.metadata))
    stored.finish("001")
    pd.testing.assert_frame_equal(pd.read_parquet(home / "votes.parquet"), read_votes(str(home)), check_dtype=False)
    changed = pd.read_parquet(home / "votes.parquet").query(
        "sample == 3 and draw_start == 100 and stage == 'estimation'"
    )
    assert changed.set_index("class")["votes"].to_dict() == {int(counts_K.argmax()): 100}
