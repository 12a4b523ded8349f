"""The base model's tokenizer and chat template."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from manylora.server.model.errors import BadCheckpoint, ChatTemplateError

if TYPE_CHECKING:
    import tokenizers

_SENTENCEPIECE_SPACE = "▁"


class Tokenizer:
    """transformers' fast tokenizer behind the few calls the server makes. Safe to share between threads.

    ``eos_token_ids`` are ids that end generation besides the tokenizer's own (the config's, `ModelSpec`).
    """

    def __init__(self, hf_tokenizer: Any, *, eos_token_ids: Iterable[int] = ()) -> None:
        self._hf = hf_tokenizer
        own = hf_tokenizer.eos_token_id
        ids = [*eos_token_ids, *([] if own is None else [own])]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))
        decoder = json.loads(self.backend.decoder.__getstate__()) if self.backend.decoder is not None else {}
        self._byte_level = any(part["type"] == "ByteLevel" for part in [decoder, *decoder.get("decoders", ())] if part)
        self._added = {token: spelled.content for token, spelled in self.backend.get_added_tokens_decoder().items()}

    @classmethod
    def from_directory(cls, directory: Path, *, eos_token_ids: Iterable[int] = ()) -> Tokenizer:
        """Load the tokenizer files of a checkpoint; never runs code from it. Raises BadCheckpoint."""
        if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise BadCheckpoint(
                str(directory), "it has no tokenizer: copy tokenizer.json and tokenizer_config.json of its model there"
            )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            _check_json(directory / name)
        try:
            loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise BadCheckpoint(str(directory), f"its tokenizer cannot be loaded: {error}") from error
        if not getattr(loaded, "is_fast", False):
            raise BadCheckpoint(str(directory), "its tokenizer has no fast version: save one as tokenizer.json")
        return cls(loaded, eos_token_ids=eos_token_ids)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The Rust tokenizer, for incremental decoding."""
        backend: tokenizers.Tokenizer = self._hf.backend_tokenizer
        return backend

    @property
    def hf(self) -> Any:
        """transformers' own tokenizer object."""
        return self._hf

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included; the model's embedding may have more rows (padding)."""
        return len(self._hf)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        return self._special_ids

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._hf.all_special_ids) | {
            token for token, spelled in self.backend.get_added_tokens_decoder().items() if spelled.special
        }

    @functools.cached_property
    def spaces_special_tokens(self) -> bool:
        """Whether special tokens that follow each other are decoded with a space between them."""
        ids = [min(self.special_ids)] * 2 if self.special_ids else []
        return self.decode(ids, skip_special_tokens=False) != 2 * self.decode(ids[:1], skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in ``text`` are recognised, as everywhere."""
        ids: list[int] = self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids`` exactly as generated: no clean-up of spaces before punctuation."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation, by the model's template or ``chat_template``.

        ``kwargs`` (``tools``, ``enable_thinking``, …) are variables of the template, which runs in transformers'
        immutable Jinja sandbox. Raises ChatTemplateError, a ValueError, when there is no template or it fails on
        these messages.
        """
        text = self.render_chat_template(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False)

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The text that `apply_chat_template` encodes."""
        if chat_template is None and not self.has_chat_template:
            raise ChatTemplateError(
                "This model has no chat template: send a prompt to /v1/completions instead, or give a template."
            )
        if add_generation_prompt and continue_final_message:
            raise ChatTemplateError("add_generation_prompt and continue_final_message exclude each other.")
        try:
            text: str = self._hf.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **kwargs,
            )
        except TemplateError as error:
            raise ChatTemplateError(f"The chat template refused these messages: {error}") from error
        # What a template written without checks does with a message of an unexpected form (a missing key, a list for
        # a string), and a range() beyond the sandbox's limit.
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ChatTemplateError(f"The chat template failed on these messages ({reason}).") from error
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token; the replacement character stands for bytes that are no whole character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, whatever surrounds it; empty for an id without a token (padding rows)."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            table = _byte_of_character()
            return b"".join(table[c] if c in table else c.encode() for c in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SENTENCEPIECE_SPACE, " ").encode()


@functools.cache
def _byte_of_character() -> dict[str, bytes]:
    """GPT-2's printable spelling of bytes, inverted (Radford et al. 2019; ``bytes_to_unicode`` in their encoder.py).

    Bytes that are printable in Latin-1 stand for themselves; the others are numbered from U+0100 in order.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): bytes([byte]) for byte in sorted(plain)}
    for index, byte in enumerate(byte for byte in range(256) if byte not in plain):
        table[chr(0x100 + index)] = bytes([byte])
    return table


def _check_json(path: Path) -> None:
    if not path.is_file():
        return
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(str(path), f"it is truncated or corrupt ({error}); fetch the file again") from error
