"""Blocks of tokens on disk: written whole, each with a hash of what was written, listed in a manifest that comes last.

While a save goes on, ``unfinished.json`` says of what, and ``unfinished.sha256`` has a line for every block that is on the
disk, with the hash of the bytes that were to be written. A save that goes on after an interruption believes a block that
has such a line and this hash, and makes all others again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mechhier import hashes
from mechhier.files import absolute, only_process_in, write_whole
from mechhier.progress import track
from mechhier.reading import read_json, read_text
from mechhier.specs import Described, SpecError, Text, Whole, shown

MANIFEST = "manifest.json"
_UNFINISHED = "unfinished.json"
_WRITTEN = "unfinished.sha256"
_LISTED = 5  # differences in a message
_MOST_MANIFEST_BYTES = 2**26
MOST_BLOCKS = 400_000
"""Most blocks of a stored corpus: as many as a manifest that is read can list."""

MakeBlock = Callable[[int], np.ndarray]


class CorpusError(ValueError):
    """A stored corpus that cannot be used; the message says what is wrong and what to do."""


class BlockEntry(Described):
    """One block in the manifest."""

    file: str = Field(pattern=r"^block-\d{5,}\.bin$")
    bytes: Annotated[Whole, Field(ge=0)]
    sha256: Text


class Manifest(Described):
    """Content of ``manifest.json``: what the corpus is, and every block with its size and hash."""

    format: Literal[1] = 1
    corpus: dict[Text, Any]
    dtype: Text
    blocks: list[BlockEntry]
    versions: dict[Text, Text]


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a corpus, which stays the same wherever the process goes.

    Raises:
        CorpusError: It is no path, or there is no such home.
    """
    try:
        return absolute(path)
    except (TypeError, RuntimeError) as error:
        raise CorpusError(f"a corpus is stored in a folder, and {shown(path)} is no path of one: {error}") from error


def block_name(i: int) -> str:
    """Return the file name of block ``i``."""
    return f"block-{i:05d}.bin"


def save_blocks(
    folder: Path,
    description: dict[str, Any],
    make_block: MakeBlock,
    block_bytes: list[int],
    *,
    dtype: str,
    workers: int,
) -> None:
    """Write all blocks and then the manifest; keep the blocks that an interrupted call has completed.

    Args:
        folder: Where to; made if absent.
        description: What the corpus is; a folder with another description is refused.
        make_block: Block number -> tokens.
        block_bytes: Size of every block.
        dtype: Name of the blocks' type.
        workers: Number of threads.

    Raises:
        CorpusError: The folder holds another corpus or unexplained blocks, another process saves into it, or a finished
            corpus is damaged.
        OSError: A file cannot be written; the error names it. The same call goes on from there.
    """
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder} is a file; a corpus is stored in a folder of its own")
    if (folder / MANIFEST).exists() and not any(path.exists() for path in _records(folder)):
        _verify_same(folder, description)  # nothing is written, and no lock is needed
        return
    other = CorpusError(f"another process is saving a corpus into {folder}; wait for it, or choose another folder")
    with only_process_in(folder, otherwise=other):
        if (folder / MANIFEST).exists():  # since, or left by a call that was interrupted after its last line
            _verify_same(folder, description)
        else:
            written = _write_missing(folder, description, make_block, len(block_bytes), workers)
            manifest = Manifest(
                corpus=description,
                dtype=dtype,
                blocks=[
                    BlockEntry(file=block_name(i), bytes=n, sha256=written[block_name(i)])
                    for i, n in enumerate(block_bytes)
                ],
                versions=_versions(),
            )
            write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1))
        for record in _records(folder):
            record.unlink(missing_ok=True)


def _verify_same(folder: Path, description: dict[str, Any]) -> None:
    manifest = read_manifest(folder)
    _check_same(folder, manifest.corpus, description)
    verify_blocks(folder, manifest)


def _records(folder: Path) -> tuple[Path, Path]:
    return folder / _WRITTEN, folder / _UNFINISHED


