"""The audit: an honest run passes; whatever was done to a run's files is found and named."""

import shutil

import numpy as np
import pandas as pd
import pytest

from jobs.audit import audit, blocks_for, report
from jobs.certify import analyze
from pipeline.block import Block
from pipeline.errors import UserError
from pipeline.spec import load_spec
from pipeline.votes import block_key, encode_block, read_blocks
from tests.models import make_run


@pytest.fixture
def spec(raw_spec):
    return load_spec(raw_spec)


@pytest.fixture
def store(spec, tmp_path):
    return make_run(spec, tmp_path / "run")


def found(store, spec=None, blocks=1000):
    facts = audit(store.uri, spec=spec, share=0.01, assurance=0.95, blocks=blocks, seed=0)
    assert all(finding in report(facts) for finding in facts["findings"])
    return facts["findings"]


KEY = block_key(Block(3, "estimation", 100, 200))


def test_an_honest_run_passes_and_is_cast_again_vote_for_vote(store, spec):
    facts = audit(store.uri, spec=spec, share=0.2, assurance=0.95, blocks=None, seed=None)
    assert facts["findings"] == []
    assert facts["redrawn"]["blocks"] == facts["redrawn"]["equal"] == blocks_for(0.2, 0.95) == 14
    assert facts["escape_probability"] == pytest.approx(0.8**14)
    assert facts["escape_probability"] <= 0.05 < 0.8**13
    assert "no block was cast again" in report(
        audit(store.uri, spec=None, share=0.2, assurance=0.95, blocks=None, seed=1)
    )


@pytest.mark.parametrize(("share", "assurance", "k"), [(0.5, 0.5, 1), (0.5, 0.75, 2), (0.01, 0.99, 459)])
def test_how_many_blocks_an_assurance_needs(share, assurance, k):
    assert blocks_for(share, assurance) == k


def test_swapped_files_are_named(store, tmp_path):
    other = tmp_path / "run" / block_key(Block(2, "estimation", 0, 100))
    shutil.copy(other, tmp_path / "run" / KEY)
    assert any(KEY in one and "says sample = 2 inside" in one for one in found(store))


def test_a_deleted_block_is_named(store, tmp_path):
    (tmp_path / "run" / KEY).unlink()
    findings = found(store)
    assert any(KEY in one and "deleted" in one for one in findings)
    assert any("order 001 lacks 1 blocks" in one for one in findings)


def test_a_block_of_another_run_is_named(store, spec, tmp_path):
    smoothing = spec.smoothing.model_copy(update={"seed": 9})
    make_run(spec.model_copy(update={"smoothing": smoothing}), tmp_path / "other")
    shutil.copy(tmp_path / "other" / KEY, tmp_path / "run" / KEY)
    assert any(KEY in one and "another run" in one for one in found(store))


def test_a_foreign_object_is_named(store, tmp_path):
    (tmp_path / "run" / "votes" / "estimation" / "notes.txt").write_text("x")
    assert any("notes.txt is no block" in one for one in found(store))


def test_a_second_copy_of_a_block_is_named(store, tmp_path):
    """Under another spelling of its name it would be counted twice by whoever reads the folder."""
    folder = tmp_path / "run" / "votes" / "estimation"
    shutil.copy(folder / "3-100.parquet", folder / "03-100.parquet")
    assert any("03-100.parquet is no block" in one for one in found(store))


def test_forged_votes_come_out_only_by_casting_again(store, spec, tmp_path):
    """Votes, table and certificates forged alike: the files agree with each other, and not with f."""
    (one,) = read_blocks(store, [Block(3, "estimation", 100, 200)])
    counts = np.array([100, 0]) if one.votes[0] != 100 or one.classes[0] else np.array([50, 50])
    store.replace(KEY, encode_block(one.block, one.label, counts, one.metadata))
    assert any(KEY in finding and "was changed" in finding for finding in found(store))
    analyze(store.uri, alpha=None, n0=None, n=None, quiet=True)
    assert found(store) == []
    assert any(KEY in finding and "other votes than f casts" in finding for finding in found(store, spec))


def test_certificates_that_do_not_follow_are_named(store, tmp_path):
    path = tmp_path / "run" / "orders" / "001" / "certificates.parquet"
    rows = pd.read_parquet(path)
    rows.loc[2, "radius"] += 0.01
    rows.to_parquet(path)
    assert any("does not follow from the votes (radius)" in one for one in found(store))


def test_another_spec_is_refused(store, spec):
    other = spec.model_copy(update={"smoothing": spec.smoothing.model_copy(update={"sigma": 0.5})})
    with pytest.raises(UserError, match="not the spec of this run"):
        found(store, other)
