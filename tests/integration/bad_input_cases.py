"""What users and strangers get wrong: arguments, the exit code and the words that the answer must hold."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONFIG, OTHER = 2, 1


@dataclass(frozen=True)
class Case:
    """One mistake.

    ``arguments`` and ``words`` may hold ``{forest}``, ``{tmp}`` and ``{corpora}``. ``spoil(forest, tmp)`` makes the
    mistake on the disk; ``own`` gives the case a copy of the forest that it may damage.
    """

    name: str
    arguments: str
    words: str
    exit_code: int = OTHER
    spoil: Callable[[Path, Path], object] | None = None
    own: bool = False


def config(name: str, arguments: str, words: str) -> Case:
    return Case(name, arguments, words, CONFIG)


CONFIGS = [
    config("unknown-command", "mrege", "did you mean 'merge'?"),
    config("number-as-word", "run train.lr=abc", "train.lr must be a valid number"),
    config("list-for-number", "run train.lr=[1,2]", "train.lr must be a valid number"),
    config("number-for-table", "run data.domains=3", "data.domains must be a valid dictionary"),
    config("number-for-path", "run data.domains.a=3", "data.domains.a must be a valid string"),
    config("null-for-path", "run data.domains.a=null", "data.domains.a must be a valid string"),
    config("fraction-for-count", "run train.log_every=1.5", "train.log_every must be a valid integer"),
    config("unknown-key", "run train.lrr=1", "did you mean train.lr?"),
    config("unknown-key-with-plus", "run +data.text_feild=x", "did you mean data.text_field?"),
    config("unknown-group-option", "run model=lama_4m", "did you mean 'llama_4m'?"),
    config("unknown-executor", "run launch.executor=slum", "must be 'local', 'ray' or 'slurm', got 'slum'"),
    config("unknown-tracker", "run tracking.name=wandd", "must be 'none' or 'wandb'"),
    config(
        "unknown-architecture",
        "run model.arch=lama data.domains.a=x dry_run=true",
        "model.arch='lama' is not a causal LM",
    ),
    config("unknown-architecture-for-prepare", "prepare model.arch=lama data.domains.a=x", "did you mean llama"),
    config("negative", "run train.lr=-1", "train.lr must be greater than 0, got -1"),
    config("infinite", "run train.lr=inf data.domains.a=x dry_run=true", "train.lr must be a finite number, got inf"),
    config("not-a-number", "run train.lr=nan data.domains.a=x dry_run=true", "train.lr must be a finite number"),
    config(
        "absurd-budget", "run train.tokens=1e30 data.domains.a=x dry_run=true", "train.tokens is too large, got 1e+30"
    ),
    config("no-layers", "run model.num_layers=0", "model.num_layers must be greater than or equal to 1"),
    config("uneven-heads", "run model.hidden_size=65 model.num_heads=2", "multiple of model.num_heads (2)"),
    config("sequence-too-long", "run train.sequence_length=4096 train.batch_tokens=8192", "model.max_positions (2048)"),
    config("uneven-batch", "run train.batch_tokens=1000", "multiple of train.sequence_length"),
    config("too-many-cores", "run launch.cpus_per_elm=9999 data.domains.a=x dry_run=true", "on this machine, got 9999"),
    config("no-domain", "run forest={tmp}/new", "no domain to train on"),
    config("no-directory", "run data.directory={tmp}/none", "must be a directory that holds text files"),
    config("domain-twice", "run data.domains.a=x data.novel.a=y", "data.novel.a is already in data.domains"),
    config("name-outside", "run name=../x data.domains.a=x", "'../x' cannot be a name"),
    config("weight-of-nobody", "run data.domains.a=x data.weights.b=1", "data.weights names unknown domains ['b']"),
    config("secret-in-config", "run model.extra.api_key=abc", "looks like a secret"),
    config("contradiction", "run branch.from=uniform branch.optimizer=continue", "set branch.optimizer=reset"),
    config("weights-missing", "merge forest={forest} merge=weighted", "needs merge.weights"),
    config("weights-zero", "merge forest={forest} merge=weighted merge.weights.code=0", "not all 0"),
    config("unresolved-reference", "list 'forest=${oops}'", "oops"),
    config("unknown-flag", "list --frobnicate", "frobnicate"),
    config("other-values", "run forest={forest} data.domains.a=x", "allow_config_change=true"),
]
"""Wrong configurations; every one is found before anything is written."""


def lines(*rows: object, name: str = "bad.jsonl") -> Callable[[Path, Path], object]:
    """Write rows (bytes as they are, the rest as JSON) to ``{tmp}/<name>``."""
    content = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    return lambda _, tmp: (tmp / name).write_bytes(content)


def data(name: str, words: str, spoil: Callable[[Path, Path], object], file: str = "bad.jsonl", more: str = "") -> Case:
    return Case(name, f"add forest={{forest}} domain=bad data.path={{tmp}}/{file} {more}", words, spoil=spoil)


def truncated_gzip(_: Path, tmp: Path) -> None:
    content = gzip.compress(b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(2000)))
    (tmp / "bad.jsonl.gz").write_bytes(content[: len(content) // 2])


def dataset_that_points_outside(_: Path, tmp: Path) -> None:
    (tmp / "dataset").mkdir()
    (tmp / "dataset/state.json").write_text(json.dumps({"_data_files": [{"filename": "../../etc/passwd"}]}))


GOOD = {"text": "a good line"}
DATA = [
    data("missing-file", "matches no text file", lambda *_: None),
    data("bad-json", "bad.jsonl:2: not valid JSON", lines(GOOD, b"{bad\n")),
    data("missing-field", "bad.jsonl:1: no field 'text'; it has 'body' (set data.text_field)", lines({"body": "x"})),
    data("latin-1", "bad.jsonl:2: not UTF-8 at byte", lines(GOOD, b'{"text": "\xe9t\xe9"}\n')),
    data("utf-16", "UTF-16", lines("text".encode("utf-16"), name="bad.txt"), "bad.txt"),
    data("binary", "NUL bytes; is this a binary", lines(bytes(range(256)), name="bad.txt"), "bad.txt"),
    data("empty-file", "the file is empty", lines()),
    data("too-little-text", "data.min_train_tokens", lines(*({"text": f"document {i}"} for i in range(30)))),
    data("json-list", "write one object per line", lines([GOOD])),
    data("text-is-a-number", "text must be a string, got int", lines({"text": 3})),
    data("unknown-form", "has an unknown form", lines(b"x", name="bad.pkl"), "bad.pkl"),
    data("not-parquet", "not a whole parquet file", lines(b"PAR1", name="bad.parquet"), "bad.parquet"),
    data("truncated-gzip", "cannot be read to its end", truncated_gzip, "bad.jsonl.gz"),
    data("dataset-outside", "is not the name of a file beside it", dataset_that_points_outside, "dataset"),
    Case("same-text-as-another-domain", "add forest={forest} domain=bad data.path={corpora}/code.jsonl", "code"),
]
"""Texts that cannot join."""


def folder_with_a_letter(_: Path, tmp: Path) -> None:
    (tmp / "letters").mkdir()
    (tmp / "letters/dear.txt").write_text("keep me")


def texts_named_like_an_option(_: Path, tmp: Path) -> None:
    (tmp / "texts").mkdir()
    (tmp / "texts/-rf.txt").write_text("text")


def file_there(_: Path, tmp: Path) -> None:
    (tmp / "taken").write_text("keep me")


REQUESTS = [
    *(
        Case(f"no-forest-{verb}", f"{verb} forest={{tmp}}/none domain=a generate.prompt=x", "holds no ")
        for verb in ("add", "remove", "list", "inspect", "merge", "evaluate", "generate", "report", "status")
    ),
    Case(
        "domain-like-an-option",
        "run data.directory={tmp}/texts forest={tmp}/new",
        "'-rf' cannot be a name",
        CONFIG,
        spoil=texts_named_like_an_option,
    ),
    config("no-prompt", "generate forest={forest}", "needs generate.prompt"),
    config("generate-unknown-model", "generate forest={forest} generate.prompt=x generate.model=elm", "'elm/docs'"),
    Case("generate-unknown-elm", "generate forest={forest} generate.prompt=x generate.model=elm/law", "no ELM 'law'"),
    Case("prior-of-nobody", "generate forest={forest} generate.prompt=x ensemble=cached", "no cached prior for domain"),
    config("no-domain-to-remove", "remove forest={forest}", "btm remove needs domain=<name>"),
    Case("remove-unknown", "remove forest={forest} domain=law", "no ELM 'law'; it has ['code', 'docs']"),
    Case("remove-outside", "remove forest={forest} domain=../seed", "no ELM '../seed'"),
    Case("inspect-unknown", "inspect forest={forest} domain=law", "no ELM 'law'"),
    Case("add-outside", "add forest={forest} domain=../x data.path={corpora}/mail.jsonl", "'../x' cannot be a name"),
    Case("add-taken", "add forest={forest} domain=docs data.path={corpora}/mail.jsonl", "already has an ELM 'docs'"),
    Case("add-seed", "add forest={forest} domain=seed data.path={corpora}/mail.jsonl", "already has an ELM 'seed'"),
    config("add-without-text", "add forest={forest} domain=law", "needs data.path=<text>"),
    config("merge-unknown-elm", "merge forest={forest} merge.elms=[law]", "merge.elms: no ELM 'law'"),
    config("merge-unknown-weight", "merge forest={forest} merge=weighted merge.weights.law=1", "merge.weights: no ELM"),
    config("merge-without-domain", "merge forest={forest} merge=posterior", "needs merge.domain, one of"),
    Case(
        "merge-onto-a-folder",
        "merge forest={forest} merge.output={tmp}/letters",
        "{tmp}/letters",
        spoil=folder_with_a_letter,
    ),
    Case("merge-onto-a-file", "merge forest={forest} merge.output={tmp}/taken", "{tmp}/taken", spoil=file_there),
    Case("merge-onto-an-elm", "merge forest={forest} merge.output={forest}/elms/docs", "elms/docs"),
    Case("merge-onto-the-forest", "merge forest={forest} merge.output={forest}", "{forest}"),
    Case(
        "forest-is-a-file",
        "run forest={tmp}/taken data.domains.a=x",
        "is not a writable directory",
        spoil=file_there,
    ),
    Case(
        "too-deep-for-the-disk", "run forest={tmp}/new model.num_layers=20000 data.domains.a=x", "the plan needs about"
    ),
    Case("list-name-too-long", f"list forest={{tmp}}/{'x' * 300}", "File name too long"),
    Case("forest-name-too-long", f"run forest={{tmp}}/{'x' * 300} data.domains.a=x", "File name too long"),
]
"""Requests that an undamaged forest cannot fulfil."""
