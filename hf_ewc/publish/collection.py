"""A collection on the Hub: found by its title, filled with what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from huggingface_hub import Collection
from huggingface_hub.errors import HfHubHTTPError

from ..hub import client, patiently, plain_errors


class Item(NamedTuple):
    """What a collection is to hold."""

    repo_id: str
    repo_type: str
    note: str


def find_collection(namespace: str, title: str, token: str | bool | None = None) -> Collection | None:
    """The collection of that title with all its items, also a private one."""
    with _plainly("look for the collection", namespace, title):
        listed = patiently(lambda: list(client(token).list_collections(owner=namespace)))
        slug = next((found.slug for found in listed if found.title == title), None)
        # asked for by itself, as a list shows four items of each
        return None if slug is None else patiently(partial(client(token).get_collection, slug))


def make_collection(namespace: str, title: str, description: str, token: str | bool | None = None) -> Collection:
    """A new, private collection."""
    with _plainly("make the collection", namespace, title):
        options: dict[str, Any] = dict(namespace=namespace, description=description, private=True, exists_ok=True)
        return patiently(lambda: client(token).create_collection(title, **options))


def missing_items(collection: Collection | None, items: Sequence[Item]) -> list[Item]:
    """Those that the collection does not hold yet."""
    held = {(item.item_id, item.item_type) for item in collection.items} if collection else set()
    return [item for item in items if (item.repo_id, item.repo_type) not in held]


def add_items(collection: Collection, items: Sequence[Item], token: str | bool | None = None) -> list[Item]:
    """Add items; returns those that this server does not have, or does not show to this account."""
    absent = []
    for item in items:
        with _plainly(f"add {item.repo_id} to the collection", collection.slug, ""):
            try:
                add = partial(client(token).add_collection_item, collection.slug, note=item.note, exists_ok=True)
                patiently(partial(add, item.repo_id, item.repo_type))
            except HfHubHTTPError as error:
                if error.response.status_code != 404:
                    raise
                absent.append(item)
    return absent


def show_collection(collection: Collection, token: str | bool | None = None) -> None:
    """Make it public."""
    with _plainly("make the collection public", collection.slug, ""):
        patiently(lambda: client(token).update_collection_metadata(collection.slug, private=False))


def _plainly(action: str, namespace: str, title: str) -> AbstractContextManager[None]:
    return plain_errors(action, f"{namespace}/{title}".rstrip("/"), "collection")
