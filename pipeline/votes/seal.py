"""Seals: the sha256 of everything that a run's claims rest on, and one Merkle root that commits to all of it.

    RUN/seals/001.sha256       a line `sha256  key` for run.json, each order, each plan and each block, sorted by key
    RUN/seals/001.sha256.sig   optional: its signature by `ssh-keygen -Y sign -n diffsmooth`

A seal is put if absent and never changed. It also lists the seal before it, so that seals form a chain. `sha256sum -c`
checks one without this package. The root is that of a tree of trees (hashes as in RFC 6962, section 2.1):

    leaf(key)   sha256(00 | key | newline | sha256 of the object)
    node(a, b)  sha256(01 | a | b), split at the largest power of two below the number of leaves
    root        the tree over sha256(02 | "record" | newline | tree of run.json, orders, plans, earlier seal),
                then sha256(02 | "sample I" | newline | tree of the blocks of sample I) for each sample I

so that a proof of one sample is short: its blocks, and some 20 hashes.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from diffsmooth.pipeline.errors import RunError, UserError, one_line
from diffsmooth.pipeline.records import LARGEST, Record, intact
from diffsmooth.pipeline.storage.remote import in_parallel
from diffsmooth.pipeline.storage.store import Entry, Store
from diffsmooth.pipeline.votes.blocks import sample_of_key
from diffsmooth.pipeline.votes.run import RUN_KEY

_NAME = re.compile(r"seals/(\d{3,9})\.sha256")
_LINE = re.compile(r"([0-9a-f]{64})  ([^\s\\]{1,200})")
_RECORD = re.compile(r"orders/\d{3,9}(/plan)?\.json")
_MOST_BYTES = 2_000_000_000  # of a seal: some 20 million blocks
_NAMESPACE = "diffsmooth"  # of signatures: one made for another purpose does not count

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class Seal:
    """A seal that is stored in a run."""

    name: str
    entries: Mapping[str, str]  # key below the run -> sha256 of the object

    @property
    def root(self) -> str:
        return _tree(_tops(self.entries)).hex()

    def encode(self) -> bytes:
        return "".join(f"{sha256}  {key}\n" for key, sha256 in sorted(self.entries.items())).encode()


class SampleProof(Record):
    """The blocks of a sample, and the hashes that lead from them to the root of a seal."""

    root: Sha256
    sample: int = Field(ge=0, le=LARGEST)
    blocks: dict[str, Sha256] = Field(min_length=1)  # key below the run -> sha256 of the object
    index: int = Field(ge=0)  # of the sample among the parts of the root
    size: int = Field(ge=1)  # number of these parts
    path: list[Sha256] = Field(max_length=64)  # from the sample upwards

    def follows(self) -> bool:
        """Whether the root follows from the blocks and the path."""
        if any(_part(key) != f"sample {self.sample}" for key in self.blocks) or self.index >= self.size:
            return False
        found = _top(f"sample {self.sample}", self.blocks)
        path, index, last = [bytes.fromhex(one) for one in self.path], self.index, self.size - 1
        for sibling in path:
            if last == 0:
                return False
            if index % 2 or index == last:
                found = _node(sibling, found)
                while index % 2 == 0 and index:
                    index, last = index // 2, last // 2
            else:
                found = _node(found, sibling)
            index, last = index // 2, last // 2
        return last == 0 and found.hex() == self.root


def seal_key(name: str) -> str:
    return f"seals/{name}.sha256"


def signature_key(name: str) -> str:
    return f"seals/{name}.sha256.sig"


def read_seals(store: Store) -> dict[str, Seal]:
    """The seals of a run by name, the earliest first. Raises: RunError for one that is damaged."""
    return {name: _read_seal(store, name) for name in seal_names(store)}


def unchanged_since_seal(store: Store, entries: Iterable[Entry]) -> dict[str, str]:
    """The sha256 of those of the listed objects that the newest seal has, by key, if they are older than that seal.

    A sealed block that was deleted and cast again is newer: the seal says nothing about its votes. Raises: RunError if
    the seal is damaged.
    """
    written = {match[1]: one.modified for one in store.list("seals") if (match := _NAME.fullmatch(one.key))}
    if not written:
        return {}
    newest = max(written, key=int)
    sealed = _read_seal(store, newest).entries
    return {one.key: sealed[one.key] for one in entries if one.key in sealed and one.modified < written[newest]}


def seal_names(store: Store) -> list[str]:
    """The names of the seals of a run, the earliest first."""
    return sorted((match[1] for key in store.keys("seals") if (match := _NAME.fullmatch(key))), key=int)


def _read_seal(store: Store, name: str) -> Seal:
    key, entries = seal_key(name), dict[str, str]()
    text = store.read(key, limit=_MOST_BYTES).decode(errors="replace")
    with intact(f"{store.uri}/{key}"):
        for number, line in enumerate(text.splitlines(), start=1):
            match = _LINE.fullmatch(line)
            if match is None or _part(match[2]) is None or match[2] in entries:
                raise ValueError(f"line {number} is {one_line(line, 100)!r}")
            entries[match[2]] = match[1]
        if not entries:
            raise ValueError("it is empty")
    return Seal(name=name, entries=entries)


def add_seal(store: Store, blocks: Mapping[str, str]) -> Seal:
    """Seal a run as it is now; a seal that has the same entries is returned instead.

    `blocks` are the sha256 of all its blocks by their keys.
    """
    while True:
        seals = read_seals(store)
        last = max(seals, key=int, default=None)
        entries = hash_objects(store, record_keys(store)) | dict(blocks)
        if last is not None:
            sealed = seals[last].entries
            if {key: sha256 for key, sha256 in sealed.items() if not _NAME.fullmatch(key)} == entries:
                return seals[last]
            entries |= hash_objects(store, [seal_key(last)])
        seal = Seal(name=f"{int(last or 0) + 1:03d}", entries=entries)
        if store.put_if_absent(seal_key(seal.name), seal.encode()):
            return seal


def record_keys(store: Store) -> list[str]:
    """run.json, the orders and the plans of a run."""
    return [RUN_KEY, *(key for key in store.keys("orders") if _RECORD.fullmatch(key))]


def hash_objects(store: Store, keys: Sequence[str]) -> dict[str, str]:
    """The sha256 of objects as they are stored; those that do not exist or cannot be read are left out."""
    read = store.read

    def hashed(key: str) -> tuple[str, str] | None:
        try:
            return key, hashlib.sha256(read(key)).hexdigest()
        except (UserError, RunError):
            return None

    return dict(one for one in in_parallel(hashed, keys, store.readers) if one is not None)


def compare(seal: Seal, found: Mapping[str, str], *, present: set[str]) -> list[str]:
    """A line for each object that differs from the seal, is missing, or was added.

    `found` are the sha256 of the objects of the run that can be read, `present` the keys of all.
    """
    lines, of_hash = [], {sha256: key for key, sha256 in seal.entries.items()}
    for key, sha256 in sorted(seal.entries.items()):
        now = found.get(key)
        if now == sha256:
            continue
        if now is None:
            lines.append(f"{key} {'cannot be read' if key in present else 'is missing'}")
        elif other := of_hash.get(now):
            lines.append(f"{key} has the contents that the seal lists for {other}")
        else:
            lines.append(f"{key} was changed")
    lines += [f"{key} was added" for key in sorted(present - seal.entries.keys())]
    return lines


def prove(seal: Seal, sample: int) -> SampleProof:
    """The proof of a sample. Raises: UserError if the seal has no block of it."""
    label = f"sample {sample}"
    blocks = {key: sha256 for key, sha256 in seal.entries.items() if _part(key) == label}
    if not blocks:
        raise UserError(f"seal {seal.name} has no block of sample {sample}; choose a sample of the run")
    parts = sorted({str(_part(key)) for key in seal.entries}, key=_place)
    index, tops = parts.index(label), _tops(seal.entries)
    path = [one.hex() for one in _path(index, tops)]
    return SampleProof(root=seal.root, sample=sample, blocks=blocks, index=index, size=len(tops), path=path)


def _part(key: str) -> str | None:
    """The part of the root that a key belongs to; None if it is the key of nothing that is sealed."""
    if key == RUN_KEY or _RECORD.fullmatch(key) or _NAME.fullmatch(key):
        return "record"
    sample = sample_of_key(key)
    return None if sample is None else f"sample {sample}"


def _place(part: str) -> int:
    return -1 if part == "record" else int(part.removeprefix("sample "))


def _tops(entries: Mapping[str, str]) -> list[bytes]:
    """The leaves of the tree whose root is that of the seal."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for key, sha256 in entries.items():
        parts[_part(key) or "record"][key] = sha256
    return [_top(part, parts[part]) for part in sorted(parts, key=_place)]


