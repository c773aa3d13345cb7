"""Words, numbers and the random source that the problem templates share.

A template is a function `(rng, level) -> (question, steps, answer)`, collected by a `Table`; it counts in `int` (money
in cents) and reaches for `Fraction` only where the mathematics does. Names, nouns and phrasings are drawn here, so that
grammar is decided in one place: `many` for number agreement, `Person` for pronouns, `joined` for lists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Person(NamedTuple):
    """A name and the pronouns that go with it."""

    name: str
    he: str
    him: str
    his: str
    He: str
    His: str


class Draw(Random):
    """The standard generator with draws of fractions of a microsecond (`randint` and `choice` take several times as
    long). The bias of scaling one 53-bit uniform is below 1e-12 for every range used here.
    """

    def between(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self.random() * len(items))]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different members, in random order; `items` must be at least that many, none repeated."""
        chosen: list[Item] = []
        while len(chosen) < count:
            item = items[int(self.random() * len(items))]
            if item not in chosen:
                chosen.append(item)
        return chosen

    def person(self) -> Person:
        return PEOPLE[int(self.random() * len(PEOPLE))]

    def names(self, count: int) -> list[str]:
        return [person.name for person in self.some(PEOPLE, count)]


Draft = tuple[str, list[str], int | Fraction]
Builder = Callable[[Draw, int], Draft]


@dataclass(frozen=True)
class Template:
    name: str
    levels: tuple[int, ...]
    build: Builder


@dataclass(frozen=True)
class Table:
    """Templates of one domain, in the order in which they are written."""

    rows: list[Template] = field(default_factory=list)

    def template(self, *levels: int) -> Callable[[Builder], Builder]:
        def register(build: Builder) -> Builder:
            self.rows.append(Template(build.__name__, levels, build))
            return build

        return register


