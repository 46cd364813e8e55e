"""Base models that can be had by name, and where a name, a folder or a hub id is on this machine.

catalogue.py  what there is          cache.py   where it is kept, whole or not at all
wheel.py      how it travels         gguf.py    how it is converted
bases/        what comes with veneer
pull.py       fetch one              resolve.py, hub.py   a base as written → its folder
"""

from veneer.zoo.cache import cache_folder, folder_of, is_here
from veneer.zoo.catalogue import CATALOGUE, Base
from veneer.zoo.pull import pull
from veneer.zoo.resolve import resolve

__all__ = ["CATALOGUE", "Base", "cache_folder", "folder_of", "is_here", "pull", "resolve"]
