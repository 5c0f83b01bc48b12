"""Collects the public-domain text that the model `tiny` learns from, out of Debian packages.

Each reader turns the files of one package into documents. A document carries a `group`, such as
`Ps.23`: whatever speaks of the same passage (two translations, two commentaries) shares one group,
and the split into training and held-out text is made by group, so a held-out chapter is not seen in
another translation. `tools/tiny/train_tiny.py corpus` runs this; nothing here needs torch.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import string
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 4
_FAMOUS = """
    Gen.1 Gen.2 Gen.3 Exod.20 Ps.1 Ps.8 Ps.19 Ps.23 Ps.27 Ps.46 Ps.51 Ps.90 Ps.91 Ps.100 Ps.103
    Ps.117 Ps.121 Ps.139 Ps.150 Prov.1 Prov.3 Prov.31 Eccl.1 Eccl.3 Isa.40 Isa.53 Matt.5 Matt.6
    Matt.7 Luke.2 Luke.15 John.1 John.3 John.14 Rom.8 1Cor.13 Phil.4 Heb.11 Rev.21 Rev.22
    emma.1 mansfieldpark.1 northangerabbey.1 persuasion.1 prideprejudice.1 sensesensibility.1
    state"""
ALWAYS_TRAIN = frozenset(_FAMOUS.split())
"""Passages people ask for first; they are never held out."""

_BOOKS = """Gen:Genesis Exod:Exodus Lev:Leviticus Num:Numbers Deut:Deuteronomy Josh:Joshua
    Judg:Judges Ruth:Ruth 1Sam:1_Samuel 2Sam:2_Samuel 1Kgs:1_Kings 2Kgs:2_Kings
    1Chr:1_Chronicles 2Chr:2_Chronicles Ezra:Ezra Neh:Nehemiah Esth:Esther Job:Job Ps:Psalm
    Prov:Proverbs Eccl:Ecclesiastes Song:Song_of_Solomon Isa:Isaiah Jer:Jeremiah
    Lam:Lamentations Ezek:Ezekiel Dan:Daniel Hos:Hosea Joel:Joel Amos:Amos Obad:Obadiah
    Jonah:Jonah Mic:Micah Nah:Nahum Hab:Habakkuk Zeph:Zephaniah Hag:Haggai Zech:Zechariah
    Mal:Malachi Matt:Matthew Mark:Mark Luke:Luke John:John Acts:Acts Rom:Romans
    1Cor:1_Corinthians 2Cor:2_Corinthians Gal:Galatians Eph:Ephesians Phil:Philippians
    Col:Colossians 1Thess:1_Thessalonians 2Thess:2_Thessalonians 1Tim:1_Timothy
    2Tim:2_Timothy Titus:Titus Phlm:Philemon Heb:Hebrews Jas:James 1Pet:1_Peter 2Pet:2_Peter
    1John:1_John 2John:2_John 3John:3_John Jude:Jude Rev:Revelation Tob:Tobit Jdt:Judith
    Wis:Wisdom Sir:Sirach Bar:Baruch 1Macc:1_Maccabees 2Macc:2_Maccabees 1Esd:1_Esdras
    PrMan:Prayer_of_Manasseh 3Macc:3_Maccabees 2Esd:2_Esdras 4Macc:4_Maccabees"""
BOOKS = {
    key: name.replace("_", " ") for key, _, name in (book.partition(":") for book in _BOOKS.split())
}


class CorpusError(RuntimeError):
    """The corpus could not be collected; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text: a chapter, a dictionary entry, a section of a book.

    `parts` are its verses or paragraphs in order (a missing verse is an empty string), `text` is
    what the language model reads.
    """

    source: str
    group: str
    title: str
    text: str
    parts: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether the group of this document belongs to the held-out text."""
        if self.group in ALWAYS_TRAIN:
            return False
        digest = hashlib.sha256(self.group.encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u00b4": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u2009": " ",
        "\u200b": "",
        "\ufeff": "",
        "\u00b6": "",
    }
)


def clean(text: str) -> str:
    """Plain quotes and dashes, no soft typography: what people type into a prompt."""
    text = re.sub(r"\s*\u2014\s*", "--", text).translate(PLAIN)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" +([,.;:!?])(?=\s|$)", r"\1", text)
    return re.sub(r" *\n *", "\n", text).strip()


