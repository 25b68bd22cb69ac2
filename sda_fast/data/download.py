"""Pictures fetched by URL: several at a time, retried, checked, and resumed where an earlier run stopped."""

from __future__ import annotations

import http.client
import io
import logging
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sda_fast.atomic import atomic_write, write_text_atomic

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 32 * 1024 * 1024
MIN_IMAGE_SIDE = 4
FAILURE_LIST = "failed.tsv"
_RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp", "BMP": ".bmp"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")
_USER_AGENT = "sda-fast (catalogue converter)"


@dataclass
class DownloadResult:
    """What is in the folder after a run.

    Attributes:
        images: item id -> picture file, of this and earlier runs.
        failures: item id -> reason, for items with addresses and no picture; also in failed.tsv in the folder.
    """

    images: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def file_stem(item_id: str) -> str:
    """A file name without suffix for an item id: the id itself where it is plain, percent-encoded otherwise."""
    return item_id if _PLAIN_NAME.fullmatch(item_id) else urllib.parse.quote(item_id, safe="").replace(".", "%2E")


def find_images(folder: str | Path, item_ids: Sequence[str]) -> dict[str, Path]:
    """Item id -> the picture in `folder` whose name without suffix is the id (see `file_stem`)."""
    by_stem = {path.stem: path for path in sorted(Path(folder).iterdir()) if not path.name.startswith(".")}
    by_stem = {stem: path for stem, path in by_stem.items() if path.suffix.lower() in {*_SUFFIXES.values(), ".jpeg"}}
    stems = ((item_id, file_stem(item_id)) for item_id in item_ids)
    return {item_id: by_stem[stem] for item_id, stem in stems if stem in by_stem}


def download_images(
    addresses: Mapping[str, Sequence[str]],
    folder: str | Path,
    *,
    retries: int = 4,
    workers: int = 8,
    timeout: float = 20.0,
    first_wait: float = 1.0,
) -> DownloadResult:
    """Fetch one picture per item into `folder`, skipping items whose picture is already there.

    Every file is checked to be a picture before it takes its name, so an interrupted run leaves nothing half done; run
    it again to go on. Failed items are tried again by the next run.

    Args:
        addresses: item id -> URLs in order of preference (http or https); the first that gives a picture is taken.
        retries: further attempts after a timeout, a broken connection or a server that is busy, per URL.
        workers: pictures fetched at a time.
        timeout: seconds without an answer.
        first_wait: seconds before the first further attempt; doubled each time, or as the server's Retry-After says.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = DownloadResult(images=find_images(folder, list(addresses)))
    missing = [item_id for item_id, urls in addresses.items() if urls and item_id not in result.images]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        tasks = {
            pool.submit(_fetch_first, addresses[item_id], folder / file_stem(item_id), retries, timeout, first_wait): (
                item_id
            )
            for item_id in missing
        }
        try:
            for task in tqdm(as_completed(tasks), total=len(tasks), desc="pictures", unit="file", disable=not tasks):
                outcome = task.result()
                if isinstance(outcome, Path):
                    result.images[tasks[task]] = outcome
                else:
                    result.failures[tasks[task]] = outcome
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    lines = [f"{item_id}\t{reason}\n" for item_id, reason in sorted(result.failures.items())]
    write_text_atomic(folder / FAILURE_LIST, "item_id\treason\n" + "".join(lines))
    if result.failures:
        logger.warning("%d of %d pictures could not be fetched: %s", len(lines), len(addresses), folder / FAILURE_LIST)
    return result


def _fetch_first(urls: Sequence[str], stem: Path, retries: int, timeout: float, first_wait: float) -> Path | str:
    reasons = []
    for url in urls:
        try:
            content = _fetch(url, retries, timeout, first_wait)
            suffix = _check_picture(content)
        except _FetchError as error:
            reasons.append(f"{url}: {error}")
            continue
        path = stem.with_name(stem.name + suffix)
        with atomic_write(path, durable=False) as temporary:
            temporary.write_bytes(content)
        return path
    return " | ".join(reasons).replace("\t", " ").replace("\n", " ")


class _FetchError(Exception):
    pass


def _opener() -> urllib.request.OpenerDirector:
    # Only http and https: a metadata file must not be able to make us read local files.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _fetch(url: str, retries: int, timeout: float, first_wait: float) -> bytes:
    if urllib.parse.urlsplit(url).scheme not in {"http", "https"}:
        raise _FetchError("not an http or https address")
    wait = first_wait
    for attempt in range(retries + 1):
        pause = wait
        try:
            request = urllib.request.Request(url, headers={"User-Agent": _USER_AGENT})
            with _opener().open(request, timeout=timeout) as response:
                content = response.read(MAX_IMAGE_BYTES + 1)
                length = response.headers.get("Content-Length")
            if len(content) > MAX_IMAGE_BYTES:
                raise _FetchError(f"more than {MAX_IMAGE_BYTES} bytes")
            if length is not None and length.isdigit() and len(content) < int(length):
                raise http.client.IncompleteRead(content, int(length) - len(content))
            return content
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}"
            retry_after = error.headers.get("Retry-After", "")
            error.close()
            if error.code not in _RETRIED_STATUS:
                raise _FetchError(reason) from error
            if retry_after.isdigit():
                pause = min(float(retry_after), 60.0)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
        except ValueError as error:
            raise _FetchError(f"not a usable address ({error})") from error
        if attempt < retries:
            time.sleep(pause)
            wait *= 2
    raise _FetchError(f"{reason}, after {retries + 1} attempts")


def _check_picture(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            suffix, size = _SUFFIXES.get(image.format or ""), image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _FetchError(f"not a picture ({error})") from error
    if suffix is None:
        raise _FetchError("a picture of another format than JPEG, PNG, GIF, WebP or BMP")
    if min(size) < MIN_IMAGE_SIDE:
        raise _FetchError(f"a placeholder of {size[0]} x {size[1]} pixels")
    return suffix