def _versions() -> dict[str, str]:
    """What the text may depend on besides its description."""
    return {
        "mechhier": metadata.version("mechhier"),
        "numba": metadata.version("numba"),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _write_missing(
    folder: Path, description: dict[str, Any], make_block: MakeBlock, n_blocks: int, workers: int
) -> dict[str, str]:
    """Write the blocks that are not there as they were written, and return the hashes of all, by file name."""
    written = _resume(folder, {"corpus": description, "versions": _versions()})
    with ThreadPoolExecutor(workers) as pool:
        there = pool.map(
            lambda name: _is_as_written(folder / name, written.get(name)), map(block_name, range(n_blocks))
        )
        missing = [i for i, is_there in enumerate(there) if not is_there]
    written = {name: written[name] for i in range(n_blocks) if (name := block_name(i)) in written}
    for i in missing:
        written.pop(block_name(i), None)
    # Whole lines of what is there, before more are appended: the last one may have been cut.
    hashes.write(folder / _WRITTEN, written)
    with track("saving corpus", total=n_blocks, completed=n_blocks - len(missing)) as advance:
        for i, digest in _write_blocks(folder, make_block, missing, workers):
            written[block_name(i)] = digest
            hashes.append(folder / _WRITTEN, {block_name(i): digest})
            advance(1)
    return written


def _resume(folder: Path, record: dict[str, Any]) -> dict[str, str]:
    """Put the record of this save into the folder, and return the hashes that an interrupted one has left.

    None are returned if its record is damaged or other versions made its blocks: all of them are made again.
    """
    path = folder / _UNFINISHED
    if path.exists():
        try:
            there = read_json(read_text(path, most_bytes=_MOST_MANIFEST_BYTES), path.name)
        except ValueError:
            there = record | {"versions": None}  # unreadable: it is written again, and no block of it is believed
        corpus = there.get("corpus") if isinstance(there, dict) else None
        if not isinstance(corpus, dict):
            raise CorpusError(
                f"{path} is no record of a save of this version; empty {folder}, or choose another folder"
            )
        _check_same(folder, corpus, record["corpus"])
        if there == record:
            return hashes.read(folder / _WRITTEN)
    elif any(folder.glob("block-*.bin")):
        raise CorpusError(f"{folder} holds blocks of an unknown corpus; choose another folder, or empty this one")
    (folder / _WRITTEN).unlink(missing_ok=True)
    write_whole(path, json.dumps(record, indent=1))
    return {}


def _is_as_written(path: Path, sha256: str | None) -> bool:
    return sha256 is not None and path.is_file() and hashes.of_file(path) == sha256


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a finished corpus.

    Raises:
        CorpusError: There is none, or it is not readable.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / _UNFINISHED).is_file():
            raise CorpusError(f"{folder} holds a corpus whose save was interrupted; save it again, and it goes on")
        raise CorpusError(f"{folder} holds no corpus: there is no {MANIFEST}. Give the folder that Corpus.save wrote")
    try:
        return Manifest.model_validate(_read_json(folder / MANIFEST))
    except SpecError as error:
        raise CorpusError(
            f"{folder / MANIFEST} is not a corpus manifest ({error}); delete {folder} and save the corpus again, or save it "
            "in another folder"
        ) from error


def verify_blocks(folder: Path, manifest: Manifest) -> None:
    """Raise CorpusError at the first block that is missing, or whose size or hash is not the manifest's."""
    for entry in manifest.blocks:
        wrong = _what_is_wrong(folder, entry)
        if wrong:
            raise CorpusError(f"{folder / entry.file} {wrong}; Corpus.repair({str(folder)!r}) generates it again")


def repair_blocks(folder: Path, manifest: Manifest, make_block: MakeBlock) -> None:
    """Write the blocks again that are missing, or whose size or hash is not the manifest's."""
    damaged = [i for i, entry in enumerate(manifest.blocks) if _what_is_wrong(folder, entry)]
    if not damaged:
        return
    with only_process_in(folder, otherwise=CorpusError(f"another process is writing to {folder}; wait for it")):
        for i in damaged:
            entry, content = manifest.blocks[i], make_block(i).tobytes()
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise CorpusError(
                    f"{entry.file} cannot be generated again: the corpus was saved with {manifest.versions}, "
                    "and these versions generate other tokens. Save the corpus anew in another folder"
                )
            write_whole(folder / entry.file, content)


def _what_is_wrong(folder: Path, entry: BlockEntry) -> str:
    path = folder / entry.file
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry.bytes:
        return f"has {path.stat().st_size} bytes where the manifest says {entry.bytes}"
    if hashes.of_file(path) != entry.sha256:
        return "is damaged: its hash is not the manifest's"
    return ""


def _check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if there == here:
        return
    flat_there, flat_here = (
        {**d, **(d["grammar"] if isinstance(d.get("grammar"), dict) else {})} for d in (there, here)
    )
    changed = [
        f"{k}={flat_there.get(k)!r:.60}" for k in flat_here if k != "grammar" and flat_there.get(k) != flat_here[k]
    ]
    raise CorpusError(f"{folder} holds another corpus ({', '.join(changed[:_LISTED])}); choose another folder")


def _write_blocks(folder: Path, make_block: MakeBlock, numbers: list[int], workers: int) -> Iterator[tuple[int, str]]:
    """Write blocks, yielding the number and the hash of each when it is on the disk."""
    # Threads, not processes: text is generated and hashed without the interpreter's lock.
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_write_block, folder, i, make_block) for i in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_block(folder: Path, i: int, make_block: MakeBlock) -> tuple[int, str]:
    content = make_block(i).tobytes()
    digest = hashlib.sha256(content).hexdigest()  # of what is meant to be there, before anything can go wrong
    write_whole(folder / block_name(i), content)
    return i, digest


def _read_json(path: Path) -> Any:
    try:
        return read_json(read_text(path, most_bytes=_MOST_MANIFEST_BYTES), path.name)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{path} is damaged ({error}); delete {path.parent} and save the corpus again, or save it in another folder"
        ) from error
