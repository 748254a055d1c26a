import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from btm.corpus import progress as progress_module
from btm.corpus.progress import ProgressLine
from btm.corpus.shards import TokenShard
from btm.corpus.tokenizer import load_tokenizer, tokenizer_sha256
from btm.corpus.worker import main, prepare
from btm.errors import DataError, ForestError
from btm.records import DomainInfo, PrepareResult
from btm.requests import PrepareSpec

ROOT = Path(__file__).parents[3]
WORDS = {name: [f"{name}{number}" for number in range(400)] for name in ("law", "med", "bio", "new")}


def prose(domain, count=200, seed=0):
    rng = random.Random(f"{domain}{seed}")
    return [" ".join(rng.choices(WORDS[domain], k=rng.randrange(20, 80))) + "\n" for _ in range(count)]


def write_lines(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def spec_of(root, domains, *, vocab_size=400, pretrained_dir=None, **data):
    given = {"domains": domains, "dev_fraction": 0.1, "test_fraction": 0.1, "min_train_tokens": 100} | data
    return PrepareSpec(
        root=str(root),
        output_dir=str(root / "corpus"),
        tokenizer_dir=str(root / "tokenizer"),
        pretrained_dir=pretrained_dir,
        data=given,
        tokenizer={"vocab_size": vocab_size, "train_bytes": 100_000},
    )


def tree(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def stamps(directory):
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.fixture
def two(tmp_path):
    """Two domains as JSON lines."""
    return {name: write_lines(tmp_path / "text" / f"{name}.jsonl", prose(name)) for name in ("law", "med")}


def test_every_document_goes_to_exactly_one_split(tmp_path, two):
    """B3: the splits of a domain are a partition of its documents, and hold their text exactly."""
    result = prepare(spec_of(tmp_path, two))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert result.vocab_size == len(tokenizer)
    for domain in two:
        texts = []
        for split, size in result.domains[domain].splits.items():
            shard = TokenShard(tmp_path / "corpus" / domain / split)
            found = [tokenizer.decode(shard.document(index)[:-1]) for index in range(shard.num_documents)]
            assert all(shard.document(index)[-1] == tokenizer.eos_token_id for index in range(shard.num_documents))
            assert [len(text.encode()) for text in found] == shard.bytes.tolist()
            assert (size.documents, size.tokens, size.bytes) == (len(found), shard.num_tokens, shard.bytes.sum())
            texts += found
        assert sorted(texts) == sorted(prose(domain))
    assert PrepareResult.load(tmp_path / "corpus" / "prepare.json") == result
    assert DomainInfo.load(tmp_path / "corpus" / "law" / "corpus.json") == result.domains["law"]
    assert result.tokenizer_sha256 == tokenizer_sha256(tmp_path / "tokenizer")
    assert not list((tmp_path / "corpus").glob(".[st]*"))


def test_same_tokens_from_each_format(tmp_path):
    """Text, JSON lines, compressed, parquet and Arrow give the same shards, byte for byte."""
    import datasets

    texts, text = prose("law"), tmp_path / "text"
    data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (text / "txt").mkdir(parents=True)
    for number, document in enumerate(texts):
        (text / "txt" / f"{number:04}.txt").write_text(document)
    (text / "a.jsonl").write_bytes(data)
    (text / "a.jsonl.zst").write_bytes(zstandard.compress(data))
    (text / "a.json.gz").write_bytes(gzip.compress(data))
    pq.write_table(pa.table({"text": texts}), text / "a.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(text / "arrow"))
    prepare(spec_of(tmp_path / "forest", {"law": str(text / "a.jsonl")}))
    expected = tree(tmp_path / "forest" / "corpus" / "law")
    shards = [name for name in expected if name.endswith((".bin", ".idx", ".npy"))]
    assert len(shards) == 12
    fingerprints = set()
    for name in ("txt", "a.jsonl", "a.jsonl.zst", "a.json.gz", "a.parquet", "arrow"):
        root = tmp_path / name
        shutil.copytree(tmp_path / "forest" / "tokenizer", root / "tokenizer")
        result = prepare(spec_of(root, {"law": str(text / name)}))
        assert {file: tree(root / "corpus" / "law")[file] for file in shards} == {f: expected[f] for f in shards}, name
        fingerprints.add(result.domains["law"].fingerprint)
    assert len(fingerprints) == 1


def test_finished_domains_are_used_again(tmp_path, two):
    first = prepare(spec_of(tmp_path, two))
    before = {name: stamps(tmp_path / "corpus" / name) for name in two}
    assert prepare(spec_of(tmp_path, two)) == first
    assert {name: stamps(tmp_path / "corpus" / name) for name in two} == before


def said(tmp_path, spec, code=0):
    path = tmp_path / "spec.json"
    spec.save(path)
    done = subprocess.run(
        [sys.executable, "-m", "btm.corpus.worker", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_changed_file_is_named_and_its_domain_prepared_again(tmp_path, two):
    first = prepare(spec_of(tmp_path, two))
    write_lines(tmp_path / "text" / "med.jsonl", prose("med") + prose("med", 50, seed=1))
    before = stamps(tmp_path / "corpus" / "law")
    output = said(tmp_path, spec_of(tmp_path, two))
    assert "domain med is prepared again" in output
    assert "med.jsonl has changed (" in output
    assert "bytes before" in output
    second = PrepareResult.load(tmp_path / "corpus" / "prepare.json")
    assert stamps(tmp_path / "corpus" / "law") == before
    assert second.domains["law"] == first.domains["law"]
    assert second.domains["med"].fingerprint != first.domains["med"].fingerprint
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    output = said(tmp_path, spec_of(tmp_path, two, test_fraction=0.2))
    assert "domain law is prepared again: test_fraction was 0.1 and is 0.2 now" in output


@pytest.mark.parametrize(
    "name", ["train.bin", "dev.idx", "test.bytes.npy", "hashes.npy", "fates.npy", "signatures.bin", "corpus.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_shards_are_noticed_and_made_again(tmp_path, two, name, damage):
    """R3 for data files: a reused domain is checked by its fingerprint."""
    prepare(spec_of(tmp_path, two))
    intact, path = tree(tmp_path / "corpus" / "law"), tmp_path / "corpus" / "law" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "remove":
        path.unlink()
    prepare(spec_of(tmp_path, two))
    assert tree(tmp_path / "corpus" / "law") == intact


@pytest.mark.parametrize("mark", ["corpus", "corpus/.survey/law", "tokenizer", "corpus/law", "corpus/med"])
def test_a_killed_preparation_goes_on(tmp_path, two, mark):
    """R1: killed at any stage; the next run ends with the same bytes, and finished domains are not made again."""
    domains = {**two, "bio": write_lines(tmp_path / "text" / "bio.jsonl", prose("bio", 400))}
    prepare(spec_of(tmp_path / "whole", domains))
    root = tmp_path / "killed"
    spec = spec_of(root, domains)
    root.mkdir()
    spec.save(root / "spec.json")
    killed = (
        "import sys; from pathlib import Path; from tests.btm.chosen_moments import at_change;"
        "from btm.corpus.worker import main; at_change(Path(sys.argv[2]).exists); sys.exit(main(sys.argv[1:2]))"
    )
    command = [sys.executable, "-c", killed, str(root / "spec.json"), str(root / mark)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert (root / mark).exists()
    finished = [name for name in domains if (root / "corpus" / name / "corpus.json").exists()]
    before = {name: stamps(root / "corpus" / name) for name in finished}
    prepare(spec)
    assert {name: stamps(root / "corpus" / name) for name in finished} == before
    assert tree(root / "tokenizer") == tree(tmp_path / "whole" / "tokenizer")
    assert {k: v for k, v in tree(root / "corpus").items() if k != "prepare.json"} == {
        k: v for k, v in tree(tmp_path / "whole" / "corpus").items() if k != "prepare.json"
    }
    assert not [path for path in root.rglob(".tmp-*")]


def test_a_domain_that_comes_later_uses_the_tokenizer_and_shares_nothing(tmp_path, two):
    """B4: `btm add` leaves the prepared domains as they are."""
    first = prepare(spec_of(tmp_path, two))
    before = {name: tree(tmp_path / "corpus" / name) for name in two} | {"t": tree(tmp_path / "tokenizer")}
    shared = prose("law")[:30]
    new = {"new": write_lines(tmp_path / "text" / "new.jsonl", prose("new") + shared)}
    with pytest.raises(DataError, match="domains law and new share 30 of 230 documents"):
        prepare(spec_of(tmp_path, new))
    result = prepare(spec_of(tmp_path, new, on_error="skip"))
    assert list(result.domains) == ["new"]
    assert result.domains["new"].exact_duplicates == 30
    assert any("share 30 of 230 documents; dropped from new" in warning for warning in result.warnings)
    assert result.tokenizer_sha256 == first.tokenizer_sha256
    after = {name: tree(tmp_path / "corpus" / name) for name in two} | {"t": tree(tmp_path / "tokenizer")}
    assert after == before
    assert prepare(spec_of(tmp_path, new, on_error="skip")) == result, "warnings are said again"
    assert prepare(spec_of(tmp_path, two)) == first


def test_few_shared_documents_are_dropped_with_a_warning(tmp_path, two):
    write_lines(tmp_path / "text" / "med.jsonl", prose("med") + prose("law")[:1])
    result = prepare(spec_of(tmp_path, two))
    assert result.domains["med"].exact_duplicates == 1
    assert result.warnings == ["domains law and med share 1 of 201 documents; dropped from med"]


def test_novel_domains_are_held_out_and_later_ones_are_trained_on(tmp_path, two):
    novel = {"bio": write_lines(tmp_path / "text" / "bio.jsonl", prose("bio", 30))}
    later = {"new": write_lines(tmp_path / "text" / "new.jsonl", prose("new"))}
    spec = spec_of(tmp_path, two, novel=novel, add_later=later)
    result = prepare(spec)
    assert list(result.domains) == ["law", "med", "bio", "new"]
    splits = result.domains["bio"].splits
    assert splits["train"].documents == 0
    assert splits["dev"].documents + splits["test"].documents == 30
    assert result.domains["new"].splits["train"].documents > 100
    tokens = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("law" in token for token in tokens)
    assert not any("new" in token for token in tokens), "the tokenizer does not know the domain that comes later"


def test_a_pretrained_tokenizer_is_taken(tmp_path, two):
    first = prepare(spec_of(tmp_path / "a", two, vocab_size=500))
    spec = spec_of(tmp_path / "b", two, vocab_size=300, pretrained_dir=str(tmp_path / "a" / "tokenizer"))
    assert prepare(spec).vocab_size == first.vocab_size == 500
    assert tree(tmp_path / "b" / "tokenizer") == tree(tmp_path / "a" / "tokenizer")


def test_too_little_text_says_how_much_is_needed(tmp_path, two):
    write_lines(tmp_path / "text" / "med.jsonl", prose("med", 60))
    message = said(tmp_path, spec_of(tmp_path, two, min_train_tokens=50_000), code=1)
    assert "domain law has " in message
    assert "domain med has " in message
    assert message.count("training tokens, needs at least 50,000") == 2
    assert list((tmp_path / "corpus").glob("*/corpus.json")) == [], "a domain that cannot be used is not prepared"
    write_lines(tmp_path / "text" / "med.jsonl", prose("med", 2))
    assert "domain med has no dev documents among 2" in said(tmp_path, spec_of(tmp_path, two), code=1)
    write_lines(tmp_path / "text" / "med.jsonl", prose("med"))
    assert "train" in said(tmp_path, spec_of(tmp_path, two))


def test_too_little_text_of_one_domain_keeps_the_work_on_the_others(tmp_path, two):
    write_lines(tmp_path / "text" / "med.jsonl", prose("med", 2))
    said(tmp_path, spec_of(tmp_path, two), code=1)
    assert [path.parent.name for path in (tmp_path / "corpus").glob("*/corpus.json")] == ["law"]
    kept = stamps(tmp_path / "corpus" / "law")
    write_lines(tmp_path / "text" / "med.jsonl", prose("med"))
    said(tmp_path, spec_of(tmp_path, two))
    assert stamps(tmp_path / "corpus" / "law") == kept


def test_all_paths_are_checked_before_any_work(tmp_path, two):
    domains = {**two, "x": "no/such/file.jsonl", "../evil": two["law"], "LAW": two["med"]}
    message = said(tmp_path, spec_of(tmp_path, domains), code=1)
    for part in ("no/such/file.jsonl", "../evil", "domain LAW is named twice"):
        assert part in message
    assert not (tmp_path / "tokenizer").exists()
    assert not list((tmp_path / "corpus").glob("*/*"))


def test_broken_documents_are_left_out_and_counted(tmp_path, two):
    path = tmp_path / "text" / "med.jsonl"
    path.write_bytes(b"{\n" + path.read_bytes() + b'{"text": 1}\n{"text": ""}\n')
    assert "med.jsonl:1: not valid JSON" in said(tmp_path, spec_of(tmp_path, two), code=1)
    result = prepare(spec_of(tmp_path, two, on_error="skip"))
    assert result.domains["med"].broken == {"bad_json": 1, "empty": 1, "not_text": 1}
    assert "left out 3 documents (1 bad_json, 1 empty, 1 not_text)" in result.warnings[0]
    assert sum(split.documents for split in result.domains["med"].splits.values()) == 200


def test_text_that_changes_while_it_is_read_is_noticed(tmp_path, two):
    class Changing(ProgressLine):
        def show(self, text):
            if text.startswith("training the tokenizer"):
                write_lines(tmp_path / "text" / "law.jsonl", prose("law", 200, seed=9))

    with pytest.raises(DataError, match="changed while domain law was being prepared"):
        prepare(spec_of(tmp_path, two), Changing())


def test_two_preparations_do_not_meet(tmp_path, two):
    class Second(ProgressLine):
        def show(self, text):
            with pytest.raises(ForestError, match="another process holds"):
                prepare(spec_of(tmp_path, two))

    prepare(spec_of(tmp_path, two), Second())


def test_logs_hold_no_control_characters_and_few_lines(tmp_path, two, monkeypatch):
    stream = io.StringIO()
    with ProgressLine(Console(file=stream, width=80)) as line:
        for number in range(1000):
            line.show(f"read {number} [red] documents")
        monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0)
        line.show("a line " + "x" * 200)
    assert stream.getvalue() == "a line " + "x" * 200 + "\n"
    output = said(tmp_path, spec_of(tmp_path, two))
    assert not [character for character in output if ord(character) < 32 and character != "\n"]
    assert len(output.splitlines()) <= 3


def test_a_full_disk_leaves_what_was_there(tmp_path, two):
    """R4: a write that fails ends with a message, and the finished domain stays."""
    prepare(spec_of(tmp_path, {"law": two["law"]}))
    before = tree(tmp_path / "corpus" / "law")
    spec = spec_of(tmp_path, {**two, "bio": write_lines(tmp_path / "text" / "bio.jsonl", prose("bio", 3000))})
    spec.save(tmp_path / "spec.json")
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from btm.corpus.worker import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, str(tmp_path / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(tmp_path / "corpus" / "law") == before
    assert list(prepare(spec).domains) == ["law", "med", "bio"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """A corpus of ten times the text takes about the same memory."""
    peaks = []
    for count in (2_000, 20_000):
        root = tmp_path / str(count)
        text = write_lines(root / "law.jsonl", prose("law", count))
        spec_of(root, {"law": text}).save(root / "spec.json")
        code = (
            "import resource, sys; from btm.corpus.worker import main; code = main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(root / "spec.json")],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1"},
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 60, f"MiB: {peaks}"


def test_main_reports_a_bad_spec(tmp_path, capsys):
    (tmp_path / "spec.json").write_text("{}")
    assert main([str(tmp_path / "spec.json")]) == 1
    assert "not a valid PrepareSpec" in capsys.readouterr().err


def test_near_duplicates_are_counted(tmp_path):
    base = prose("law", 100)
    texts = base + [text.replace("\n", f" end{number}\n") for number, text in enumerate(base)]
    result = prepare(spec_of(tmp_path, {"law": write_lines(tmp_path / "law.jsonl", texts)}))
    kept = sum(split.documents for split in result.domains["law"].splits.values())
    assert result.domains["law"].near_duplicates > 10
    assert kept + result.domains["law"].near_duplicates == 200
    fates = np.load(tmp_path / "corpus" / "law" / "fates.npy")
    assert (fates[:100] == 0).sum() + (fates[100:] == 0).sum() == result.domains["law"].splits["train"].documents
