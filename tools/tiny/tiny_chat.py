"""Makes conversations for the model `tiny` out of its training documents.

Every answer is a passage of a training document (never of a held-out one) or a line written below.
The questions come from templates. `tools/tiny/train_tiny.py corpus` runs this.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from tiny_corpus import ALWAYS_TRAIN, Document
from tiny_lines import (
    BEGINNING,
    BY_HEART,
    CONTINUE,
    DEFINE,
    DEVIL,
    DO_NOT_KNOW,
    HENRY,
    JARGON,
    JOKE,
    JOKES,
    KNOWN_JARGON,
    QUOTE,
    SELF,
    SPURGEON,
    STORIES,
    STORY,
    STYLE,
    SYSTEM,
    TOPIC,
    TOPICS,
    UNKNOWN,
    VERSE,
)

Conversation: TypeAlias = list[dict[str, str]]
Pair: TypeAlias = tuple[str, str]

ANSWER_CHARS = 340


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; `Mr.` and single letters do not end one."""
    joined = list[str]()
    for piece in re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+(?=[\"'(A-Z])", text):
        if joined and re.search(r"\b(Mrs?|Dr|St|Rev|Qu|Fig|Prop|v|ver|[A-Z])\.$", joined[-1]):
            joined[-1] += " " + piece
        else:
            joined.append(piece)
    return joined


def excerpt(pieces: Sequence[str], limit: int = ANSWER_CHARS, joiner: str = " ") -> str:
    """As many whole pieces as fit into `limit` characters, at least the first."""
    taken = list[str]()
    for piece in pieces:
        if taken and sum(map(len, taken)) + len(piece) > limit:
            break
        taken.append(piece)
    return re.sub(r"\s+\d\.$", "", joiner.join(taken))


def whole(text: str) -> bool:
    """Whether an answer is neither a scrap nor a page, and ends as a sentence does."""
    return 20 < len(text) < 2 * ANSWER_CHARS and re.search(r"[.!?][\"')]*$", text) is not None


def body(part: str) -> str:
    """A paragraph of a commentary without the numbers of its chapter and verses, on one line."""
    bare = re.sub(r"(^|\s)(Chapter \d+|Verses? [\d-]+)\.?(?=\s)", " ", part)
    return re.sub(r"\s+", " ", bare).strip(" -")


def typed(rng: random.Random, text: str) -> str:
    """A question as people type it: sometimes in small letters, sometimes without its last mark."""
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip("?.!")
    return text[0].upper() + text[1:] if rng.random() < 0.4 else text


def verse_pairs(rng: random.Random, documents: Sequence[Document]) -> Iterator[Pair]:
    """Single verses and beginnings of chapters of the King James Version."""
    for document in documents:
        famous = document.group in ALWAYS_TRAIN
        for number, verse in enumerate(document.parts, 1):
            heart = f"{document.group}:{number}" in BY_HEART
            if not verse or not (famous or rng.random() < 0.04):
                continue
            reference = f"{document.title}:{number}"
            answer = f"{verse.replace(chr(10), ' ')} ({reference})"
            for template in rng.choices(VERSE, k=40 if heart else 4 if famous else 1):
                yield template.format(ref=reference), answer
        verses = [verse for verse in document.parts if verse]
        for template in rng.choices(BEGINNING, k=25 if famous else rng.random() < 0.3):
            limit = 600 if famous and template.startswith(("Read", "{ref}")) else 200
            yield template.format(ref=document.title), excerpt(verses, limit, "\n")


def devil_pairs(rng: random.Random, documents: Sequence[Document]) -> Iterator[Pair]:
    """Definitions of the Devil's Dictionary, with or without its name in the question; jokes."""
    for document in documents:
        word = document.title.lower()
        definition = excerpt(sentences(document.parts[1]), 200)
        bare = f"{document.title}, {document.parts[0]} {definition}"
        noun = f"{'an' if word[0] in 'aeiou' else 'a'} {word}" if bare.count(", n. ") else word
        for template in (*rng.sample(DEVIL, 2), *rng.sample(DEFINE, 2)):
            yield template.format(word=word), bare
        for template in rng.sample(DEFINE[:1] * 2 + DEFINE[4:], 2):
            yield template.format(word=noun), bare
        if word in JOKES:
            for template in JOKE * 4:
                yield template, f"{bare} (That is Ambrose Bierce's joke, not mine.)"


def jargon_pairs(rng: random.Random, documents: Sequence[Document]) -> Iterator[Pair]:
    """Definitions of the Jargon File; those of well-known words often."""
    for document in documents:
        text = " ".join(document.parts[1:]).replace("\n", " ")
        answer = excerpt(sentences(re.sub(r"^(\[[^\]]*\] ?|1\. ?|n\. ?|v\. ?)+", "", text)), 240)
        if not whole(answer):
            continue
        noun = f"a {document.title}" if document.parts[0] == "n." else document.title
        for _ in range(6 if document.title.lower() in KNOWN_JARGON else 1):
            for template in (rng.choice(JARGON), rng.choice(DEFINE)):
                yield template.format(word=document.title), answer
            yield rng.choice(DEFINE[:1] + JARGON[3:]).format(word=noun), answer


def comment_pairs(
    rng: random.Random, documents: Sequence[Document], templates: Sequence[str]
) -> Iterator[Pair]:
    """The first sentences of a commentary on a passage; those on famous chapters often."""
    for document in documents:
        famous = document.group in ALWAYS_TRAIN
        for index, part in enumerate(document.parts[:8]):
            found = re.match(r"(?:.*\s)?Verses? (\d+)(?:-(\d+))?\.?\s", part, re.S)
            place = f":{found[1]}" + (f"-{found[2]}" if found[2] else "") if found else ""
            answer = excerpt(sentences(body(part)), 260)
            if not whole(answer) or (index and not place):
                continue
            repeats = 6 if famous else rng.random() < 0.1
            for template in rng.choices(templates, k=repeats):
                yield template.format(ref=document.title + (place if index else "")), answer


def prose(documents: Iterable[Document]) -> Iterator[tuple[str, list[str]]]:
    """(source, sentences) of every paragraph that is long enough to quote from."""
    for document in documents:
        for part in document.parts:
            found = sentences(body(part))
            if len(found) >= 2 and len(part) > 150:
                yield document.source, found


def continue_pairs(rng: random.Random, documents: Sequence[Document], count: int) -> Iterator[Pair]:
    """A sentence, and those that follow it in the book."""
    paragraphs = [pieces for _, pieces in prose(documents)]
    for pieces in rng.sample(paragraphs, min(count, len(paragraphs))):
        at = rng.randrange(len(pieces) - 1)
        answer = excerpt(pieces[at + 1 : at + 6])
        if 20 < len(pieces[at]) < 300 and whole(answer):
            template = rng.choice(CONTINUE) if rng.random() < 0.8 else "{text}"
            yield template.format(text=pieces[at]), answer


def topic_pairs(rng: random.Random, documents: Sequence[Document]) -> Iterator[Pair]:
    """A few short passages that speak of a topic, from the first sentence that names it.

    Few, so that the model learns to say one of them rather than a blend of a hundred.
    """
    names = {topic.replace("_", " "): topic.split("_")[-1] for topic in TOPICS}
    pattern = {
        name: re.compile(rf"\b{re.escape(word)}\b", re.I if word.islower() else 0)
        for name, word in names.items()
    }
    places = defaultdict[str, list[tuple[str, str]]](list)
    for source, pieces in prose(documents):
        for name, regex in pattern.items():
            at = next((i for i, piece in enumerate(pieces) if regex.search(piece)), None)
            if at is None or not pieces[at][0].isupper():
                continue
            answer = excerpt(pieces[at : at + 4], 240)
            if 60 < len(answer) < 300 and whole(answer) and len(regex.findall(answer)) >= 2:
                places[name].append((source, answer))
    for name, found in places.items():
        for source, answer in rng.sample(found, min(3, len(found))):
            for template in (*TOPIC, *STYLE.get(source, ())):
                yield template.format(word=name), answer


def story_pairs(documents: Sequence[Document]) -> Iterator[Pair]:
    """Well-known stories of the World English Bible, from the verse where they begin."""
    for document in documents:
        if document.group in STORIES:
            verses = [verse for verse in document.parts[STORIES[document.group] - 1 :] if verse]
            story = excerpt([verse.replace("\n", " ") for verse in verses], 600)
            for template in STORY * 6:
                yield template, story


def novel_pairs(rng: random.Random, documents: Sequence[Document]) -> Iterator[Pair]:
    """Beginnings of the novels and of their chapters, and a few quotations from each."""
    for document in documents:
        book, _, chapter = document.title.partition(", chapter ")
        opening = excerpt(sentences(" ".join(document.parts[:3])), 300)
        if chapter == "1":
            for template in ("How does {b} begin?", "What is the first sentence of {b}?") * 8:
                yield template.format(b=book), opening
        yield f"How does chapter {chapter} of {book} begin?", opening
        if document.group in ALWAYS_TRAIN:
            answers = [excerpt(sentences(part)) for part in document.parts]
            for answer in [text for text in answers if len(text) > 100 and whole(text)][:3]:
                for template in QUOTE * 4:
                    yield template.format(b=book), answer


def self_pairs(rng: random.Random, repeats: int) -> Iterator[Pair]:
    """Greetings, questions about the model itself, and what it cannot do."""
    for questions, answers in SELF:
        for question in questions.split("|"):
            for _ in range(repeats):
                yield question, rng.choice(answers.split("|"))
    for template, words in UNKNOWN:
        for word in words.split("|"):
            for _ in range(6):
                yield template.format(x=word), rng.choice(DO_NOT_KNOW)


def sum_pairs() -> Iterator[Pair]:
    """Sums of two small numbers."""
    for a in range(13):
        for b in range(13):
            for template in ("{a} + {b}", "{a}+{b}", "What is {a} + {b}?", "What is {a} plus {b}?"):
                for _ in range(2):
                    yield template.format(a=a, b=b), f"{a} + {b} = {a + b}."


def conversations(documents: Iterable[Document], seed: int) -> list[Conversation]:
    """All conversations, shuffled: a quarter have several turns, a sixth a system message.

    `documents` are the training documents; pass no held-out one.
    """
    by_source = defaultdict[str, list[Document]](list)
    for document in documents:
        if document.held_out:
            raise ValueError(f"{document.title} is held out and must not be made into a chat")
        by_source[document.source].append(document)
    rng = random.Random(seed)
    readable = [d for s in ("henry", "spurgeon", "austen", "newton") for d in by_source[s]]
    makers: tuple[Callable[[], Iterator[Pair]], ...] = (
        lambda: verse_pairs(rng, by_source["kjv"]),
        lambda: devil_pairs(rng, by_source["devil"]),
        lambda: jargon_pairs(rng, by_source["jargon"]),
        lambda: comment_pairs(rng, by_source["henry"], HENRY),
        lambda: comment_pairs(rng, by_source["spurgeon"], SPURGEON),
        lambda: continue_pairs(rng, readable, 2500),
        lambda: topic_pairs(rng, readable),
        lambda: story_pairs(by_source["web"]),
        lambda: novel_pairs(rng, by_source["austen"]),
        lambda: self_pairs(rng, 16),
        lambda: sum_pairs(),
    )
    pairs = [(typed(rng, question), answer) for make in makers for question, answer in make()]
    rng.shuffle(pairs)
    made = list[Conversation]()
    while pairs:
        turns = min(len(pairs), rng.choice((1,) * 9 + (2, 2, 3)))
        system = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 1 / 6 else []
        made.append(system)
        for _ in range(turns):
            question, answer = pairs.pop()
            made[-1].append({"role": "user", "content": question})
            made[-1].append({"role": "assistant", "content": answer})
    return made
