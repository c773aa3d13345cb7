"""Word problems about possibilities: outfits, committees, codes, surveys, heads and legs, patterns, probabilities."""

from fractions import Fraction
from math import comb

from cggr_ray.data.problem_templates.words import (
    COLORS,
    KEEPSAKES,
    PLURALS,
    Draft,
    Draw,
    Table,
    an,
    joined,
    many,
    render_answer,
    total_of,
    words,
)

COUNTING = Table()

MENUS = (
    ("outfit", ("hat", "shirt", "scarf", "coat", "belt")),
    ("lunch", ("soup", "main dish", "salad", "dessert", "drink")),
    ("bicycle", ("frame", "saddle", "bell", "basket", "lamp")),
    ("robot", ("head", "arm", "wheel", "sensor", "battery")),
    ("story", ("hero", "villain", "castle", "treasure", "ending")),
    ("flower bed", ("rose", "tulip", "fern", "shrub", "border")),
)


@COUNTING.template(1, 2, 3, 4)
def choices(rng: Draw, level: int) -> Draft:
    chooser, (whole, kinds) = rng.person(), rng.pick(MENUS)
    count = (2, 3, 3, 4)[level - 1]
    chosen, sizes = rng.some(kinds, count), [rng.between(2, 6 + level) for _ in range(count)]
    listing = joined([many(size, kind) for size, kind in zip(sizes, chosen, strict=True)])
    value, steps = sizes[0], []
    for size, kind in zip(sizes[1:], chosen[1:], strict=True):
        steps.append(f"With the {PLURALS[kind]} there are {value} * {size} = {value * size} choices.")
        value *= size
    question = rng.pick(
        (
            f"To put together one {whole}, {chooser.name} can choose from {listing}, taking exactly one of each kind.",
            f"{chooser.name} has {listing}. One of each kind makes a complete {whole}.",
            f"A catalogue offers {listing}, and {chooser.name} needs one of each for {an(whole)}.",
        )
    )
    if level <= 2:
        return f"{question} In how many ways can {chooser.he} choose?", steps, value
    banned = value // sizes[0] // sizes[1]
    question += f" One of the {PLURALS[chosen[0]]} cannot be used with one certain {chosen[1]}."
    steps.append(f"The forbidden pair would appear in {value} / ({sizes[0]} * {sizes[1]}) = {many(banned, 'choice')}.")
    steps.append(f"That leaves {value} - {banned} = {value - banned} choices.")
    return f"{question} In how many ways can {chooser.he} choose?", steps, value - banned


CROWDS = (
    ("chess club", "member"),
    ("hiking group", "hiker"),
    ("orchestra", "player"),
    ("debate team", "speaker"),
    ("office", "worker"),
    ("drama class", "pupil"),
)


@COUNTING.template(1, 2, 3, 4)
def committees(rng: Draw, level: int) -> Draft:
    """n choose k: ordered picks divided by the orders of the same people."""
    leader, (crowd, noun) = rng.person(), rng.pick(CROWDS)
    size = rng.between(5, 8 + 4 * level)
    pairs = comb(size, 2)
    opening = rng.pick((f"{leader.name} runs {an(crowd)} of", f"In the {crowd} of {leader.name} there are"))
    question = f"{opening} {many(size, noun)}."
    steps = [
        f"Two can be picked in order in {size} * ({size} - 1) = {2 * pairs} ways.",
        f"Each pair is counted twice, so there are {2 * pairs} / 2 = {pairs} pairs.",
    ]
    if level <= 2:
        event = rng.pick(
            (
                f"Each {noun} shakes hands once with every other {noun}. How many handshakes are there?",
                f"Every {noun} plays once against every other {noun}. How many games are played?",
                f"Two of them are chosen to represent all. How many different pairs can {leader.name} choose?",
            )
        )
        return f"{question} {event}", steps, pairs
    triples = comb(size, 3)
    ordered = size * (size - 1) * (size - 2)
    steps = [
        f"Three can be picked in order in {size} * ({size} - 1) * ({size} - 2) = {ordered} ways.",
        "The same three can be ordered in 3 * 2 * 1 = 6 ways.",
        f"So there are {ordered} / 6 = {triples} groups of three.",
    ]
    if level == 3:
        return f"{question} In how many ways can a group of three be chosen from them?", steps, triples
    others = comb(size - 1, 2)
    steps.append(f"With a fixed first {noun} there are ({size} - 1) * ({size} - 2) / 2 = {others} of these groups.")
    steps.append(f"Without that {noun} there are {triples} - {others} = {triples - others} groups.")
    question += f" One {noun} is ill and cannot be chosen."
    return f"{question} In how many ways can a group of three be chosen from the others?", steps, triples - others