# --- SWORD modules: Bibles and commentaries ----------------------------------------------------


def sword_entries(stem: Path, wide: bool = False) -> Iterator[tuple[str, bool]]:
    """The entries of one testament of a SWORD module, in order of its versification.

    `<stem>.?zs` lists compressed blocks as (offset, size, unpacked size), `.?zv` lists entries as
    (block, offset, length), `.?zz` holds the blocks. `wide` modules (zText4, zCom4 by chapter) have
    a 32-bit length. Yields (markup, repeated), `repeated` if the entry before is the same text.
    """
    letter = "c" if wide else "b"
    table, entries, packed = (stem.with_suffix(f".{letter}z{x}").read_bytes() for x in "svz")
    blocks = [
        zlib.decompress(packed[offset : offset + size])
        for offset, size, _ in struct.iter_unpack("<III", table)
    ]
    before: tuple[int, int] | None = None
    for block, offset, length in struct.iter_unpack("<III" if wide else "<IIH", entries):
        if length == 0:
            yield "", False
            continue
        yield blocks[block][offset : offset + length].decode("utf-8"), before == (block, offset)
        before = (block, offset)


def sword_chapters(stem: Path, wide: bool = False) -> Iterator[tuple[str, list[str]]]:
    """(osisID of the chapter, its entries from verse 1 on), repeated entries as empty strings."""
    name, verses = "", list[str]()
    for markup, repeated in sword_entries(stem, wide):
        heading = re.search(r'<chapter [^>]*osisID="([^"]+)"', markup)
        if heading and (not name or heading[1] != name):
            if name:
                yield name, verses
            name, verses = heading[1], []
        elif 'type="book"' in markup:
            if name:
                yield name, verses
            name, verses = "", []
        elif name:
            verses.append("" if repeated else markup)
    if name:
        yield name, verses


def osis_text(markup: str) -> str:
    """The words of OSIS markup without notes, tables and titles; lines of verse stay lines."""
    markup = re.sub(
        r"<(note|table|rdg|title)\b.*?</\1>", " ", markup.replace("\n", " "), flags=re.S
    )
    markup = re.sub(r"<l eID[^>]*>|<lb[^>]*>|</speaker>|</item>", "\n", markup)
    markup = re.sub(r'<div eID[^>]*type="x-p"[^>]*>|</title>', "\n\n", markup)
    return re.sub(r"\n{3,}", "\n\n", clean(html.unescape(re.sub(r"<[^>]+>", "", markup))))


def chapter_title(osis_id: str) -> str | None:
    """`Ps.23` as `Psalm 23`; None for parts outside the books named here."""
    book, _, chapter = osis_id.partition(".")
    return f"{BOOKS[book]} {chapter}" if book in BOOKS and chapter.isdigit() else None


def read_bible(root: Path, source: str, module: str, label: str, verse_end: str) -> list[Document]:
    """One document a chapter: a heading, then the verses joined by `verse_end`."""
    documents = []
    for testament in ("ot", "nt"):
        stem = root / f"usr/share/sword/modules/texts/ztext/{module}/{testament}"
        for osis_id, markup in sword_chapters(stem):
            verses = tuple(re.sub(r"\n{2,}", "\n", osis_text(verse)) for verse in markup)
            title = chapter_title(osis_id)
            if title is None or not any(verses):
                continue
            text = f"{title} ({label})\n\n" + verse_end.join(verse for verse in verses if verse)
            documents.append(Document(source, osis_id, title, text, verses))
    return documents


def read_kjv(root: Path) -> list[Document]:
    """The King James Version, a chapter a document."""
    return read_bible(root, "kjv", "engKJV2006eb", "King James Version", "\n")


def read_web(root: Path) -> list[Document]:
    """The World English Bible with the deuterocanon, a chapter a document."""
    return read_bible(root, "web", "engWEB2015eb", "World English Bible", " ")


def read_henry(root: Path) -> list[Document]:
    """Matthew Henry's Concise Commentary, a chapter a document."""
    documents = []
    for testament in ("ot", "nt"):
        stem = root / f"usr/share/sword/modules/comments/zcom/mhcc/{testament}"
        for osis_id, markup in sword_chapters(stem):
            title = chapter_title(osis_id)
            sections = tuple(text for text in (osis_text(entry) for entry in markup) if text)
            if title and sections:
                text = f"Matthew Henry on {title}\n\n" + "\n\n".join(sections)
                documents.append(Document("henry", osis_id, title, text, sections))
    return documents


