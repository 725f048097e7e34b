"""Blocks of tokens on disk: written atomically, listed with their hashes in a manifest that comes last."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mechhier.files import write_whole
from mechhier.progress import track
from mechhier.reading import read_json, read_text
from mechhier.specs import Described, SpecError, Text, Whole

MANIFEST = "manifest.json"
_UNFINISHED = "unfinished.json"
_MOST_MANIFEST_BYTES = 2**26  # of half a million blocks

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
        block_bytes: Size of every block; a file of another size is written again.
        dtype: Name of the blocks' type.
        workers: Number of threads.

    Raises:
        CorpusError: The folder holds another corpus or unexplained blocks, or a finished corpus is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder} is a file; a corpus is stored in a folder of its own")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _check_same(folder, manifest.corpus, description)
        verify_blocks(folder, manifest)
        return
    if (folder / _UNFINISHED).exists():
        _check_same(folder, _read_json(folder / _UNFINISHED), description)
    elif any(folder.glob("block-*.bin")):
        raise CorpusError(f"{folder} holds blocks of an unknown corpus; choose another folder, or empty this one")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _UNFINISHED, json.dumps(description, indent=1).encode())

    paths = [folder / block_name(i) for i in range(len(block_bytes))]
    missing = [i for i, p in enumerate(paths) if not p.is_file() or p.stat().st_size != block_bytes[i]]
    with track("saving corpus", total=len(paths), completed=len(paths) - len(missing)) as advance:
        for _ in _write_blocks(folder, make_block, missing, workers):
            advance(1)

    with ThreadPoolExecutor(workers) as pool:
        hashes = list(pool.map(_hash_of_file, paths))
    manifest = Manifest(
        corpus=description,
        dtype=dtype,
        blocks=[BlockEntry(file=p.name, bytes=p.stat().st_size, sha256=h) for p, h in zip(paths, hashes, strict=True)],
        versions={
            "mechhier": metadata.version("mechhier"),
            "numba": metadata.version("numba"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    (folder / _UNFINISHED).unlink()


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
        raise CorpusError(f"{folder / MANIFEST} is not a corpus manifest ({error}); save the corpus anew") from error


def verify_blocks(folder: Path, manifest: Manifest) -> None:
    """Raise CorpusError at the first block that is missing, or whose size or hash is not the manifest's."""
    for entry in manifest.blocks:
        wrong = _what_is_wrong(folder, entry)
        if wrong:
            raise CorpusError(f"{folder / entry.file} {wrong}; Corpus.repair({str(folder)!r}) generates it again")


def repair_blocks(folder: Path, manifest: Manifest, make_block: MakeBlock) -> None:
    """Write the blocks again that are missing, or whose size or hash is not the manifest's."""
    for i, entry in enumerate(manifest.blocks):
        if not _what_is_wrong(folder, entry):
            continue
        content = make_block(i).tobytes()
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
    if _hash_of_file(path) != entry.sha256:
        return "is damaged: its hash is not the manifest's"
    return ""


def _check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    flat_there, flat_here = ({**d, **d["grammar"]} for d in (there, here))
    changed = [f"{k}={flat_there.get(k)!r}" for k in flat_here if k != "grammar" and flat_there.get(k) != flat_here[k]]
    if there != here:
        raise CorpusError(f"{folder} holds another corpus ({', '.join(changed)}); choose another folder")


def _write_blocks(folder: Path, make_block: MakeBlock, numbers: list[int], workers: int) -> Iterator[None]:
    """Write blocks, yielding once for each that is complete."""
    # Threads, not processes: text is generated and hashed without the interpreter's lock.
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_write_block, folder, i, make_block) for i in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_block(folder: Path, i: int, make_block: MakeBlock) -> None:
    write_whole(folder / block_name(i), make_block(i).tobytes())


def _read_json(path: Path) -> Any:
    try:
        return read_json(read_text(path, most_bytes=_MOST_MANIFEST_BYTES), path.name)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} is damaged ({error}); save the corpus anew in another folder") from error


def _hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
