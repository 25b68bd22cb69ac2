"""Every command of docs/tutorial.md, run in a shell on small raw files in the published forms.

What differs from the page is here: three commands that install, the values of MODEL and STEPS, and the raw files, whose
pictures a server on this machine has.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sda_fast.cli import COMMANDS, main
from sda_fast.data import read_interactions, read_items
from sda_fast.data.vectors import read_item_vectors

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
INSTALLING = ["python3 -m venv .venv", "source .venv/bin/activate", "pip install torch", "pip install ."]
# About twenty processes, each of which imports PyTorch.
pytestmark = pytest.mark.timeout(1800)
NUM_ITEMS, NUM_USERS, PER_USER = 130, 60, 12
WITHOUT_PICTURE = "P007"


def blocks() -> list[list[str]]:
    return [block.strip().splitlines() for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)]


class PictureHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/").split(".")[0]
        if name == WITHOUT_PICTURE:
            return self.answer(404, b"gone")
        buffer = io.BytesIO()
        number = int(name[1:])
        Image.new("RGB", (56, 56), (number, 255 - number, 40)).save(buffer, format="PNG")
        self.answer(200, buffer.getvalue())

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def picture_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), PictureHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def write_rows(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("".join(row + "\n" for row in rows).encode()))


def write_raw_files(folder: Path, url: str) -> None:
    """The six files that the page names, in their published forms: Python literals, JSON, JSON with parents."""
    names = [f"P{n:03d}" for n in range(NUM_ITEMS)]
    words = ("rose", "mint", "coal", "sun", "silk")
    titles = [f"{words[n % 5]} cream number {n}" for n in range(NUM_ITEMS)]
    pictures = [f"{url}/{name}.png" for name in names]
    # Going round and round through the items, so that everything is bought at least five times.
    order = [names[7 * place % NUM_ITEMS] for place in range(NUM_USERS * PER_USER)]
    taken = [(f"U{place // PER_USER}", name, place) for place, name in enumerate(order)]
    rows_2014 = [
        repr(
            {"asin": name, "title": title, "imUrl": picture, "brand": "B", "categories": [["Beauty", title.split()[0]]]}
        )
        for name, title, picture in zip(names, titles, pictures, strict=True)
    ]
    rows_2018 = [
        json.dumps({"asin": name, "title": title, "category": ["Beauty"], "imageURLHighRes": [picture], "also_buy": []})
        for name, title, picture in zip(names, titles, pictures, strict=True)
    ]
    rows_2023 = [
        json.dumps({"parent_asin": name, "title": title, "images": [{"large": picture, "variant": "MAIN"}]})
        for name, title, picture in zip(names, titles, pictures, strict=True)
    ]
    reviews = [
        json.dumps({"reviewerID": user, "asin": item, "overall": 5.0, "unixReviewTime": 1_400_000_000 + time})
        for user, item, time in taken
    ]
    reviews_2023 = [
        json.dumps({"user_id": user, "parent_asin": item, "rating": 5.0, "timestamp": 1_600_000_000_000 + time})
        for user, item, time in taken
    ]
    write_rows(folder / "raw" / "meta_Beauty.json.gz", rows_2014)
    write_rows(folder / "raw" / "reviews_Beauty_5.json.gz", reviews)
    write_rows(folder / "raw" / "meta_All_Beauty.json.gz", rows_2018)
    write_rows(folder / "raw" / "All_Beauty_5.json.gz", reviews)
    write_rows(folder / "raw" / "meta_All_Beauty.jsonl.gz", rows_2023)
    write_rows(folder / "raw" / "All_Beauty.jsonl.gz", reviews_2023)
    (folder / "pictures").mkdir()
    for name in names[:10]:
        Image.new("RGB", (30, 30), "blue").save(folder / "pictures" / f"{name}.jpg")


def small_model(folder: Path) -> Path:
    from sda_fast.data.items import Catalogue, Item
    from sda_fast.lvlm.tiny import build_tiny_lvlm

    catalogue = Catalogue([Item(f"i{n}", {"title": f"rose cream number {n}", "brand": "B"}, None) for n in range(8)])
    return build_tiny_lvlm(
        catalogue, folder / "model", pretrain_steps=0, hidden_size=64, num_layers=1, image_side=56, vocab_size=400
    )


@dataclass(frozen=True)
class Followed:
    """The folder in which the page was followed, and what each command said."""

    folder: Path
    said: list[tuple[str, str]]
    changed_by_second_start: list[str]

    def words_of(self, start: str) -> str:
        return "".join(words for command, words in self.said if command.startswith(start))


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, picture_server: str) -> Followed:
    folder = tmp_path_factory.mktemp("tutorial")
    write_raw_files(folder, picture_server)
    settings = {"MODEL": str(small_model(folder)), "STEPS": "3"}
    here = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment = {
        **here,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    said: list[tuple[str, str]] = []
    changed: list[str] = []
    for command in (command for block in blocks() for command in block):
        if command in INSTALLING:
            continue
        named = re.fullmatch(r"export (\w+)=(\S+)", command)
        if named:
            environment[named[1]] = settings[named[1]]
            continue
        again = any(command == earlier for earlier, _ in said)
        before = file_times(folder / "runs")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        if again:
            after = file_times(folder / "runs")
            changed += [name for name in after if after[name] != before.get(name)]
        said.append((command, done.stdout + done.stderr))
    return Followed(folder, said, changed)


def file_times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_page_runs_every_step_and_installs_by_known_commands() -> None:
    commands = [command for block in blocks() for command in block]
    assert blocks()[0] == INSTALLING
    used = {command.split()[1] for command in commands if command.startswith("sda-fast")}
    assert used == {"convert", "plan", "finetune", "embed", "recommend", "report", "run", "export"}
    allowed = (*INSTALLING, "export ", "sda-fast ", "cat ", "head ", "grep ")
    assert [command for command in commands if not command.startswith(allowed)] == []
    assert [c for c in commands if c.startswith("export ")] == [
        "export MODEL=Qwen/Qwen2.5-VL-7B-Instruct",
        "export STEPS=4000",
    ]


def test_all_three_versions_and_both_sources_of_pictures_become_catalogues(followed: Followed) -> None:
    expected = {"beauty": NUM_ITEMS - 1, "beauty-2018": NUM_ITEMS - 1, "beauty-2023": NUM_ITEMS - 1}
    expected |= {"beauty-my-pictures": 10, "beauty-text": 0}
    for name, pictures in expected.items():
        catalogue = read_items(followed.folder / "data" / name / "items.jsonl")
        log = read_interactions(followed.folder / "data" / name / "interactions.tsv", catalogue)
        assert (len(catalogue), len(log)) == (NUM_ITEMS, NUM_USERS * PER_USER), name
        assert sum(item.image is not None and item.image.is_file() for item in catalogue) == pictures, name
    assert f"{WITHOUT_PICTURE}\t" in followed.words_of("cat data/beauty/images/failed.tsv")


def test_the_plan_says_what_fits(followed: Followed) -> None:
    assert "fits 12 GiB" in followed.words_of("sda-fast plan")


def test_a_second_start_of_fine_tuning_changes_nothing(followed: Followed) -> None:
    assert followed.changed_by_second_start == []
    assert "is finished already" in followed.words_of("sda-fast finetune")


def test_the_vectors_are_those_of_every_item_and_tuning_changed_them(followed: Followed) -> None:
    before, after = (
        read_item_vectors(followed.folder / "runs" / name / "vectors.safetensors") for name in ("zero-shot", "sda")
    )
    assert before.item_ids == after.item_ids and len(after) == NUM_ITEMS
    assert (abs(before.text - after.text).max(axis=1) > 0).all()


def test_it_ends_with_a_table_of_hit_at_10_and_loras(followed: Followed) -> None:
    table = followed.words_of('grep "Hit@10"')
    for line in ("popularity", "item-to-item transitions", "none (ID only)", "zero-shot", "SDA"):
        assert line in table, line
    assert re.search(r"SASRec \| SDA \| \*{0,2}0\.\d{4} ± 0\.\d{4}", table)
    assert "Hit@10" in (followed.folder / "runs" / "all" / "report" / "report.md").read_text(encoding="utf-8")
    for which in ("image", "text"):
        assert (followed.folder / "runs" / "exported" / f"lora-{which}" / "adapter_model.safetensors").is_file()


def test_every_option_that_the_page_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
    known = set(re.findall(r"--[a-z0-9][a-z0-9-]*", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z0-9][a-z0-9-]*", PAGE))
    assert named <= known, named - known


def test_every_linked_page_exists() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