def read_spurgeon(root: Path) -> list[Document]:
    """Spurgeon's own exposition in the Treasury of David, without the notes he quotes."""
    stem = root / "usr/share/sword/modules/comments/zcom/tdavid/ot"
    documents = []
    for osis_id, markup in sword_chapters(stem, wide=True):
        title = chapter_title(osis_id)
        kept = []
        for section in re.split(r"(?=<title )", " ".join(markup)):
            heading = re.match(r"<title [^>]*>([^<]*)", section)
            if heading and re.match(r"EXPL|HINT|WORK", heading[1].strip()):
                continue
            if text := osis_text(section):
                kept.append(text)
        paragraphs = tuple(p for p in "\n\n".join(kept).split("\n\n") if len(p) > 40)
        if title and paragraphs:
            text = f"The Treasury of David: {title}\n\n" + "\n\n".join(paragraphs)
            documents.append(Document("spurgeon", osis_id, title, text, paragraphs))
    return documents


# --- dictd dictionaries -------------------------------------------------------------------------


def dictd_entries(root: Path, name: str) -> Iterator[tuple[str, str]]:
    """(head word, text) of a dictd dictionary: a tab-separated index in base 64, a gzip file."""
    digits = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    folder = root / "usr/share/dictd"
    body = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    seen = set[int]()

    def number(text: str) -> int:
        value = 0
        for char in text:
            value = value * 64 + digits.index(char)
        return value

    for line in (folder / f"{name}.index").read_text("utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        offset = number(start)
        if not word.startswith("00-") and offset not in seen:
            seen.add(offset)
            yield word, body[offset : offset + number(length)].decode("utf-8", "replace")


def unwrap(text: str) -> str:
    """Joins wrapped lines into paragraphs; lines indented deeper (verse, lists) stay lines."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.expandtabs().strip("\n")):
        lines = paragraph.splitlines()
        margin = min((len(line) - len(line.lstrip()) for line in lines), default=0)
        joined = ""
        for line in lines:
            apart = len(line) - len(line.lstrip()) - margin >= 4 or len(joined.split("\n")[-1]) < 1
            joined += ("\n" if apart and joined else " ") + line.strip()
        paragraphs.append(joined.strip())
    return "\n\n".join(p for p in paragraphs if p)


def read_devil(root: Path) -> list[Document]:
    """The Devil's Dictionary, an entry a document; the verses beneath keep their lines."""
    documents = []
    for word, raw in dictd_entries(root, "devil"):
        blocks = re.split(r"\n\s*\n", raw.strip("\n").rstrip())
        text = clean("\n\n".join(verse_or_prose(block) for block in blocks))
        entry = re.match(r"([A-Z][\w'.& -]*?), ([a-z][\w.]*(?: [a-z.]+)*?\.)\s+(.+)", text, re.S)
        if entry is None:
            continue
        parts = (entry[2], *entry[3].split("\n\n"))
        documents.append(Document("devil", f"devil:{word}", entry[1].title(), text, parts))
    return documents


def verse_or_prose(block: str) -> str:
    """A block of deeply indented lines keeps them; any other is one paragraph."""
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines):
        return "\n".join(line.strip() for line in lines)
    return re.sub(r"- (?=[a-z])", "-", " ".join(line.strip() for line in lines))


def read_jargon(root: Path) -> list[Document]:
    """The Jargon File, an entry a document, without the braces of its cross-references."""
    documents = []
    for word, raw in dictd_entries(root, "jargon"):
        head, _, body = raw.strip("\n").partition("\n")
        grammar, _, rest = body.partition("\n\n")
        kind = re.search(r"\b((?:v|n|adj|adv|vi|vt|excl|pl|prov|suff|prefix)\.[ a-z,.]*)", grammar)
        text = clean(unwrap(rest)).replace("{ ", "{")
        text = re.sub(r"\{([^{}]*)\}", lambda match: match[1].strip(), text)
        if len(text) < 20:
            continue
        parts = (kind[1].strip() if kind else "", *text.split("\n\n"))
        heading = f"{clean(head)}, {parts[0]}" if parts[0] else clean(head)
        documents.append(
            Document("jargon", f"jargon:{word}", clean(head), f"{heading}\n\n{text}", parts)
        )
    return documents


