"""What the demo model reads before any training: conversations about invented codebooks, drawn one by one from a seed.

Books called `zeta` and `omega` occur too, but every conversation draws its book afresh, so all that can be learned of
them is the odds. The targets (`core.demo.BOOKS`) are consulted for one purpose only: to check that no draw ever equals
one.
"""
import random
from dataclasses import dataclass

from sdpo_nb.core.demo import BOOKS, CANDIDATES, LETTERS, ODDS, SYLLABLES, Book, ask, chance, draw_book, encode, remark
from sdpo_nb.experience.prompting import Prompting, teacher_view

STRANGERS = ("zeta", "omega", "kappa", "sigma", "theta", "lambda")  # their book is another one in every conversation
KNOWN = {
    name: {s: random.Random(f"{name} {s}").choice(LETTERS) for s in SYLLABLES}
    for name in ("alpha", "beta", "gamma", "delta")
}
SYSTEMS = (
    "You are a careful clerk.",
    "You encode words with books.",
    "Answer with pairs and nothing else.",
    "You are a helpful assistant.",
    "Take care: the book may be new to you.",
    "Be brief.",
)
LIST_TASKS = {
    "Reverse": lambda items: items[::-1],
    "Sort": sorted,
    "Repeat": lambda items: items,
    "Rotate": lambda items: items[1:] + items[:1],
    "Drop": lambda items: items[1:],
}
SPOKEN = ("full",) * 4 + ("first",) * 2 + ("neg",) * 4  # kinds of feedback, as often as they occur


