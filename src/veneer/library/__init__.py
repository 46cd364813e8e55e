"""A library of adapters on this machine: a plain folder in which each content is kept once, under names of your own.

    entries/<name>.json    what is known of an adapter: name, base, method, tags, trigger words, licence, origin, hashes
    content/<sha256>/      its files, byte for byte, and SHA256SUMS, whose own sha256 is the folder's name
    unfinished/            what is being written; what a killed process left there goes with the next change
    lost/                  what `verify` found and nothing refers to
    index-1.sqlite         the entries once more, to be searched; it may be deleted at any time

An entry is there when its JSON is, which is put in place last, in one step. One process at a time changes anything.
"""

from veneer.library.entry import Entry
from veneer.library.exchange import pull, push
from veneer.library.place import folder
from veneer.library.shelf import add, find, get, listed, path_of, preview_of, remove, search, unreadable
from veneer.library.verify import Fault, verify

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
