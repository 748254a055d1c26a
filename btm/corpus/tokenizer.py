"""The one tokenizer of a forest: trained (byte-level BPE), or taken from a Hugging Face directory.

It is stored as a normal Hugging Face tokenizer directory. Tokenizers that bring code of their own are refused.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from btm.errors import DataError, ForestError
from btm.files import directory_in_one_step, read_json, sha256_of_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|endoftext|>"
_COPIED_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_CODE_KEY = "auto_map"
_WORD_MARK = "\u2581"


class TextEncoder:
    """Turns texts into token ids, with the threads of the ``tokenizers`` library.

    Attributes:
        eos_id: End-of-text token, which ends every document.
        vocab_size: One more than the largest token id.
    """

    def __init__(self, directory: Path | str) -> None:
        """Load the tokenizer in ``directory``.

        Raises:
            DataError: If it is missing, damaged, brings code, or has no end-of-text token.
        """
        directory = Path(directory)
        refuse_code(directory)
        self._tokenizer = _load_json(directory)
        # Text that spells a special token stays text: a document must not be able to end itself.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id = _eos_id(directory, self._tokenizer)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text with the end-of-text token behind it, int64."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos_id], dtype=np.int64) for encoding in encoded]


def train_tokenizer(texts: Iterable[str], directory: Path | str, *, vocab_size: int) -> None:
    """Train byte-level BPE on ``texts`` and write it to ``directory``; the same texts give the same file.

    Byte-level BPE takes any text and gives it back exactly (Radford et al. 2019, Sennrich et al. 2016,
    https://arxiv.org/abs/1508.07909).

    Args:
        texts: Documents.
        directory: Where the tokenizer goes; replaced in one step.
        vocab_size: Entries, the end-of-text token included; fewer when the text does not give as many.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), EOS_TOKEN)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    with directory_in_one_step(Path(directory)) as temporary:
        (temporary / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        _write_json(temporary / "tokenizer_config.json", config)
        _write_json(temporary / "special_tokens_map.json", special)


def copy_tokenizer(source: Path | str, directory: Path | str) -> None:
    """Copy the tokenizer of a Hugging Face tokenizer or model directory to ``directory``.

    One without ``tokenizer.json`` is converted by transformers.

    Raises:
        DataError: If ``source`` holds no usable tokenizer, or one that brings code.
    """
    source = Path(source)
    if not source.is_dir():
        raise DataError(f"tokenizer {source} does not exist; give a Hugging Face tokenizer directory")
    refuse_code(source)
    with directory_in_one_step(Path(directory)) as temporary:
        if (source / "tokenizer.json").is_file():
            for name in ("tokenizer.json", *_COPIED_FILES):
                if (source / name).is_file():
                    _read_json(source / name)
                    shutil.copyfile(source / name, temporary / name)
            template = source / "chat_template.jinja"
            if template.is_file() and not template.is_symlink():
                (temporary / template.name).write_bytes(template.read_bytes())
        else:
            _convert(source, temporary)
        TextEncoder(temporary)


def plain_tokens(directory: Path | str) -> list[str | None]:
    """Text that each token stands for, by id; None for special tokens and ids that the tokenizer leaves out.

    Raises:
        DataError: If the tokenizer is missing or damaged.
    """
    tokenizer = _load_json(Path(directory))
    special = tokenizer.get_added_tokens_decoder()
    known = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    texts: list[str | None] = []
    for number in range(max(known) + 1):
        is_plain = number in known and number not in special
        text = tokenizer.decode([number]) if is_plain else None
        # Decoders of SentencePiece drop the space before the first word.
        is_stripped = text and is_plain and known[number].startswith(_WORD_MARK) and not text.startswith(" ")
        texts.append(f" {text}" if is_stripped else text)
    return texts


def load_tokenizer(directory: Path | str) -> "PreTrainedTokenizerFast":
    """Load the tokenizer in ``directory`` for transformers; it has an ``eos_token_id``.

    Raises:
        DataError: If it is missing, damaged, brings code, or has no end-of-text token.
    """
    from transformers import PreTrainedTokenizerFast

    refuse_code(Path(directory))
    eos_id = _eos_id(Path(directory), _load_json(Path(directory)))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
    return tokenizer


def tokenizer_sha256(directory: Path | str) -> str:
    """Hash of what the tokenizer in ``directory`` does, independent of how its file is laid out.

    Raises:
        DataError: If it is missing or damaged.
    """
    content = _read_json(Path(directory) / "tokenizer.json")
    return sha256_of_json({key: content[key] for key in content if key not in ("truncation", "padding")})


def refuse_code(directory: Path) -> None:
    """Refuse a tokenizer whose files ask transformers to run Python code from its directory.

    Raises:
        DataError: If they do.
    """
    for name in ("tokenizer_config.json", "config.json"):
        if not (directory / name).is_file():
            continue
        code = _read_json(directory / name).get(_CODE_KEY)
        if code and (name != "config.json" or "AutoTokenizer" in code):
            raise DataError(
                f"{directory / name} asks for code of its own ({_CODE_KEY}), which is never run; "
                "give a tokenizer that is plain data (tokenizer.json)"
            )


def _eos_id(directory: Path, tokenizer: Tokenizer) -> int:
    for name in _COPIED_FILES:
        if not (directory / name).is_file():
            continue
        eos = _read_json(directory / name).get("eos_token")
        content = eos.get("content") if isinstance(eos, dict) else eos
        if isinstance(content, str) and (token_id := tokenizer.token_to_id(content)) is not None:
            return token_id
    raise DataError(
        f"the tokenizer in {directory} names no end-of-text token that it knows; set eos_token in tokenizer_config.json"
    )


def _load_json(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    _read_json(path)
    try:
        return Tokenizer.from_file(str(path))
    # The library raises bare exceptions for content that is not a tokenizer.
    except Exception as error:
        raise DataError(f"{path} is not a tokenizer ({error}); take it from its source again") from None


def _convert(source: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, local_files_only=True)
        tokenizer.save_pretrained(str(directory))
    # Which errors come depends on the tokenizer's class; all of them mean that this directory cannot be used.
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{source} holds no usable tokenizer ({first_line}); give one with tokenizer.json") from None
    if not (directory / "tokenizer.json").is_file():
        raise DataError(f"the tokenizer in {source} has no fast form; give one with tokenizer.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (ForestError, OSError, RecursionError) as error:
        raise DataError(f"tokenizer: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"tokenizer: {path} is not a JSON object; take it from its source again")
    return content


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