def render_answer(value: Fraction) -> str:
    """The one spelling of a number: an integer, else a decimal of at most two places, else a fraction in lowest terms.

    12 -> "12", 25/2 -> "12.5", 3/4 -> "0.75", 2/3 -> "2/3", 1/8 -> "1/8"; no trailing zeros, no thousands separator.
    It looks at the value alone, so $7.50 and a probability of 15/2 % are spelled alike.
    """
    if value.denominator == 1:
        return str(value.numerator)
    if 100 % value.denominator:
        return f"{value.numerator}/{value.denominator}"
    sign = "-" if value < 0 else ""
    return sign + cash(abs(value.numerator) * (100 // value.denominator))


def cash(cents: int) -> str:
    """Hundredths as a bare decimal, the spelling of `render_answer`: 1250 -> "12.5"."""
    whole, rest = divmod(cents, 100)
    return f"{whole}.{rest:02d}".rstrip("0") if rest else str(whole)


def dollars(cents: int) -> str:
    return f"{cash(cents)} {'dollar' if cents == 100 else 'dollars'}"


def from_cents(cents: int) -> int | Fraction:
    return Fraction(cents, 100) if cents % 100 else cents // 100


def price(cents: int) -> str:
    """Money as a price tag: 1250 -> "$12.50", 1200 -> "$12"."""
    whole, rest = divmod(cents, 100)
    return f"${whole}.{rest:02d}" if rest else f"${whole}"


def words(text: str) -> tuple[str, ...]:
    """The words of a text, or its phrases where they are parted by commas."""
    return tuple(text.split("," if "," in text else None))


class Plurals(dict[str, str]):
    def __missing__(self, noun: str) -> str:
        if noun.endswith(("s", "x", "ch", "sh")):
            plural = noun + "es"
        elif noun.endswith("y") and noun[-2] not in "aeiou":
            plural = noun[:-1] + "ies"
        else:
            plural = noun + "s"
        self[noun] = plural
        return plural


PLURALS = Plurals(
    child="children",
    person="people",
    foot="feet",
    sheep="sheep",
    shelf="shelves",
    loaf="loaves",
    tomato="tomatoes",
    potato="potatoes",
    mango="mangoes",
    box="boxes",
    scarf="scarves",
    hero="heroes",
)


def many(count: int | str, noun: str) -> str:
    """The count and its noun in agreement: `many(1, "box")` is "1 box", `many(3, "box")` is "3 boxes"."""
    return f"{count} {noun if count in (1, '1') else PLURALS[noun]}"


def an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' or noun == 'hour' else 'a'} {noun}"


def joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def total_of(values: Sequence[int]) -> str:
    return f"{' + '.join(map(str, values))} = {sum(values)}"


def clock(minutes: int) -> str:
    hour, minute = divmod(minutes, 60)
    return f"{(hour - 1) % 12 + 1}:{minute:02d} {'a.m.' if hour < 12 else 'p.m.'}"


WOMEN = words(
    "Abigail Adaeze Aisha Alma Amara Anika Annika Asha Beatriz Bella Camila Carmen Celia Chiara Clara Daphne Delia "
    "Dora Edith Elena Elif Esther Fatima Freya Gemma Greta Hana Helga Ida Imani Ines Ingrid Irene Isla Jia Joan "
    "Jocelyn Kavya Keiko Lena Leila Lucia Maeve Malia Marta Mei Mira Nadia Naomi Nell Nina Noor Odette Olga Paloma "
    "Petra Priya Rosa Ruth Sadie Salma Sanna Selma Sofia Suki Tamar Tessa Uma Vera Wanda Xenia Yara Yuki Zara Zoya"
)
MEN = words(
    "Adrian Ahmed Akira Alonso Anders Andre Anton Arjun Basil Bruno Caleb Callum Casper Cyrus Dario Davit Desmond "
    "Diego Dmitri Edgar Elias Emeka Emil Enzo Farid Felix Gabor Gideon Hassan Hugo Ibrahim Igor Ivan Jamal Jonas "
    "Joaquin Kai Karim Kenji Kofi Lars Leon Liam Luca Magnus Malik Marco Mateo Milo Nikhil Noah Olaf Omar Oscar Otto "
    "Pablo Pavel Quentin Rafael Rashid Ravi Rohan Samir Simon Stefan Tariq Theo Tomas Ulrich Viktor Walter Wesley "
    "Yusuf Zane"
)
PEOPLE = tuple(
    [Person(name, "she", "her", "her", "She", "Her") for name in WOMEN]
    + [Person(name, "he", "him", "his", "He", "His") for name in MEN]
)

GOODS = words(
    "notebook mug candle lamp scarf basket puzzle novel plant kite vase cushion umbrella teapot wallet hat jar ruler "
    "poster frame blanket torch bowl apron brush clock mirror backpack bracelet tray stool bottle"
)
KEEPSAKES = words(
    "sticker marble stamp coin seashell postcard badge bead button card magnet ribbon shell photo comic pebble "
    "keychain acorn feather crayon bookmark token"
)
PRODUCE = words(
    "apple pear orange lemon peach plum mango onion carrot potato tomato cabbage pumpkin melon turnip pepper lime "
    "cucumber beet radish"
)
BAKED = words("muffin bun loaf cookie pie cupcake roll scone pretzel bagel waffle tart brownie")
CRATES = words("box crate bag basket tray carton sack bin")
PARTS = words("bolt gear spring valve hinge bracket lens switch chip toy bottle screw bulb battery")
SHOPS = words(
    "the market,the corner shop,the flea market,the school fair,a garage sale,the department store,the museum shop,the "
    "craft fair,a little shop in town,the street market,the station shop,the village shop"
)
PLACES = words(
    "the lake,the coast,the mountains,the airport,the next city,the old castle,the national park,the harbor,the "
    "family farm,the stadium,the observatory,the border,the conference,the summer camp"
)
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COLORS = words("red blue green yellow purple orange white black pink silver")
