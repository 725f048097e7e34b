"""A stored corpus has the streamed one's tokens, survives interruption, and damage to it is found and named."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from random_grammars import pcfgs

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
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    manifest["blocks"][0]["sha256"] = storage._hash_of_file(block)
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
    (folder / ".block-00002.bin.tmp").write_bytes(b"half a block")
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
        ("{", "is not a corpus manifest"),
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
