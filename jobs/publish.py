"""`diffsmooth publish`: a run as a data set repository of the Hugging Face Hub, or as a folder for any web server."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.options import JSON, RUN_ARGUMENT
from diffsmooth.jobs.places import images_of
from diffsmooth.pipeline.attack.record import FOLDER, attacked, read_attacks
from diffsmooth.pipeline.certify.orders import OrderKeys
from diffsmooth.pipeline.certify.units import Images
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.stored import StoredResult, StoredRun, read_result
from diffsmooth.pipeline.show.card import card, results_file, results_name
from diffsmooth.pipeline.show.report import RunReport, render_report, report_of
from diffsmooth.pipeline.storage.folder import Entry
from diffsmooth.pipeline.storage.hub import check_repository, commit_files, page_of
from diffsmooth.pipeline.storage.published import write_published
from diffsmooth.pipeline.votes.blocks import BLOCKS_KEY, TABLE_KEY, block_key
from diffsmooth.pipeline.votes.run import RUN_KEY
from diffsmooth.pipeline.votes.seal import add_seal, seal_key, seal_names, signature_key

_NO_PICTURES = "a published report shows no images of the data set"


@click.command("publish")
@RUN_ARGUMENT
@click.argument("place", metavar="hf://datasets/ORG/NAME")
@click.option(
    "--commit", "--no-pr", "directly", is_flag=True, help="Commit to the repository instead of opening a pull request."
)
@click.option(
    "--model", metavar="hf://ORG/NAME", help="Also open a pull request that adds the results to this model's page."
)
@click.option("--no-attacks", is_flag=True, help="Leave out attacks, which contain perturbed images of the data set.")
@click.option("--dry-run", metavar="FOLDER", help="Write what would be published to a new folder; upload nothing.")
@JSON
def publish_command(run: str, place: str, no_attacks: bool, as_json: bool, **options: Any) -> None:
    """Publish a complete RUN, so that anyone can audit it: votes, certificates, seals, a report and a card.

    \b
    diffsmooth publish runs/mnist hf://datasets/ORG/NAME
    diffsmooth publish runs/mnist hf://datasets/ORG/NAME --dry-run published
    diffsmooth audit hf://datasets/ORG/NAME
    """
    conclude(publish(run, place, attacks=not no_attacks, **options), as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What `publish` did."""

    run: str
    place: str  # where the run is read once the pull request is merged
    root: str  # of the seal
    files: int
    bytes: int
    pages: list[str]  # of the pull requests or commits; none for a dry run
    folder: str | None  # of a dry run

    def to_json(self) -> dict[str, str | int | list[str] | None]:
        return asdict(self)

    def __str__(self) -> str:
        done = [f"{self.run}: {self.files} files, {self.bytes / 1e6:,.1f} MB"]
        done += [f"written to {self.folder}"] if self.folder else self.pages
        return (
            "\n".join(
                [
                    *done,
                    f"root {self.root}",
                    f"audit it with: diffsmooth audit {self.folder or self.place} --root {self.root}",
                ]
            )
            + "\n"
        )


def publish(
    run_uri: str,
    place: str,
    *,
    directly: bool = False,
    model: str | None = None,
    attacks: bool = True,
    dry_run: str | None = None,
) -> Published:
    """Publish a complete run at `place`, hf://datasets/ORG/NAME[/FOLDER]: as a pull request, or `directly`.

    `model` is the hf:// location of the model that gets the results file. Without `attacks`, the files of attacks are
    left out: they contain perturbed images of the data set. A dry run writes the folder `dry_run` instead.

    The run is sealed first if it has changed since its last seal.

    Raises: UserError for a run that is not complete, and for a place that is no data set repository; RunError.
    """
    check_repository(place, of_data=True)
    if model is not None:
        check_repository(model, of_data=False)
    one = read_result(run_uri) if attacks else _without_attacks(read_result(run_uri))
    if model is not None and results_file(one, page_of(place)) is None:
        raise UserError(
            f"--model {model}: there is no benchmark on the Hub for data.name = {one.result.run.spec.data.name!r} and "
            f"the certificate {one.result.order.certificate!r}"
        )
    _check_complete(one)
    root = add_seal(one.stored.store, {block_key(block.block): block.sha256 for block in one.blocks}).root
    with _folder(dry_run) as folder:
        _write(folder, one, place, root, attacks)
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        pages = [] if dry_run else _upload(files, one, place, model, directly)
        return Published(
            run=one.result.run_uri,
            place=place,
            root=root,
            files=len(files),
            bytes=sum(path.stat().st_size for path in files.values()),
            pages=pages,
            folder=dry_run,
        )


