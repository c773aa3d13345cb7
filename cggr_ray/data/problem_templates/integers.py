"""Word problems about whole numbers: equations, remainders, common divisors and multiples, digits."""

from math import gcd, lcm

from cggr_ray.data.problem_templates.words import (
    COLORS,
    GOODS,
    KEEPSAKES,
    PLURALS,
    Draft,
    Draw,
    Table,
    joined,
    many,
)

INTEGERS = Table()

OPERATIONS = (
    ("adds {}", "adding {}", "-"),
    ("subtracts {}", "subtracting {}", "+"),
    ("multiplies by {}", "multiplying by {}", "/"),
    ("halves the result", "halving", "*"),
)


@INTEGERS.template(1, 2, 3, 4, 5)
def number_puzzle(rng: Draw, level: int) -> Draft:
    """A linear equation told as a chain of operations and solved backwards."""
    player = rng.person()
    value = secret = rng.between(3, 15 + 12 * level)
    words, steps, after = [], [], -1
    for _ in range(min(level + 1, 5)):
        kind = rng.between(0, 3)
        if kind == after or (kind == 1 and value < 4) or (kind == 2 and value > 400) or (kind == 3 and value % 2):
            kind = 0 if after != 0 else 1 if value >= 4 else 2
        after, amount = kind, rng.between(2, min(30, value - 1) if kind == 1 else (30, 30, 6, 2)[kind])
        told, undone, undo = OPERATIONS[kind]
        reached = (value + amount, value - amount, value * amount, value // 2)[kind]
        words.append(told.format(amount))
        steps.append(f"Before {undone.format(amount)} it was {reached} {undo} {amount} = {value}.")
        value = reached
    steps.reverse()
    question = rng.pick(
        (
            f"{player.name} thinks of a number, {joined(words)}, in this order. The outcome is {value}.",
            f"On the board stands a secret number. {player.name} {joined(words)}, one after another, and ends with "
            f"{value}.",
            f"{player.name} takes a number, {joined(words)}, each time going on with the last result. {player.He} gets "
            f"{value}.",
        )
    )
    return f"{question} What was the number at the beginning?", steps, secret


@INTEGERS.template(2, 3, 4)
def sum_and_difference(rng: Draw, level: int) -> Draft:
    """x + y = s and x - y = d."""
    first, second = rng.names(2)
    noun, small, gap = rng.pick(KEEPSAKES + GOODS), rng.between(3, 20 + 30 * level), rng.between(2, 15 + 10 * level)
    large = small + gap
    total = large + small
    question = rng.pick(
        (
            f"Together {first} and {second} own {many(total, noun)}. {first} owns {gap} more than {second}.",
            f"{first} has {gap} more {PLURALS[noun]} than {second}, and between them there are {total}.",
            f"A pile of {many(total, noun)} is split so that {second} has {gap} fewer than {first}.",
        )
    )
    steps = [
        f"Without the extra ones there would be {total} - {gap} = {many(total - gap, noun)}.",
        f"Half of that belongs to {second}: {total - gap} / 2 = {small}.",
    ]
    if level == 2:
        return f"{question} How many {PLURALS[noun]} does {second} have?", steps, small
    steps.append(f"{first} has {small} + {gap} = {many(large, noun)}.")
    if level == 3:
        return f"{question} How many {PLURALS[noun]} does {first} have?", steps, large
    each = rng.between(2, 15)
    steps.append(f"At that price they are worth {large} * {each} = {large * each} dollars.")
    question += f" Each of the {PLURALS[noun]} is worth ${each}."
    return f"{question} How many dollars is the share of {first} worth?", steps, large * each


@INTEGERS.template(2, 3, 4)
def remainders(rng: Draw, level: int) -> Draft:
    """The smallest count above a bound that leaves r in groups of a and of b: k lcm(a, b) + r."""
    leader, noun = rng.person(), rng.pick(KEEPSAKES)
    a, b = rng.some(range(4, 8 + 3 * level), 2)
    rest, common = rng.between(1, min(a, b) - 1), lcm(a, b)
    shared = gcd(a, b)
    times = 1 if level == 2 else rng.between(2, 9)
    answer = common * times + rest
    steps = [f"The least common multiple of {a} and {b} is {a} * {b} / {shared} = {common}."]
    fact = rng.pick(
        (
            f"When {leader.name} puts {PLURALS[noun]} into groups of {a}, {rest} {'is' if rest == 1 else 'are'} left "
            f"over. In groups of {b}, the same number is left over.",
            f"{leader.name} has a bag of {PLURALS[noun]}. Sorted by {a} or sorted by {b}, there is always a remainder "
            f"of {rest}.",
        )
    )
    if level == 2:
        steps.append(f"With the remainder that is {common} + {rest} = {answer}.")
        ask = f"If there are more than {max(a, b)} {PLURALS[noun]}, what is the smallest possible number of them?"
        return f"{fact} {ask}", steps, answer
    bound = common * (times - 1) + rest + rng.between(0, common - 1)
    steps.append(f"One multiple less would be {common} * {times - 1} + {rest} = {answer - common}, not above {bound}.")
    steps.append(f"The next multiple gives {common} * {times} + {rest} = {answer}.")
    if level == 3:
        return f"{fact} What is the smallest possible number above {bound}?", steps, answer
    groups = rng.between(max(a, b) + 1, 40)
    left = answer % groups
    steps.append(f"In groups of {groups} there remain {answer} - {answer // groups} * {groups} = {left}.")
    ask = f"For the smallest possible number above {bound}, how many would be left over in groups of {groups}?"
    return f"{fact} {ask}", steps, left


@INTEGERS.template(2, 3, 4, 5)
def gift_bags(rng: Draw, level: int) -> Draft:
    """The greatest common divisor by Euclid's algorithm, one remainder a step."""
    host, (one, two) = rng.person(), rng.some(KEEPSAKES, 2)
    bags = rng.between(4, 6 + 5 * level)
    first, second = rng.pick(COPRIME)
    large, small = bags * first, bags * second
    steps, a, b = [], large, small
    while a % b:
        steps.append(f"{a} - {a // b} * {b} = {a % b}.")
        a, b = b, a % b
    steps = [f"The remainder of {step.partition(' - ')[0]} is {step}" for step in steps]
    steps.append(f"As {a} / {b} = {a // b} leaves no remainder, the greatest common divisor is {b}.")
    question = rng.pick(
        (
            f"{host.name} has {many(large, one)} and {many(small, two)}. {host.He} makes as many equal gift bags as "
            "possible, with nothing left over.",
            f"All of {many(large, one)} and {many(small, two)} go into gift bags. {host.name} wants every bag to hold "
            "the same, and the number of bags to be as large as possible.",
        )
    )
    if level == 2:
        steps.append(f"So there are {large} / {first} = {many(bags, 'bag')}.")
        return f"{question} How many bags does {host.he} make?", steps, bags
    steps.append(f"Each bag holds {large} / {bags} = {many(first, one)}.")
    if level == 3:
        return f"{question} How many {PLURALS[one]} are in each bag?", steps, first
    steps.append(f"Each bag also holds {small} / {bags} = {many(second, two)}.")
    steps.append(f"Altogether a bag holds {first} + {second} = {first + second} things.")
    if level == 4:
        return f"{question} How many things are in each bag?", steps, first + second
    cost = rng.between(2, 9)
    steps.append(f"One bag is worth {first + second} * {cost} = {(first + second) * cost} dollars.")
    question += f" Every single thing costs ${cost}."
    return f"{question} How many dollars is one bag worth?", steps, (first + second) * cost


COPRIME = tuple(
    (a, b) for a in range(3, 20) for b in range(2, a) if gcd(a, b) == 1 and (a % b == 1 or b % (a % b) == 1)
)


@INTEGERS.template(2, 3, 4)
def cycles(rng: Draw, level: int) -> Draft:
    """Events that repeat meet again after the least common multiple."""
    thing, verb = rng.pick(
        (
            ("bus", "leaves"),
            ("bell", "rings"),
            ("lamp", "blinks"),
            ("fountain", "starts"),
            ("ferry", "departs"),
            ("alarm", "beeps"),
        )
    )
    place, keeper = rng.pick(("harbor", "main square", "station", "old town", "airport", "museum")), rng.person()
    count = 2 if level == 2 else 3
    periods = rng.some(range(4, 12 + 6 * level), count)
    colors = rng.some(COLORS, count)
    facts = joined([f"the {c} one {verb} every {p} minutes" for c, p in zip(colors, periods, strict=True)])
    together, steps = periods[0], []
    for other in periods[1:]:
        shared, common = gcd(together, other), lcm(together, other)
        steps.append(
            f"The greatest common divisor of {together} and {other} is {shared}: {together} / {shared} = "
            f"{together // shared}."
        )
        steps.append(f"Their least common multiple is {together // shared} * {other} = {common}.")
        together = common
    question = rng.pick(
        (
            f"At the {place} {keeper.name} watches {count} {PLURALS[thing]}: {facts}. All of them {verb[:-1]} together "
            "at noon.",
            f"{keeper.name} is in charge of {count} {PLURALS[thing]} at the {place}. Since noon, when all {count} "
            f"{verb[:-1]} at once, {facts}.",
        )
    )
    if level <= 3:
        return f"{question} After how many minutes does this happen again for the first time?", steps, together
    repeats = rng.between(2, 9)
    steps.append(
        f"The time up to meeting number {repeats} after noon is {together} * {repeats} = {together * repeats} minutes."
    )
    ask = f"How many minutes after noon do they {verb[:-1]} together for the {repeats}th time, noon not counted?"
    if repeats in (2, 3):
        ask = ask.replace(f"{repeats}th", "second" if repeats == 2 else "third")
    return f"{question} {ask}", steps, together * repeats


@INTEGERS.template(1, 2, 3)
def consecutive(rng: Draw, level: int) -> Draft:
    kind, gap = rng.pick((("consecutive whole", 1), ("consecutive even", 2), ("consecutive odd", 2)))
    count = rng.pick((3, 5, 7)) if level > 1 else 3
    middle = 2 * rng.between(4, 60 * level)
    middle += 1 if kind.endswith("odd") else rng.between(0, 1) if gap == 1 else 0
    player, total, reach = rng.person(), middle * count, gap * (count // 2)
    steps = [f"The middle number is {total} / {count} = {middle}."]
    question = rng.pick(
        (
            f"{player.name} adds up {count} {kind} numbers and gets {total}.",
            f"The page numbers on {count} cards of {player.name} are {kind} numbers with the sum {total}.",
            f"The sum of {count} {kind} numbers is {total}, as {player.name} has found out with some patience.",
        )
    )
    if level == 1:
        return f"{question} What is the middle one of these numbers?", steps, middle
    steps.append(f"The largest is {middle} + {reach} = {middle + reach}.")
    if level == 2:
        return f"{question} What is the largest of these numbers?", steps, middle + reach
    steps.append(f"The smallest is {middle} - {reach} = {middle - reach}.")
    product = (middle + reach) * (middle - reach)
    steps.append(f"Their product is {middle + reach} * {middle - reach} = {product}.")
    return f"{question} What is the product of the largest and the smallest?", steps, product


@INTEGERS.template(2, 3, 4)
def digits(rng: Draw, level: int) -> Draft:
    thinker = rng.person()
    ones, gap = rng.between(0, 7), rng.between(1, 9)
    gap = min(gap, 9 - ones)
    tens = ones + gap
    total, value = tens + ones, 10 * tens + ones
    owner = rng.pick(
        ("a locker of {}", "a bus that {} takes", "a house where {} lives", "a train seat of {}", "a team shirt of {}")
    )
    question = rng.pick(
        (
            f"The number of {owner.format(thinker.name)} has two digits with the sum {total}. The tens digit is {gap} "
            "more than the ones digit.",
            f"{thinker.name} chooses a number of two digits. Its digits add up to {total}, and the first digit is "
            f"larger than the second by {gap}.",
        )
    )
    steps = [
        f"Twice the ones digit is {total} - {gap} = {2 * ones}.",
        f"The ones digit is {2 * ones} / 2 = {ones}.",
        f"The tens digit is {ones} + {gap} = {tens}.",
        f"The number is 10 * {tens} + {ones} = {value}.",
    ]
    if level == 2:
        return f"{question} What is the number?", steps, value
    factor = rng.between(2, 9)
    if level == 3:
        steps.append(f"Multiplied, that gives {value} * {factor} = {value * factor}.")
        return f"{question} What is {factor} times this number?", steps, value * factor
    more = rng.between(3, 90)
    turned = 10 * ones + tens
    steps.append(f"With the digits exchanged it is 10 * {ones} + {tens} = {turned}.")
    gap = value - turned
    steps.append(f"The difference is {value} - {turned} = {gap}.")
    steps.append(f"The result is {gap} * {factor} + {more} = {gap * factor + more}.")
    ask = (
        f"{thinker.He} exchanges the two digits, subtracts the new number from the old one, multiplies the difference "
        f"by {factor} and adds {more}. What does {thinker.he} get?"
    )
    return f"{question} {ask}", steps, gap * factor + more
