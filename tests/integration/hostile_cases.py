"""Models and forests that are damaged, or made by somebody who means harm."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.integration.bad_input_cases import Case


class Evil:
    """A pickle that leaves a mark when it is read."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch pwned",))


def guest(change: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """Copy an ELM to ``{tmp}/guest`` and change it there."""

    def spoil(forest: Path, tmp: Path) -> None:
        shutil.copytree(forest / "elms/docs", tmp / "guest")
        change(tmp / "guest")

    return spoil


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.unlink()
    path.write_bytes(content)


def header_bomb(path: Path) -> None:
    path.unlink()
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def outside_offsets(path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.unlink()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(content))


def remote_code(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text("open('pwned', 'w')")


def not_finite(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-64] + b"\xff" * 64)


def link_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/passwd")


def model(name: str, words: str, change: Callable[[Path], object]) -> Case:
    return Case(name, "add forest={forest} domain=guest model.path={tmp}/guest", words, spoil=guest(change))


MODELS = [
    Case("no-model", "add forest={forest} domain=guest model.path={tmp}/none", "is not a Hugging Face model"),
    model("only-pickles", "pickled weights are refused", only_pickles),
    model("no-config", "is not a Hugging Face model", lambda folder: (folder / "config.json").unlink()),
    model("truncated-weights", "model.safetensors", lambda folder: truncate(folder / "model.safetensors")),
    model("flipped-header", "model.safetensors", lambda folder: flip(folder / "model.safetensors", 20)),
    model("header-bomb", "model.safetensors", lambda folder: header_bomb(folder / "model.safetensors")),
    model("offsets-outside", "model.safetensors", lambda folder: outside_offsets(folder / "model.safetensors")),
    model("weights-are-a-link", "model.safetensors", link_weights),
    model("code-of-its-own", "auto_map", remote_code),
    model("config-is-a-list", "config.json", lambda folder: (folder / "config.json").write_text("[]")),
    model(
        "other-sizes",
        "config.json and the weights belong to different models",
        lambda folder: edit_json(folder / "config.json", hidden_size=96),
    ),
    model("other-tokenizer", "another tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{}")),
    model("weights-not-finite", "finite", not_finite),
    Case(
        "seed-of-pickles",
        "run experiment=smoke data.domains.a={corpora}/code.jsonl forest={tmp}/new model.path={tmp}/guest",
        "can run code when they are read",
        spoil=guest(only_pickles),
    ),
    Case(
        "generate-with-pickles",
        "generate forest={forest} generate.prompt=x generate.model={tmp}/guest",
        "can run code when they are read",
        spoil=guest(only_pickles),
    ),
    Case(
        "generate-with-code",
        "generate forest={forest} generate.prompt=x generate.model={tmp}/guest",
        "does not load as a transformers causal LM",
        spoil=guest(remote_code),
    ),
]
"""Models of others that cannot join, or be read."""


def damaged(name: str, arguments: str, words: str, change: Callable[[Path], object]) -> Case:
    return Case(name, arguments, words, spoil=lambda forest, _: change(forest), own=True)


def edit_elm(index: int = 1, **changes: object) -> Callable[[Path], object]:
    def change(forest: Path) -> None:
        raw = json.loads((forest / "forest.json").read_text())
        raw["elms"][index].update(changes)
        (forest / "forest.json").write_text(json.dumps(raw))

    return change


def link_elm(forest: Path) -> None:
    (forest / "elms/docs").rename(forest / "elsewhere")
    (forest / "elms/docs").symlink_to("../elsewhere")


CACHED = "generate generate.prompt=x ensemble=cached domain=docs"
WEIGHTS = "elms/docs/model.safetensors"
DAMAGES = [
    damaged("newer-schema", "list", "schema version 99", lambda f: edit_json(f / "forest.json", schema_version=99)),
    damaged("half-a-manifest", "list", "forest.json is not valid JSON", lambda f: truncate(f / "forest.json")),
    damaged("manifest-is-a-list", "list", "forest.json", lambda f: (f / "forest.json").write_text("[]")),
    damaged("manifest-in-latin-1", "list", "not valid JSON", lambda f: (f / "forest.json").write_bytes(b'"\xe9"')),
    damaged("directory-outside", "merge", "directory must be 'elms/docs'", edit_elm(directory="../../etc")),
    damaged("domain-outside", "inspect domain=code", "'../x' cannot be a name", edit_elm(domain="../x")),
    damaged("elm-twice", "remove domain=code", "names the ELM 'code' twice", edit_elm(domain="code")),
    damaged("file-outside", "inspect domain=docs", "is not a file name", edit_elm(files={"../../x": "0"})),
    damaged("elm-is-a-link", "inspect domain=docs", "is missing (or a link)", link_elm),
    damaged("config-damaged", "list", "config.json is not valid JSON", lambda f: truncate(f / "config.json")),
    damaged("config-is-a-list", "list", "config.json", lambda f: (f / "config.json").write_text("[]")),
    damaged("evaluation-damaged", CACHED, "evaluation.json is not valid", lambda f: truncate(f / "evaluation.json")),
    damaged("spec-damaged", "status", "spec.json", lambda f: truncate(f / "runs/seed/spec.json")),
    damaged(
        "half-a-spec", "status", "is not a valid TrainSpec", lambda f: edit_json(f / "runs/seed/spec.json", seed="x")
    ),
    damaged("flipped-bit", "inspect domain=docs", "does not have the checksum", lambda f: flip(f / WEIGHTS)),
    damaged("merge-flipped-bit", "merge", "elms/docs/model.safetensors", lambda f: flip(f / WEIGHTS)),
    damaged("merge-truncated", "merge", "elms/docs/model.safetensors", lambda f: truncate(f / WEIGHTS)),
    damaged("merge-header-bomb", "merge", "elms/docs/model.safetensors", lambda f: header_bomb(f / WEIGHTS)),
    damaged("merge-missing-weights", "merge", "elms/docs", lambda f: (f / WEIGHTS).unlink()),
    damaged("generate-truncated", "generate generate.prompt=x", "elms/docs", lambda f: truncate(f / WEIGHTS)),
    damaged(
        "generate-only-pickles", "generate generate.prompt=x", "can run code", lambda f: only_pickles(f / "elms/docs")
    ),
    damaged("no-tokenizer", "generate generate.prompt=x", "tokenizer", lambda f: shutil.rmtree(f / "tokenizer")),
    damaged(
        "generate-tokenizer-damaged",
        "generate generate.prompt=x",
        "tokenizer.json",
        lambda f: truncate(f / "tokenizer/tokenizer.json"),
    ),
]
"""Forests that are damaged, or made by somebody else; the command gets ``forest=`` appended."""
