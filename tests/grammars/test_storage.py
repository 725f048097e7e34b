"""A stored corpus has the streamed one's tokens, survives interruption, and damage to it is found and named."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from random_grammars import pcfgs

from mechhier import hashes
from mechhier.grammars import Corpus, CorpusError, DocumentGrammar, storage

GRAMMAR = DocumentGrammar(n_words=6, lexicon=4, binding=1.0)
CORPUS = GRAMMAR.corpus(tokens=6000 * 96, context=96)  # two whole blocks and a part of a third


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    CORPUS.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "corpus")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_stored_tokens_and_labels_are_those_of_the_streamed_corpus(saved):
    stored = Corpus.open(saved)
    assert (stored.grammar, stored.description, stored.path) == (GRAMMAR, CORPUS.description, saved)
    np.testing.assert_array_equal(stored.rows(0, 6000), CORPUS.rows(0, 6000))
    here, there = CORPUS.sample(2700, 2760), stored.sample(2700, 2760)
    np.testing.assert_array_equal(here.tokens, there.tokens)
    for name, label in here.labels.items():
        np.testing.assert_array_equal(there.labels[name], label)
    assert stored.held_out().path is None


def test_a_folder_holds_the_blocks_and_a_manifest_that_describes_them(saved):
    files = contents(saved)
    assert set(files) == {"block-00000.bin", "block-00001.bin", "block-00002.bin", "manifest.json"}
    manifest = json.loads(files["manifest.json"])
    assert manifest["corpus"]["grammar"]["kind"] == "document"
    assert (manifest["dtype"], set(manifest["versions"])) == ("uint16", {"mechhier", "numba", "numpy", "python"})
    assert np.frombuffer(files["block-00001.bin"], "<u2").tolist() == CORPUS.rows(2730, 5460).ravel().tolist()


def test_the_bytes_do_not_depend_on_the_number_of_workers(saved, tmp_path):
    CORPUS.save(tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(saved)


@given(pcfgs())
@settings(deadline=None, max_examples=5)
def test_the_bytes_of_any_grammar_do_not_depend_on_the_number_of_workers(grammar):
    corpus = grammar.corpus(tokens=3 * 2**17, context=64)
    with TemporaryDirectory() as folder:
        corpus.save(Path(folder) / "one")
        corpus.save(Path(folder) / "three", workers=3)
        assert contents(Path(folder) / "one") == contents(Path(folder) / "three")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda block: block.unlink(), "is missing"),
        (lambda block: block.write_bytes(block.read_bytes()[:-2]), "has 524158 bytes where the manifest says 524160"),
        (lambda block: block.write_bytes(b"\xff" + block.read_bytes()[1:]), "is damaged"),
    ],
    ids=["missing", "truncated", "flipped byte"],
)
def test_a_damaged_block_is_named_and_can_be_repaired(folder, saved, damage, says):
    damage(folder / "block-00001.bin")
    for use in (Corpus.open, CORPUS.save):
        with pytest.raises(CorpusError, match=rf"block-00001\.bin {says}.*Corpus\.repair"):
            use(folder)
    repaired = Corpus.repair(folder)
    assert contents(folder) == contents(saved)
    np.testing.assert_array_equal(repaired.rows(2730, 2740), CORPUS.rows(2730, 2740))


def test_a_block_that_cannot_be_generated_again_is_not_repaired(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["blocks"][1]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = contents(folder)
    with pytest.raises(CorpusError, match=r"block-00001\.bin cannot be generated again"):
        Corpus.repair(folder)
    assert contents(folder) == before


def test_labels_are_refused_where_stored_tokens_are_not_the_grammars(folder):
    block = folder / "block-00000.bin"
    block.write_bytes(b"\x01" * 2 + block.read_bytes()[2:])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["blocks"][0]["sha256"] = hashes.of_file(block)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    stored = Corpus.open(folder)
    assert stored.rows(0, 1)[0, 0] == 0x0101
    with pytest.raises(CorpusError, match=r"block-00000\.bin holds other tokens"):
        stored.sample(0, 1)


class Interrupted(Exception):
    pass


def save_until(monkeypatch, folder, number):
    """Save the corpus, but be interrupted when a block is to be made."""
    make = Corpus._make_block

    def interrupted(self, i):
        if i == number:
            raise Interrupted
        return make(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "_make_block", interrupted)
        with pytest.raises(Interrupted):
            CORPUS.save(folder)


def test_an_interrupted_save_keeps_its_blocks_and_goes_on(tmp_path, saved, monkeypatch):
    folder = tmp_path / "corpus"
    save_until(monkeypatch, folder, 2)
    with pytest.raises(CorpusError, match="save it again"):
        Corpus.open(folder)
    kept = (folder / "block-00000.bin").stat().st_ino
    torn = folder / "block-00001.bin"
    torn.write_bytes(torn.read_bytes()[:100])
    (folder / ".block-00002.bin.0123abcd.tmp").write_bytes(b"half a block")
    CORPUS.save(folder)
    assert (folder / "block-00000.bin").stat().st_ino == kept
    assert contents(folder) == contents(saved)


def test_another_corpus_is_never_mixed_into_a_folder(folder, tmp_path, monkeypatch):
    before = contents(folder)
    other = GRAMMAR.model_copy(update={"zipf": 2.0}).corpus(tokens=6000 * 96, context=96, seed=1)
    with pytest.raises(CorpusError, match=r"another corpus \(seed=0, zipf=1.0\)"):
        other.save(folder)
    assert contents(folder) == before
    begun = tmp_path / "begun"
    save_until(monkeypatch, begun, 1)
    with pytest.raises(CorpusError, match="another corpus"):
        other.save(begun)
    (begun / "unfinished.json").unlink()
    with pytest.raises(CorpusError, match="unknown corpus"):
        CORPUS.save(begun)


def test_a_finished_save_returns_without_writing(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    stored = CORPUS.save(folder)
    assert stored.path == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_is_not_a_stored_corpus_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"no manifest\.json"):
        Corpus.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="is a file"):
        CORPUS.save(tmp_path / "file")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        CORPUS.save(tmp_path / "new", workers=0)
    for text, says in (
        ("{", "is damaged"),
        ('{"format": 2}', "is not a corpus manifest"),
        (
            '{"format": 1, "corpus": {"grammar": {"kind": "dyck"}}, "dtype": "uint16", "blocks": [], "versions": {}}',
            "does not describe a corpus",
        ),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(CorpusError, match=says):
            Corpus.open(tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "block-00000.bin").write_bytes(b"\xff" * (folder / "block-00000.bin").stat().st_size),
        lambda folder: (folder / "block-00000.bin").write_bytes((folder / "block-00000.bin").read_bytes()[:-2]),
        lambda folder: (folder / "block-00000.bin").write_bytes(b""),
        lambda folder: (folder / "block-00000.bin").unlink(),
        lambda folder: (folder / "unfinished.sha256").write_bytes(b""),
        lambda folder: (folder / "unfinished.sha256").write_bytes((folder / "unfinished.sha256").read_bytes()[:-9]),
        lambda folder: (folder / "unfinished.sha256").write_bytes(b"\xff\x00" * 90),
        lambda folder: (folder / "unfinished.sha256").unlink(),
        lambda folder: (folder / "unfinished.json").write_bytes(b""),
        lambda folder: (folder / "unfinished.json").write_bytes(b"\xff{"),
        lambda folder: (folder / "unfinished.json").write_text("[" * 100_000),
    ],
)
def test_what_is_damaged_during_an_interruption_is_made_again(tmp_path, saved, monkeypatch, damage):
    folder = tmp_path / "corpus"
    save_until(monkeypatch, folder, 2)
    damage(folder)
    assert CORPUS.save(folder).sha256() == CORPUS.sha256()
    assert contents(folder) == contents(saved)


def test_a_block_that_was_damaged_while_it_was_written_is_not_blessed(tmp_path, monkeypatch):
    """The hash is of the tokens, not of what is on the disk at the end."""
    write_whole = storage.write_whole

    def flipping(path, content):
        write_whole(path, b"\xff" + content[1:] if path.name == "block-00001.bin" else content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_whole", flipping)
        CORPUS.save(tmp_path / "corpus")
    with pytest.raises(CorpusError, match=r"block-00001\.bin is damaged"):
        Corpus.open(tmp_path / "corpus")


def test_blocks_of_other_versions_are_made_again(tmp_path, saved, monkeypatch):
    folder = tmp_path / "corpus"
    with monkeypatch.context() as patch:
        patch.setattr(storage.np, "__version__", "0.0")
        save_until(monkeypatch, folder, 2)
    before = (folder / "block-00000.bin").stat().st_ino, (folder / "block-00000.bin").stat().st_mtime_ns
    CORPUS.save(folder)
    assert ((folder / "block-00000.bin").stat().st_ino, (folder / "block-00000.bin").stat().st_mtime_ns) != before
    assert contents(folder) == contents(saved)


def test_a_record_that_is_no_record_is_named(tmp_path):
    (tmp_path / "unfinished.json").write_text("[1]")
    with pytest.raises(CorpusError, match=r"unfinished\.json is no record .*another folder"):
        CORPUS.save(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 99, b"\xff\xfe{}", b"{", b"[" * 100_000, b'{"format": 1e400}'])
def test_a_damaged_manifest_is_named_with_a_remedy(folder, content):
    (folder / "manifest.json").write_bytes(content)
    for use in (Corpus.open, Corpus.repair, CORPUS.save):
        with pytest.raises(CorpusError, match=r"(?s)manifest\.json .*save it in another folder"):
            use(folder)


def test_a_manifest_with_other_blocks_is_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in (
        {"blocks": manifest["blocks"][:2]},
        {"blocks": manifest["blocks"][::-1]},
        {"dtype": "uint32"},
        {"corpus": manifest["corpus"] | {"tokens": 10**14}},
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(CorpusError, match=r"manifest\.json is damaged"):
            Corpus.open(folder)


def test_two_saves_into_one_folder_do_not_meet(tmp_path, saved, monkeypatch):
    folder, make = tmp_path / "corpus", Corpus._make_block
    seen = []

    def meeting(self, i):
        if not seen:
            seen.append(i)
            with pytest.raises(CorpusError, match="another process is saving a corpus into "):
                CORPUS.save(folder)
        return make(self, i)

    monkeypatch.setattr(Corpus, "_make_block", meeting)
    CORPUS.save(folder)
    assert seen
    assert contents(folder) == contents(saved)


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_save_whose_disk_fails_names_the_file_and_goes_on(tmp_path, saved, monkeypatch, call):
    """Every call that writes fails once, one after the other; the bytes are those of a save that never failed."""
    folder, left = tmp_path / "corpus", [0]
    real = {"fsync": os.fsync, "replace": Path.replace, "open": os.open, "write": Path.write_bytes}

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            named = arguments[:1] if call == "open" else ()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *map(str, named))
        return real[call](*arguments, **options)

    owner, name = {
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
        "open": (os, "open"),
        "write": (Path, "write_bytes"),
    }[call]
    messages: list[str] = []
    for failed in range(1, 40):
        left[0] = failed
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                CORPUS.save(folder)
                break
            except OSError as error:
                messages.append(str(error))
    assert all(str(folder) in message and "\n" not in message for message in messages), messages
    assert failed > 2
    assert left[0] > 0
    assert contents(folder) == contents(saved)


KILLED = """
import os, sys
from pathlib import Path
from mechhier.grammars import DocumentGrammar
number, at = 0, int(sys.argv[2])
def killing(real):
    def call(*arguments, **options):
        global number
        number += 1
        if number == at:
            os.kill(os.getpid(), 9)
        return real(*arguments, **options)
    return call
