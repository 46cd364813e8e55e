"""`Entry`: what is known of an adapter, and the name that it goes by."""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError, shown

LONGEST = 100  # bytes of a name
_NAME = re.compile(r"\w(?:[\w.+-]*[\w+-])?")
_KEY = re.compile(r"[0-9a-f]{64}")
_PLAIN = re.compile(r"(?!\.)[^/\\:]+")


@dataclass(frozen=True)
class Entry:
    """An adapter of the library: its name, where its content is, and what is known of it.

    `content` is the sha256 of the content, `files` the sha256 of each of its files, `size` their bytes. `file` is the
    one file that is read, or "" where the folder is. `origin` says where it came from: path, run, repository.
    """

    name: str = ""
    content: str = ""
    files: dict[str, str] = field(default_factory=dict)
    size: int = 0
    added: str = ""  # 2026-01-31T23:59:59Z
    file: str = ""
    format: str = ""
    method: str = ""
    base: str = ""  # as the files call it
    family: str = ""  # as its layers show it: SDXL
    licence: str = ""
    tags: list[str] = field(default_factory=list)
    triggers: list[str] = field(default_factory=list)
    note: str = ""
    sample: str = ""
    preview: str = ""  # the sha256 of a content that is one picture
    origin: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of its file. Raises `AdapterError` where it is too long to be read again."""
        from veneer.safe.stored import OBJECT_LIMIT

        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        if len(text.encode()) > OBJECT_LIMIT:
            raise AdapterError(f"what is said of {self.name!r} is too long: expected at most {OBJECT_LIMIT} bytes")
        return text

    @classmethod
    def read(cls, path: Path) -> "Entry":
        """The entry that a file of the library holds. Raises `AdapterError` that says all that is wrong with it."""
        from veneer.safe.stored import parsed, read_bytes  # which loads torch; a list of entries needs none

        entry = cls.of(parsed(read_bytes(path), str(path)), str(path))
        if path.name != file_of(entry.name):
            raise AdapterError(f"{path} is the entry of {entry.name!r}: expected {file_of(entry.name)!r} as its name")
        return entry

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> "Entry":
        """The entry that plain values describe; keys of a newer version are passed over. Raises `AdapterError`."""
        values = {name: values.get(name, default) for name, default in asdict(cls()).items()}
        faults = [
            f"{name} should be {what}, found {shown(values[name])}"
            for name, (what, holds) in _RULES.items()
            if not holds(values[name])
        ]
        if faults:
            raise AdapterError(f"{where} is not an entry of a library: {'; '.join(faults)}")
        return cls(
            **{name: _printable(value, "\n" if name in ("note", "sample") else "") for name, value in values.items()}
        )


def checked_name(name: str) -> str:
    """The name, if it may be one. Raises `AdapterError`."""
    name = unicodedata.normalize("NFC", name)
    if not is_name(name):
        raise AdapterError(
            f"{shown(name)} cannot be the name of an adapter: expected letters, digits, and any of . _ + - among them, "
            f"at most {LONGEST} bytes in all"
        )
    return name


def name_of(text: str) -> str:
    """The name nearest to any text."""
    text = re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", text)).strip(".+-")
    text = text.encode()[:LONGEST].decode("utf-8", "ignore").strip(".+-")
    return text if is_name(text) else "adapter"


def file_of(name: str) -> str:
    """The file of the entry `name`: one for all spellings that differ in capitals, as some systems see no others."""
    return f"{unicodedata.normalize('NFC', name.casefold())}.json"


def is_plain(name: object) -> bool:
    """Whether this is the name of a file in a folder, and of none elsewhere, on every system."""
    return isinstance(name, str) and len(name) <= 200 and name.isprintable() and bool(_PLAIN.fullmatch(name))


def is_key(text: object) -> bool:
    """Whether this is a sha256 as hexadecimal digits."""
    return isinstance(text, str) and bool(_KEY.fullmatch(text))


def is_name(value: object) -> bool:
    """Whether this may be the name of an adapter."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        return False
    return len(value.encode()) <= LONGEST and len(file_of(value).encode()) <= 2 * LONGEST


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_files(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(is_plain(k) and is_key(v) for k, v in value.items())


_RULES = {
    "name": ("a name", is_name),
    "content": ("a sha256", is_key),
    "files": ("a sha256 for each file's name", _is_files),
    "size": ("a number of bytes", lambda value: type(value) is int and value >= 0),
    "file": ("the name of a file", lambda value: value == "" or is_plain(value)),
    **dict.fromkeys(("added", "format", "method", "base", "family", "licence", "note", "sample"), ("a text", _is_text)),
    **dict.fromkeys(
        ("tags", "triggers"), ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value)))
    ),
    "preview": ("a sha256", lambda value: value == "" or is_key(value)),
    "origin": ("texts by name", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))),
}


def _printable(value: Any, also: str) -> Any:
    """The value with no character that would steer a terminal, or that no file can hold; `also` are let through."""
    if isinstance(value, str):
        return "".join(sign if sign.isprintable() or sign in also else "\ufffd" for sign in value)
    if isinstance(value, list):
        return [_printable(one, also) for one in value]
    if isinstance(value, dict):
        return {_printable(key, also): _printable(one, also) for key, one in value.items()}
    return value