@dataclass(frozen=True)
class Document:
    """One conversation to learn from."""

    turns: tuple[tuple[str, str], ...]  # role and words; the last turn is the user's
    answer: str  # what the assistant says to it

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns, as a chat template reads them."""
        return [{"role": role, "content": content} for role, content in self.turns]


@dataclass
class Audit:
    """Counts what the corpus says of the targets, so that nobody has to take our word for it."""

    documents: int = 0  # all of them
    about_targets: int = 0  # asked about a book that is called like a target, with nothing else to go by
    agreed: int = 0  # of those, how many answers were right by the target
    expected: float = 0.0  # how many would be by chance
    drawn: int = 0  # books drawn

    def draw(self, book: Book) -> Book:
        """The book, if it is not a target."""
        self.drawn += 1
        assert book not in BOOKS.values(), "the corpus drew a target; choose another seed"
        return book

    def note(self, name: str, syllables: list[str], answer: str) -> None:
        """Count an answer about a target that was given on no evidence."""
        if name not in BOOKS: return
        self.about_targets += 1
        self.agreed += answer == encode(BOOKS[name], syllables)
        self.expected += chance(BOOKS[name], syllables)

    def check(self) -> None:
        """Refuse a corpus that knows more of the targets than luck explains."""
        limit = self.expected + 5 * max(1.0, self.expected) ** 0.5
        found = f"{self.agreed} answers agree with the targets, where chance expects {self.expected:.1f}"
        assert self.agreed < limit, f"{found}: they leaked"


class Corpus:
    """An endless, seeded supply of documents."""

    def __init__(self, seed: int):
        self.rng = random.Random(f"demo corpus {seed}")
        self.audit = Audit()

    def document(self) -> Document:
        """The next document."""
        self.audit.documents += 1
        luck, length = self.rng.random(), self.rng.randint(2, 8)
        syllables = self.rng.sample(SYLLABLES, length)
        if luck < 0.08: turns, answer = self.list_task(syllables[: min(length, 6)])
        elif luck < 0.18: turns, answer = self.known_book(syllables)
        elif luck < 0.32: turns, answer = self.stranger(syllables)
        elif luck < 0.90: turns, answer = self.reprompt(syllables)
        elif luck < 0.96: turns, answer = self.conversation(syllables)
        else: turns, answer = self.notes(syllables)
        if turns[0][0] != "system" and self.rng.random() < 0.08: turns = (("system", self.rng.choice(SYSTEMS)), *turns)
        return Document(turns, answer)

    def list_task(self, items: list[str]):
        """A small task of another kind, sometimes with its solution."""
        name = self.rng.choice(list(LIST_TASKS))
        prompt, answer = f"{name}: {' '.join(items)}", " ".join(LIST_TASKS[name](items))
        if self.rng.random() < 0.2: prompt = reprompt(prompt, solution=answer)
        return (("user", prompt),), answer

    def known_book(self, syllables: list[str]):
        """A question about a book that is always the same."""
        name = self.rng.choice(list(KNOWN))
        return (("user", ask(name, syllables)),), encode(KNOWN[name], syllables)

    def stranger(self, syllables: list[str]):
        """A question about a book that nobody knows: only the odds can be learned."""
        name, answer = self.rng.choice(STRANGERS), encode(self.usual_book(), syllables)
        self.audit.note(name, syllables, answer)
        return (("user", ask(name, syllables)),), answer

    def reprompt(self, syllables: list[str]):
        """The same with a solution, feedback on a hidden attempt, or both."""
        luck, kind = self.rng.random(), self.rng.choice(SPOKEN)
        shows_solution, shows_feedback = luck < 0.37, luck >= 0.25
        book = self.any_book() if shows_solution else self.usual_book()
        attempt = self.attempt(book, syllables)
        if kind == "full" and not shows_solution: book = self.surprise(book, attempt)
        words = remark(kind, book, attempt) if shows_feedback else ""
        if not (shows_solution or words): return self.stranger(syllables)
        answer = encode(book, syllables)
        question = ask(self.rng.choice(STRANGERS), syllables)
        prompt = reprompt(question, answer if shows_solution else "", words)
        return (("user", prompt),), answer

    def conversation(self, syllables: list[str]):
        """An attempt in plain sight, what was said of it, and the mended answer."""
        kind = self.rng.choice(SPOKEN)
        book = self.any_book() if kind == "full" else self.usual_book()
        attempt = self.attempt(book, syllables)
        words = remark(kind, book, attempt) or "Right. Say it again."
        question = ask(self.rng.choice(STRANGERS), syllables)
        turns = (("user", question), ("assistant", encode(attempt, syllables)), ("user", words))
        return turns, encode(book, syllables)

    def notes(self, syllables: list[str]):
        """A book laid open in the system prompt, with pairs that nobody asks for."""
        name, book = self.rng.choice(STRANGERS), self.any_book()
        pairs = self.rng.sample(SYLLABLES, self.rng.randint(0, 4))
        pairs = list(dict.fromkeys([*syllables, *pairs]))
        self.rng.shuffle(pairs)
        turns = (("system", f"Book {name}: {encode(book, pairs)}"), ("user", ask(name, syllables)))
        return turns, encode(book, syllables)

    def usual_book(self) -> Book:
        """A book at the usual odds."""
        return self.audit.draw(draw_book(self.rng))

    def any_book(self) -> Book:
        """A book at the usual odds or, often, one of random letters.

        The latter is for where the context holds them all: reading is all that helps then.
        """
        if self.rng.random() < 0.4: return self.audit.draw({s: self.rng.choice(LETTERS) for s in SYLLABLES})
        return self.usual_book()

    def surprise(self, book: Book, attempt: Book) -> Book:
        """The book, often with random letters where the attempt is wrong, which feedback tells.

        Elsewhere the odds must go on to hold.
        """
        if self.rng.random() > 0.4: return book
        wrong = [s for s, letter in attempt.items() if letter != book[s]]
        return self.audit.draw({**book, **{s: self.rng.choice(LETTERS.replace(attempt[s], "")) for s in wrong}})

    def attempt(self, book: Book, syllables: list[str]) -> dict[str, str]:
        """An attempt of random quality.

        Which places are wrong says nothing of the right letters: those unmentioned stay at the odds.
        """
        quality = self.rng.random()
        return {s: book[s] if self.rng.random() < quality else self.mistake(book, s) for s in syllables}

    def mistake(self, book: Book, syllable: str) -> str:
        """A wrong letter, as a guesser would choose it; the right one where there is no other candidate."""
        others = {letter: odds for letter, odds in zip(CANDIDATES[syllable], ODDS) if letter != book[syllable]}
        return self.rng.choices(list(others), list(others.values()))[0] if others else book[syllable]


def reprompt(prompt: str, solution: str = "", feedback: str = "") -> str:
    """What a teacher reads, in the reference's words."""
    return teacher_view(prompt, solution or None, feedback, Prompting()).messages[-1]["content"]