os.fsync, Path.replace = killing(os.fsync), killing(Path.replace)
Path.write_bytes, Path.unlink = killing(Path.write_bytes), killing(Path.unlink)
DocumentGrammar(n_words=6, lexicon=4, binding=1.0).corpus(tokens=6000 * 96, context=96).save(sys.argv[1])
"""


@pytest.mark.skipif(os.name == "nt", reason="processes are killed by a signal")
def test_a_save_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path, saved):
    folder = tmp_path / "corpus"
    for at in (2, 9, 14, 18):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(at)], check=False)
        assert ended.returncode == -9
    CORPUS.save(folder)
    assert contents(folder) == contents(saved)


def test_a_path_stays_valid_when_the_process_goes_elsewhere(tmp_path, monkeypatch):
    small = GRAMMAR.corpus(tokens=960, context=96)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    kept = [small.save("here"), small.save("~/there"), Corpus.open("here"), Corpus.repair("~/there")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [corpus.path for corpus in kept] == [tmp_path / "here", tmp_path / "home" / "there"] * 2
    for corpus in kept:
        np.testing.assert_array_equal(corpus.rows(0, 10), small.rows(0, 10))
    with pytest.raises(CorpusError, match="no path"):
        small.save(5)


def test_a_finished_corpus_in_a_folder_that_cannot_be_written_to_is_opened_and_saved(folder, monkeypatch):
    def refused(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(folder)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *arguments, **options)

    real = os.open
    (folder / ".lock").unlink(missing_ok=True)
    monkeypatch.setattr(os, "open", refused)
    Corpus.open(folder)
    CORPUS.save(folder)
    assert not (folder / ".lock").exists()


def test_the_hash_of_the_text_is_of_every_token(saved):
    small = GRAMMAR.corpus(tokens=9600, context=96)
    assert small.sha256() == hashlib.sha256(small.rows(0, 100).astype("<u2").tobytes()).hexdigest()
    assert small.sha256() != GRAMMAR.corpus(tokens=9600, context=96, seed=1).sha256()
    assert Corpus.open(saved).sha256() == CORPUS.sha256()


def test_a_block_that_is_cut_after_it_was_opened_is_named(folder):
    stored = Corpus.open(folder)
    (folder / "block-00001.bin").write_bytes(b"")
    for use in (lambda: stored.rows(2730, 2740), stored.sha256):
        with pytest.raises(CorpusError, match=r"block-00001\.bin .*Corpus\.repair"):
            use()


def test_more_blocks_than_a_manifest_can_list_are_refused(tmp_path):
    with pytest.raises(ValueError, match="too many to be stored"):
        GRAMMAR.corpus(tokens=10**15).save(tmp_path / "corpus")
