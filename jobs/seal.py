"""`diffsmooth seal`: commit to everything in a run by one hash, sign it, and prove what it says about a sample."""

from dataclasses import dataclass

import click

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.options import JSON, RUN_ARGUMENT
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.stored import StoredRun
from diffsmooth.pipeline.votes.seal import SampleProof, Seal, prove, read_seals, sign, signature_key


@click.command("seal")
@RUN_ARGUMENT
@click.option("--sign", "key_file", metavar="KEY", help="Sign the seal with this SSH key (ssh-keygen -Y sign).")
@click.option("--sample", type=click.IntRange(min=0), help="Print the proof of this sample as JSON; do not seal.")
@JSON
def seal_command(run: str, key_file: str | None, sample: int | None, as_json: bool) -> None:
    """Compute one hash, the root, over everything that RUN's certificates depend on. certify does so when it ends.

    \b
    diffsmooth seal runs/mnist
    diffsmooth seal runs/mnist --sign ~/.ssh/id_ed25519
    """
    if sample is not None:
        click.echo(prove_sample(run, sample).model_dump_json(indent=2))
        return
    conclude(seal(run, key_file), as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """What `seal` did."""

    run: str
    seal: Seal
    signed: bool

    def to_json(self) -> dict[str, str | int | bool]:
        return {
            "run": self.run,
            "seal": self.seal.name,
            "root": self.seal.root,
            "objects": len(self.seal.entries),
            "signed": self.signed,
        }

    def __str__(self) -> str:
        signed = ", signed" if self.signed else ""
        return (
            f"{self.run}: seal {self.seal.name} of {len(self.seal.entries):,} objects{signed}\n"
            f"root {self.seal.root}\n"
            "Publish the root; anyone can then check the run with: diffsmooth audit RUN --root ROOT\n"
        )


def seal(run_uri: str, key_file: str | None) -> Sealed:
    """Seal a run; with `key_file`, sign the seal by this SSH key.

    Raises: UserError if there is no run, or if the seal is signed already; RunError for a damaged block.
    """
    stored = StoredRun.open(run_uri)
    added = stored.seal()
    if key_file is not None and not stored.store.put_if_absent(signature_key(added.name), sign(added, key_file)):
        raise UserError(f"{stored.store.uri}/{signature_key(added.name)} exists: this seal is signed already")
    return Sealed(run=stored.store.uri, seal=added, signed=stored.store.exists(signature_key(added.name)))


def prove_sample(run_uri: str, sample: int) -> SampleProof:
    """What the last seal of a run says about a sample, and how its root follows. Raises: UserError, RunError."""
    stored = StoredRun.open(run_uri)
    seals = read_seals(stored.store)
    if not seals:
        raise UserError(f"{stored.store.uri} has no seal; run: diffsmooth seal RUN")
    return prove(seals[max(seals, key=int)], sample)