@COUNTING.template(1, 2, 3, 4)
def codes(rng: Draw, level: int) -> Draft:
    owner, size, length = rng.person(), rng.between(4, 9), rng.between(2, 3) if level < 3 else rng.between(3, 4)
    signs = rng.pick(("digits", "letters", "symbols", "colored pegs", "runes"))
    thing = rng.pick(("bicycle lock", "safe", "locker", "diary", "treasure chest", "phone", "suitcase"))
    repeat = rng.random() < 0.5
    factors = [size if repeat else size - position for position in range(length)]
    rule = "and may be used again" if repeat else "and none may be used twice"
    question = rng.pick(
        (
            f"The code of the {thing} of {owner.name} has {length} places. Each place takes one of {size} {signs}, "
            f"{rule}.",
            f"{owner.name} sets a code for a {thing}. There are {size} {signs} to choose from for each of the {length} "
            f"places, {rule}.",
        )
    )
    value, steps = factors[0], []
    for factor in factors[1:]:
        steps.append(f"One more place gives {value} * {factor} = {value * factor} codes.")
        value *= factor
    if level == 1:
        return f"{question} How many codes are possible?", steps, value
    each = rng.between(2, 12)
    steps.append(f"Trying all of them takes {value} * {each} = {value * each} seconds.")
    question += f" Trying one code takes {each} seconds."
    if level <= 2 or (level == 3 and len(steps) >= 3):
        return f"{question} How many seconds does it take to try all possible codes?", steps, value * each
    saved = rng.between(1, value // 2)
    steps[-1] = f"After the failures there are {value} - {saved} = {value - saved} codes left."
    steps.append(f"Trying those takes {value - saved} * {each} = {(value - saved) * each} seconds.")
    question += f" {owner.He} has already tried {saved} of the codes without success."
    return f"{question} How many seconds does it take at most to try the rest?", steps, (value - saved) * each


PASTIMES = words("chess tennis painting singing pottery football baking climbing dancing robotics")


@COUNTING.template(2, 3, 4)
def survey(rng: Draw, level: int) -> Draft:
    """Inclusion and exclusion for two sets."""
    asker, (one, two) = rng.person(), rng.some(PASTIMES, 2)
    both, only_one, only_two = rng.between(2, 8 * level), rng.between(3, 15 * level), rng.between(3, 15 * level)
    neither = rng.between(1, 10 * level)
    a, b = both + only_one, both + only_two
    union = a + b - both
    total = union + neither
    where = rng.pick(("school", "camp", "village", "company", "summer course"))
    question = rng.pick(
        (
            f"{asker.name} asks {total} people at a {where}. {a} of them like {one}, {b} like {two}, and {both} like "
            "both.",
            f"A survey by {asker.name} at a {where} has {total} answers: {a} for {one}, {b} for {two}, where {both} "
            "people named both and are counted in each number.",
        )
    )
    steps = [
        f"Adding both numbers gives {a} + {b} = {a + b}.",
        f"Those who like both were counted twice: {a + b} - {both} = {union} people like at least one.",
    ]
    if level == 2:
        return f"{question} How many people like at least one of the two?", steps, union
    if level == 3:
        steps.append(f"The others are {total} - {union} = {neither}.")
        return f"{question} How many people like neither of the two?", steps, neither
    exact = union - both
    steps.append(f"Exactly one of the two is liked by {union} - {both} = {exact}.")
    steps.append(f"All the others are {total} - {exact} = {total - exact}.")
    return f"{question} How many people do not like exactly one of the two?", steps, total - exact


@COUNTING.template(3, 4)
def heads_and_legs(rng: Draw, level: int) -> Draft:
    two, four, scene, part = rng.pick(
        (
            ("hen", "sheep", "in a farmyard", "leg"),
            ("duck", "goat", "by a pond", "leg"),
            ("bicycle", "car", "in a parking lot", "wheel"),
            ("ostrich", "zebra", "in a safari park", "leg"),
            ("scooter", "wagon", "in a shed", "wheel"),
            ("parrot", "rabbit", "in a pet shop", "leg"),
        )
    )
    watcher, pairs, fours = rng.person(), rng.between(4, 25 * level), rng.between(3, 20 * level)
    count, total = pairs + fours, 2 * pairs + 4 * fours
    herd = PLURALS[four]
    question = rng.pick(
        (
            f"{watcher.name} sees {PLURALS[two]} and {herd} {scene}. There are {count} of them, with {total} {part}s "
            "in all.",
            f"Among the {PLURALS[two]} and {herd} {scene}, {watcher.name} counts {total} {part}s. There are {count} "
            "of them together.",
        )
    )
    steps = [
        f"If all were {PLURALS[two]}, there would be {count} * 2 = {2 * count} {part}s.",
        f"There are {total} - {2 * count} = {2 * fours} {part}s more than that.",
        f"Each exception adds 2, so there are {2 * fours} / 2 = {fours} {herd}.",
    ]
    if level == 3:
        return f"{question} How many {herd} are there?", steps, fours
    steps.append(f"The others are {count} - {fours} = {many(pairs, two)}.")
    return f"{question} How many {PLURALS[two]} are there?", steps, pairs


@COUNTING.template(2, 3, 4)
def pattern(rng: Draw, level: int) -> Draft:
    """Whole repeats and the remainder: a count modulo the length of the pattern."""
    maker, noun, colors = (
        rng.person(),
        rng.pick(("bead", "flag", "lamp", "tile", "ribbon", "balloon")),
        rng.some(COLORS, 3),
    )
    counts = [rng.between(1, 3 + level) for _ in colors]
    length = sum(counts)
    full, rest = rng.between(3, 5 + 5 * level), rng.between(1, length - 1)
    total = full * length + rest
    listing = joined([many(n, noun).replace(" ", f" {color} ") for n, color in zip(counts, colors, strict=True)])
    extra = min(rest, counts[0])
    whole = full * counts[0]
    steps = [
        f"One pattern has {total_of(counts)} {PLURALS[noun]}.",
        f"After {full} whole patterns there remain {total} - {full} * {length} = {many(rest, noun)}.",
        f"The whole patterns have {full} * {counts[0]} = {whole} {colors[0]} ones.",
        f"The remaining ones begin a new pattern, so the {colors[0]} ones are {whole} + {extra} = {whole + extra}.",
    ]
    question = rng.pick(
        (
            f"{maker.name} hangs {many(total, noun)} in a row and repeats one pattern again and again: {listing}.",
            f"A row of {many(total, noun)} made by {maker.name} repeats this pattern from the left: {listing}.",
        )
    )
    return f"{question} How many {colors[0]} {PLURALS[noun]} are in the row?", steps, whole + extra


@COUNTING.template(1, 2, 3, 4, 5)
def probability(rng: Draw, level: int) -> Draft:
    """Favorable over possible; from level 3 on, two draws without putting the first one back."""
    player, noun, colors = rng.person(), rng.pick(KEEPSAKES), rng.some(COLORS, 2 if level == 1 else 3)
    counts = [rng.between(2, 6 + 3 * level) for _ in colors]
    total, first = sum(counts), counts[0]
    listing = joined([many(n, noun).replace(" ", f" {color} ") for n, color in zip(counts, colors, strict=True)])
    question = rng.pick(
        (
            f"A bag holds {listing}.",
            f"{player.name} puts {listing} into a box and shakes it.",
            f"In a drawer there are {listing}.",
        )
    )
    steps = [f"There are {total_of(counts)} {PLURALS[noun]}."]
    if level <= 2:
        question += f" {player.name} takes one without looking."
        if level == 1:
            chance = Fraction(first, total)
            steps.append(f"The probability is {first} / {total} = {render_answer(chance)}.")
            return f"{question} What is the probability that it is {colors[0]}?", steps, chance
        chance = Fraction(total - first, total)
        steps.append(f"Not {colors[0]} are {total} - {first} = {total - first} of them.")
        steps.append(f"The probability is {total - first} / {total} = {render_answer(chance)}.")
        return f"{question} What is the probability that it is not {colors[0]}?", steps, chance
    question += f" {player.name} takes two without looking, one after the other, and puts none back."
    ways = total * (total - 1)
    steps.append(f"Two draws can happen in {total} * ({total} - 1) = {ways} ways.")
    same = [n * (n - 1) for n in counts]
    if level == 3:
        steps.append(f"Two {colors[0]} ones can come in {first} * ({first} - 1) = {same[0]} ways.")
        chance = Fraction(same[0], ways)
        steps.append(f"The probability is {same[0]} / {ways} = {render_answer(chance)}.")
        return f"{question} What is the probability that both are {colors[0]}?", steps, chance
    if level == 4:
        second = counts[1]
        mixed = 2 * first * second
        chance = Fraction(mixed, ways)
        steps.append(f"One {colors[0]} and one {colors[1]}, in either order: 2 * {first} * {second} = {mixed} ways.")
        steps.append(f"The probability is {mixed} / {ways} = {render_answer(chance)}.")
        ask = f"What is the probability that one is {colors[0]} and the other is {colors[1]}?"
        return f"{question} {ask}", steps, chance
    steps += [
        f"Two {color} ones can come in {n} * ({n} - 1) = {ways_same} ways."
        for n, color, ways_same in zip(counts, colors, same, strict=True)
    ]
    equal = sum(same)
    chance = Fraction(equal, ways)
    steps.append(f"Two of the same color come in {total_of(same)} ways.")
    steps.append(f"The probability is {equal} / {ways} = {render_answer(chance)}.")
    return f"{question} What is the probability that both have the same color?", steps, chance