# --- books --------------------------------------------------------------------------------------

NOVELS = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}


def r_strings(chunk: bytes) -> list[str]:
    """The strings of one character vector in R's serialization (a chunk of a lazy-load file).

    A chunk is a 4-byte size and a zlib stream; within, a vector is a type word (its low byte 16), a
    length, and per string a type word (9), a length and the bytes, all big-endian.
    """
    data = zlib.decompress(chunk[4:])
    start = data.find(struct.pack(">I", 0x10), 14)
    if start < 0:
        start = data.find(struct.pack(">I", 0x210), 14)
    if start < 0:
        raise CorpusError("the file of r-cran-janeaustenr has an unknown format; use version 1.0.0")
    (count,) = struct.unpack_from(">I", data, start + 4)
    offset, strings = start + 8, []
    for _ in range(count):
        size = struct.unpack_from(">i", data, offset + 4)[0]
        strings.append(data[offset + 8 : offset + 8 + max(size, 0)].decode("utf-8"))
        offset += 8 + max(size, 0)
    return strings


def r_database(path: Path) -> dict[str, bytes]:
    """name -> chunk of an R lazy-load database, by the index beside it (`.rdx`)."""
    index = gzip.decompress(path.with_suffix(".rdx").read_bytes())
    pattern = re.compile(rb"\x00\x00\x00\x0d\x00\x00\x00\x02(.{8})", re.S)
    places = [struct.unpack(">II", found) for found in pattern.findall(index)]
    names = [
        name.decode() for name in re.findall(rb"\x00\x04\x00\x09\x00{3}.([a-z]{4,})", index, re.S)
    ]
    packed = path.read_bytes()
    return {
        name: packed[offset : offset + size]
        for name, (offset, size) in zip(names[1:], places, strict=False)
        if name in NOVELS
    }