def _without_attacks(one: StoredResult) -> StoredResult:
    curve = replace(one.result.curve, uppers=None)
    return replace(one, attacks=None, gap=None, result=replace(one.result, curve=curve))


def _check_complete(one: StoredResult) -> None:
    """Raise UserError unless every order is complete and its certificates are written."""
    stored = one.stored
    for name in stored.orders:
        missing = stored.result(one.votes, name).incomplete
        if missing:
            raise UserError(
                f"{stored.store.uri}: order {name} is not complete ({len(missing)} samples lack draws); run certify "
                "again before you publish the run"
            )
        keys = [OrderKeys(name).certificates, TABLE_KEY, BLOCKS_KEY]
        if absent := set(keys) - stored.store.existing(keys):
            raise UserError(
                f"{stored.store.uri}/{min(absent)} is missing; run certify again before you publish the run"
            )


@contextmanager
def _folder(dry_run: str | None) -> Iterator[Path]:
    """The folder of a dry run, which must be empty or not exist yet, or a temporary one."""
    if dry_run is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = Path(dry_run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--dry-run {dry_run}: {error.strerror}") from error
    if occupied:
        raise UserError(f"--dry-run {dry_run}: the folder is not empty; give a new folder")
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one would look published
        raise


def _write(folder: Path, one: StoredResult, place: str, root: str, attacks: bool) -> None:
    """Write what is published: only objects that a run consists of, whatever else is beside them."""
    stored = one.stored
    files, packed = _objects(stored, attacks)
    entries = {entry.key: entry for prefix in ("votes", FOLDER) for entry in stored.store.list(prefix)}
    packed += [block_key(block.block) for block in one.blocks]
    write_published(
        folder,
        stored.store.read,
        files,
        [entries.get(key, Entry(key, 0, 0.0)) for key in sorted(packed)],
        stored.store.readers,
    )
    (folder / "report.html").write_text(render_report([_report(one, place)]), encoding="utf-8")
    (folder / "README.md").write_text(card(one, place, root), encoding="utf-8")
    results = results_file(one, page_of(place))
    if results is not None:
        path = folder / results_name(one)
        path.parent.mkdir()
        path.write_text(results, encoding="utf-8")


def _objects(stored: StoredRun, attacks: bool) -> tuple[list[str], list[str]]:
    """The keys of a run's objects that become files, and of the attacked samples."""
    store, keys = stored.store, [RUN_KEY, TABLE_KEY, BLOCKS_KEY]
    for name in stored.orders:
        of = OrderKeys(name)
        keys += [of.order, of.plan, of.certificates, of.curve_table, of.curve_picture]
    for name in seal_names(store):
        keys += [seal_key(name), signature_key(name)]
    samples = []
    if attacks:
        for attack in read_attacks(store).values():
            keys += [attack.key, attack.table_key]
            samples += [attack.sample_key(sample) for sample in attacked(store, attack)]
    present = store.existing(keys)
    return [key for key in keys if key in present], samples


def _report(one: StoredResult, place: str) -> RunReport:
    return replace(
        report_of(one, place), no_exhibits=_NO_PICTURES, shape_CHW=images_of(one.result.run, Images()).shape_CHW
    )


def _upload(files: dict[str, Path], one: StoredResult, place: str, model: str | None, directly: bool) -> list[str]:
    """Upload the files; returns the pages of the pull requests or commits."""
    message = f"Add the diffsmooth run {one.result.run.name}"
    pages = [commit_files(place, files, message, as_pull_request=not directly)]
    name = results_name(one)
    if model is not None and name in files:
        message = f"Add certified l2 accuracy of the diffsmooth run {one.result.run.name}"
        pages.append(commit_files(model, {name: files[name]}, message, as_pull_request=not directly))
    return pages
