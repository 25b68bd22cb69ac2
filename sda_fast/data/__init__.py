"""Catalogues, pictures, interactions, splits and tables of vectors: reading, checking, writing."""

from sda_fast.atomic import (
    atomic_write,
    write_bytes_atomic,
    write_json_atomic,
    write_safetensors_atomic,
    write_text_atomic,
)
from sda_fast.data.errors import WARNING_MEANINGS, DataError
from sda_fast.data.images import load_image, noise_image
from sda_fast.data.interactions import Interactions, read_interactions
from sda_fast.data.items import Catalogue, Item, read_items, write_items
from sda_fast.data.split import Split, leave_one_out
from sda_fast.data.vectors import ItemVectors, read_item_vectors, write_item_vectors

__all__ = [
    "WARNING_MEANINGS",
    "Catalogue",
    "DataError",
    "Interactions",
    "Item",
    "ItemVectors",
    "Split",
    "atomic_write",
    "leave_one_out",
    "load_image",
    "noise_image",
    "read_interactions",
    "read_item_vectors",
    "read_items",
    "write_bytes_atomic",
    "write_item_vectors",
    "write_items",
    "write_json_atomic",
    "write_safetensors_atomic",
    "write_text_atomic",
]