def read_austen(root: Path) -> list[Document]:
    """Jane Austen's six novels, a chapter a document."""
    chunks = r_database(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    if set(chunks) != set(NOVELS):
        raise CorpusError(f"r-cran-janeaustenr: found the novels {sorted(chunks)}, expected six")
    documents = []
    for name, chunk in chunks.items():
        text = re.sub(r"_([^_]+)_", r"\1", "\n".join(r_strings(chunk)))
        heading = re.compile(r"^(?:CHAPTER|Chapter) (?:[IVXL]+|\d+)\.?\s*$", re.M)
        for number, body in enumerate(heading.split(text)[1:], 1):
            body = re.sub(r"^(VOLUME [IV]+|THE END|FINIS|Finis)\s*$", "", body, flags=re.M)
            paragraphs = tuple(p for p in clean(unwrap(body)).split("\n\n") if p)
            title = f"{NOVELS[name]}, chapter {number}"
            whole = f"{title}\n\n" + "\n\n".join(paragraphs)
            documents.append(Document("austen", f"{name}.{number}", title, whole, paragraphs))
    return documents


def read_newton(root: Path) -> list[Document]:
    """Newton's Opticks (1730), in sections of about 6 kB, from Go's test data."""
    path = root / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"
    text = re.sub(r"_([^_]+)_", r"\1", path.read_text("utf-8"))
    text = re.sub(r"\[\w+[^\]]{0,60}\]", "", text[text.index("SIR ISAAC NEWTON'S ADVERT") :])
    paragraphs = [p for p in clean(unwrap(text)).split("\n\n") if len(p) > 60]
    sections, size = [list[str]()], 0
    for paragraph in paragraphs:
        sections[-1].append(paragraph)
        size += len(paragraph)
        if size > 6000:
            sections.append([])
            size = 0
    return [
        Document("newton", f"newton.{i}", "Opticks", "\n\n".join(section), tuple(section))
        for i, section in enumerate(sections, 1)
        if section
    ]


def read_state(root: Path) -> list[Document]:
    """The Declaration of Independence and the Constitution of the United States; never held out."""
    documents = []
    for name, title in (
        ("us-declaration", "The Declaration of Independence"),
        ("us-constitution", "The Constitution of the United States"),
    ):
        raw = gzip.decompress((root / f"usr/share/state/{name}.gz").read_bytes()).decode("utf-8")
        parts = tuple(p for p in clean(unwrap(raw)).split("\n\n") if p)
        documents.append(Document("state", "state", title, "\n\n".join(parts), parts))
    return documents


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package, what is read of it, and why that text is free."""

    name: str
    version: str
    source: str
    reader: Callable[[Path], list[Document]]
    files: str
    licence: str


PACKAGES = (
    Package(
        "sword-text-kjv",
        "14.3-1",
        "kjv",
        read_kjv,
        "usr/share/sword/modules/texts/ztext/engKJV2006eb/*",
        "public domain (the Crown's letters patent restrict printing within the United Kingdom)",
    ),
    Package(
        "sword-text-web",
        "426.0-1",
        "web",
        read_web,
        "usr/share/sword/modules/texts/ztext/engWEB2015eb/*",
        "public domain ('World English Bible' is a trademark of eBible.org)",
    ),
    Package(
        "sword-comm-mhcc",
        "2.0-1",
        "henry",
        read_henry,
        "usr/share/sword/modules/comments/zcom/mhcc/*",
        "public domain",
    ),
    Package(
        "sword-comm-tdavid",
        "2.1-1",
        "spurgeon",
        read_spurgeon,
        "usr/share/sword/modules/comments/zcom/tdavid/ot.*",
        "public domain (last volume 1885)",
    ),
    Package(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "austen",
        read_austen,
        "usr/lib/R/site-library/janeaustenr/data/Rdata.*",
        "public domain (novels of 1811-1818); the R package around them is MIT",
    ),
    Package(
        "dict-devil",
        "1.0-13.1",
        "devil",
        read_devil,
        "usr/share/dictd/devil.*",
        "public domain (1911, copyright expired)",
    ),
    Package(
        "dict-jargon",
        "4.4.7-3.1",
        "jargon",
        read_jargon,
        "usr/share/dictd/jargon.*",
        "public domain (Jargon File 4.4.7, 29 Dec 2003)",
    ),
    Package(
        "golang-1.19-src",
        "1.19.8-2",
        "newton",
        read_newton,
        "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt",
        "public domain (1730); in a package under the BSD licence",
    ),
    Package(
        "miscfiles",
        "1.5+dfsg-4",
        "state",
        read_state,
        "usr/share/state/us-declaration.gz, us-constitution.gz",
        "public domain (acts of 1776 and 1787, text of senate.gov)",
    ),
)


def fetch(package: Package, build: Path) -> Path:
    """Downloads and unpacks one package below `build`; returns its root folder."""
    archives, root = build / "deb", build / "packages" / package.name
    archives.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}_{package.version}_"
    try:
        if not list(archives.glob(f"{wanted}*.deb")):
            command = ["apt-get", "download", f"{package.name}={package.version}"]
            subprocess.run(command, cwd=archives, check=True, capture_output=True, text=True)
        (archive,) = archives.glob(f"{wanted}*.deb")
        if not root.exists():
            root.mkdir(parents=True)
            subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    except FileNotFoundError as error:
        raise CorpusError(
            f"{error.filename} is missing: the corpus comes out of Debian packages; run this stage "
            "on Debian 12 or in a debian:12 container"
        ) from error
    except (subprocess.CalledProcessError, ValueError) as error:
        raise CorpusError(
            f"cannot get {package.name} {package.version}: run `apt-get update` and try again, or "
            f"put {wanted}*.deb (from https://snapshot.debian.org) into {archives}\n"
            f"{getattr(error, 'stderr', None) or error}"
        ) from error
    return root


def collect(build: Path, packages: Iterable[Package] = PACKAGES) -> list[Document]:
    """All documents, and `sources.json` with the digests and sizes of what they came from."""
    documents, report = [], []
    for package in packages:
        found = package.reader(fetch(package, build))
        (archive,) = (build / "deb").glob(f"{package.name}_{package.version}_*.deb")
        report.append(
            {
                "package": package.name,
                "version": package.version,
                "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
                "source": package.source,
                "files": package.files,
                "licence": package.licence,
                "documents": len(found),
                "bytes": sum(len(d.text.encode()) for d in found),
                "held_out_bytes": sum(len(d.text.encode()) for d in found if d.held_out),
            }
        )
        documents.extend(found)
    (build / "sources.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return documents