def _top(part: str, entries: Mapping[str, str]) -> bytes:
    leaves = [
        hashlib.sha256(b"\x00" + key.encode() + b"\n" + bytes.fromhex(entries[key])).digest() for key in sorted(entries)
    ]
    return hashlib.sha256(b"\x02" + part.encode() + b"\n" + _tree(leaves)).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _above(level: Sequence[bytes]) -> list[bytes]:
    """The next level of the tree: a last hash without a partner moves up unchanged."""
    return [_node(*level[at : at + 2]) if at + 1 < len(level) else level[at] for at in range(0, len(level), 2)]


def _tree(leaves: Sequence[bytes]) -> bytes:
    """The root of the tree over the leaves."""
    level = leaves
    while len(level) > 1:
        level = _above(level)
    return level[0]


def _path(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """The siblings on the way from a leaf to the root."""
    level, path = leaves, []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        level, index = _above(level), index // 2
    return path


def sign(seal: Seal, key_file: str) -> bytes:
    """The signature of a seal by an SSH key. Raises: UserError for a key that does not sign, RunError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seal"
        file.write_bytes(seal.encode())
        refused = _ssh_keygen("sign", "-f", key_file, str(file)).refused
        if refused:
            raise UserError(f"--sign {key_file}: cannot sign with this key ({refused}); give the file of an SSH key")
        return file.with_name("seal.sig").read_bytes()


def signer(seal: Seal, signature: bytes, signers_file: str) -> str | None:
    """The name of the signer who signed a seal; None if it was none of them.

    `signers_file` has a line `NAME KEYTYPE KEY` for each, as described under ALLOWED SIGNERS in `man ssh-keygen`.
    Raises: RunError without ssh-keygen.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seal.sig"
        file.write_bytes(signature)
        names = _ssh_keygen("find-principals", "-f", signers_file, "-s", str(file)).said
        for name in names.splitlines():
            options = ("-f", signers_file, "-I", name, "-s", str(file))
            if not _ssh_keygen("verify", *options, data=seal.encode()).refused:
                return one_line(name)
    return None


class _Ended(NamedTuple):
    said: str
    refused: str  # why it failed; empty if it did not


def _ssh_keygen(action: str, *options: str, data: bytes = b"") -> _Ended:
    """Run `ssh-keygen -Y`. Raises: RunError if it is not installed."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise RunError(f"ssh-keygen -Y {action}: ssh-keygen is not installed; install OpenSSH 8.2 or later")
    command = [program, "-Y", action, "-n", _NAMESPACE, *options]
    ended = subprocess.run(command, input=data, capture_output=True, check=False)
    if ended.returncode == 0:
        return _Ended(ended.stdout.decode(errors="replace"), "")
    return _Ended("", one_line(ended.stderr.decode(errors="replace"), 200) or f"exit status {ended.returncode}")
