"""A library of adapters on this machine: a plain folder in which each content is kept once, under names of your own.

    entries/<name>.json    what is known of an adapter: name, base, method, tags, trigger words, licence, origin, hashes
    content/<sha256>/      its files, byte for byte, and SHA256SUMS, whose own sha256 is the folder's name
    unfinished/            what is being written; what a killed process left there goes with the next change
    lost/                  what `verify` found and nothing refers to
    index-1.sqlite         the entries once more, to be searched; it may be deleted at any time

An entry is there when its JSON is, which is put in place last, in one step. One process at a time changes anything.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "Entry": "entry",
    "Fault": "checking",
    "add": "adding",
    "find": "shelf",
    "folder": "place",
    "get": "shelf",
    "listed": "shelf",
    "path_of": "shelf",
    "preview_of": "shelf",
    "pull": "exchange",
    "push": "exchange",
    "remove": "adding",
    "search": "shelf",
    "unreadable": "shelf",
    "verify": "checking",
}
__all__ = [
    "Entry",
    "Fault",
    "add",
    "find",
    "folder",
    "get",
    "listed",
    "path_of",
    "preview_of",
    "pull",
    "push",
    "remove",
    "search",
    "unreadable",
    "verify",
]

if TYPE_CHECKING:
    from veneer.library.adding import add, remove
    from veneer.library.checking import Fault, verify
    from veneer.library.entry import Entry
    from veneer.library.exchange import pull, push
    from veneer.library.place import folder
    from veneer.library.shelf import find, get, listed, path_of, preview_of, search, unreadable


def __getattr__(name: str) -> object:
    """A public name, from its home: a list of adapters is there at once, without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'veneer.library' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"veneer.library.{_HOMES[name]}"), name)
    return value
