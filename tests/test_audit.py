"""The audit: an honest run passes, and every change to the files of a run is found and named."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diffsmooth.jobs.analyze import Request, analyze
from diffsmooth.pipeline.audit.files import Published
from diffsmooth.pipeline.audit.redraw import Effort, audit
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.votes.blocks import block_key, encode_block, read_blocks
from diffsmooth.pipeline.votes.run import read_run
from tests.models import make_run


@pytest.fixture
def store(spec, tmp_path):
    return make_run(spec, tmp_path / "run")


def found(store, spec=None, blocks=1000):
    """The findings of an audit; all of them are printed."""
    audited = audit(store.uri, spec=spec, effort=Effort(blocks=blocks, seed=0))
    assert all(finding in str(audited) for finding in audited.findings)
    return audited.findings


KEY = block_key(Block(3, "estimation", 100, 200))


def test_an_honest_run_passes_and_its_blocks_are_equal_when_cast_again(store, spec):
    audited = audit(store.uri, spec=spec, effort=Effort(share=0.2))
    assert audited.findings == []
    assert audited.redrawn.blocks == audited.redrawn.equal == Effort(share=0.2).wanted == 14
    assert audited.escape_probability == pytest.approx(0.8**14)
    assert audited.escape_probability <= 0.05 < 0.8**13
    assert "no block was cast again" in str(audit(store.uri, spec=None, effort=Effort(seed=1)))


@pytest.mark.parametrize(("share", "assurance", "k"), [(0.5, 0.5, 1), (0.5, 0.75, 2), (0.01, 0.99, 459)])
def test_number_of_blocks_that_an_assurance_needs(share, assurance, k):
    assert Effort(share=share, assurance=assurance).wanted == k


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan"), float("inf")])
def test_impossible_shares_are_refused(value):
    with pytest.raises(UserError, match=r"--share .* must be above 0 and below 1"):
        Effort(share=value)


def test_swapped_files_are_named(store, tmp_path):
    other = tmp_path / "run" / block_key(Block(2, "estimation", 0, 100))
    shutil.copy(other, tmp_path / "run" / KEY)
    assert any(KEY in one and "its name and its contents differ in sample" in one for one in found(store))


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
    assert any("notes.txt is not a block" in one for one in found(store))


def test_a_second_copy_of_a_block_is_named(store, tmp_path):
    """Under another spelling of its name, readers of the folder would count it twice."""
    folder = tmp_path / "run" / "votes" / "estimation"
    shutil.copy(folder / "3-100.parquet", folder / "03-100.parquet")
    assert any("03-100.parquet is not a block" in one for one in found(store))


def test_forged_votes_are_detected_only_by_casting_again(store, spec, tmp_path):
    """With votes, table and certificates forged consistently, the files agree with each other but not with f."""
    (one,) = read_blocks(store, read_run(store), [Block(3, "estimation", 100, 200)])
    counts = np.array([100, 0]) if one.counts[0] != 100 or one.classes[0] else np.array([50, 50])
    store.replace(KEY, encode_block(one.block, one.label, counts, one.metadata))
    assert any(KEY in finding and "changed after" in finding for finding in found(store))
    analyze(store.uri, Request(), quiet=True)
    assert found(store) == []
    assert any(KEY in finding and "f casts other votes" in finding for finding in found(store, spec))


def test_certificates_that_do_not_follow_are_named(store, tmp_path):
    path = tmp_path / "run" / "orders" / "001" / "certificates.parquet"
    rows = pd.read_parquet(path)
    rows.loc[2, "radius"] += 0.01
    rows.to_parquet(path)
    assert any("does not follow from the votes (radius)" in one for one in found(store))


def test_another_spec_is_refused(store, spec):
    other = spec.model_copy(update={"smoothing": spec.smoothing.model_copy(update={"sigma": 0.5})})
    with pytest.raises(UserError, match="is not the spec of this run"):
        found(store, other)


def rewrite(path, **columns):
    pd.read_parquet(path).assign(**columns).to_parquet(path)


@pytest.mark.parametrize("rows", [lambda votes: votes[1:], lambda votes: pd.concat([votes, votes[:1]])], ids="-+")
def test_a_row_that_was_removed_from_the_table_of_votes_or_repeated_is_found(store, tmp_path, rows):
    path = tmp_path / "run" / "votes.parquet"
    votes = pd.read_parquet(path)
    assert (votes.iloc[0][["sample", "draw_start"]] == votes.iloc[1][["sample", "draw_start"]]).all()  # of one block
    rows(votes).to_parquet(path)
    assert any("0-0.parquet changed after votes.parquet was written" in one for one in found(store))


def test_a_changed_post_hoc_mark_is_found(store, tmp_path):
    rewrite(tmp_path / "run" / "orders" / "001" / "certificates.parquet", post_hoc=True)
    assert any("does not follow from the votes (post_hoc)" in one for one in found(store))


def test_a_changed_or_deleted_order_is_found(store, tmp_path):
    analyze(store.uri, Request(alpha=0.01), quiet=True)
    assert found(store) == []
    path = tmp_path / "run" / "orders" / "001.json"
    path.write_text(
        path.read_text().replace('"alpha":0.001', '"alpha":0.01').replace('"alpha": 0.001', '"alpha": 0.01')
    )
    assert any("order 001 was changed after order 002" in one for one in found(store))
    path.unlink()
    assert any("order 001 is missing" in one for one in found(store))


def test_the_commitment_is_the_hash_of_the_first_order(store, tmp_path):
    def audited(commitment):
        return audit(store.uri, spec=None, effort=Effort(), published=Published(commitment=commitment)).findings

    for name in ("orders/001.json", "run.json"):
        assert audited(hashlib.sha256((tmp_path / "run" / name).read_bytes()).hexdigest()) == []
    assert any("--commitment 00" in one for one in audited("00" * 32))


@pytest.fixture
def planned_spec(raw_spec):
    raw_spec["smoothing"] |= {"n": 2000, "n0": 200}
    return load_spec(raw_spec | {"sampling": {"mode": "planned", "max_acr_loss": 0.05}})


def forge_plan(store, name):
    path = Path(store.uri, "orders", name, "plan.json")
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "3": plan["3"] + 100}))


def test_a_plan_that_does_not_follow_from_the_pilots_is_found(planned_spec, tmp_path):
    store = make_run(planned_spec, tmp_path / "planned")
    assert found(store) == []
    forge_plan(store, "001")
    assert any("plan.json does not follow from the selection votes" in one for one in found(store))


def test_plans_that_only_follow_from_each_other_are_found(planned_spec, tmp_path):
    store = make_run(planned_spec, tmp_path / "planned", samples=4)
    make_run(planned_spec, tmp_path / "planned", samples=5)  # keeps the draws of the first plan
    analyze(store.uri, Request(alpha=0.01), quiet=True)  # repeats the draws of both
    assert found(store) == []
    for name in ("001", "002", "003"):
        forge_plan(store, name)
    assert sum("plan.json does not follow from the selection votes" in one for one in found(store)) == 3


def test_a_fixed_seed_is_noted(store, spec, tmp_path):
    assert any("the seed 0 is fixed" in note for note in audit(store.uri, spec=None, effort=Effort()).notes)
    secret = make_run(spec.with_seed(2**100 + 1), tmp_path / "secret")
    assert audit(secret.uri, spec=None, effort=Effort()).notes == []
