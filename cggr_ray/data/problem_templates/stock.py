"""Word problems about things in hand: inventories over days, comparisons, packing, sharing, recipes."""

import itertools

from cggr_ray.data.problem_templates.words import (
    BAKED,
    CRATES,
    KEEPSAKES,
    PLURALS,
    PRODUCE,
    WEEKDAYS,
    Draft,
    Draw,
    Table,
    an,
    cash,
    dollars,
    from_cents,
    joined,
    many,
    price,
    total_of,
    words,
)

STOCK = Table()


STOCKS = (
    ("A bookshop", "novel", "sells", "gets a delivery of"),
    ("A bakery", "loaf", "sells", "bakes"),
    ("A library", "atlas", "lends out", "takes back"),
    ("A school", "laptop", "hands out", "receives"),
    ("A toy shop", "puzzle", "sells", "unpacks"),
    ("A garden center", "tulip", "sells", "brings in"),
    ("A bicycle shop", "helmet", "sells", "orders and receives"),
    ("A food bank", "tin", "gives away", "is given"),
    ("A warehouse", "parcel", "ships", "takes in"),
    ("A pet shop", "goldfish bowl", "sells", "stocks"),
    ("A museum", "ticket", "sells", "prints"),
    ("A farm", "pumpkin", "sells", "harvests"),
)


@STOCK.template(1, 2, 3, 4, 5)
def inventory(rng: Draw, level: int) -> Draft:
    owner, noun, out, into = rng.pick(STOCKS)
    stock = start = rng.between(15, 40 * level + 60)
    first, events, steps = rng.between(0, 6), [], []
    for turn in range((2, 2, 3, 4, 5)[level - 1]):
        day = WEEKDAYS[(first + turn) % 7]
        if level >= 4 and turn == 1:
            cases, size = rng.between(2, 9), rng.between(4, 24)
            moved = cases * size
            events.append(f"on {day} it {into} {many(cases, 'carton')} of {many(size, noun)} each")
            steps.append(f"The cartons hold {cases} * {size} = {many(moved, noun)}.")
        elif stock > 5 and (turn == 0 or rng.random() < 0.55):
            moved = -rng.between(2, stock - 2)
            events.append(f"on {day} it {out} {many(-moved, noun)}")
        else:
            moved = rng.between(2, 30 * level)
            events.append(f"on {day} it {into} {many(moved, noun)}")
        now = stock + moved
        steps.append(f"After {day} it has {stock} {'+' if moved > 0 else '-'} {abs(moved)} = {many(now, noun)}.")
        stock = now
    question = rng.pick(
        (
            f"{owner} starts with {many(start, noun)}. O{joined(events)[1:]}.",
            f"{owner} has {many(start, noun)} in stock. Then {joined(events)}.",
            f"The owner of {owner[0].lower()}{owner[1:]} counts {many(start, noun)}. After the count, "
            f"{joined(events)}.",
        )
    )
    ask = rng.pick((f"How many {PLURALS[noun]} are there in the end?", f"How many {PLURALS[noun]} does it have then?"))
    return f"{question} {ask}", steps, stock


@STOCK.template(1, 2, 3, 4, 5)
def comparison_chain(rng: Draw, level: int) -> Draft:
    people, noun = rng.names(level + 1), rng.pick(KEEPSAKES)
    held = rng.between(4, 12 + 10 * level)
    holdings, steps, facts = [held], [], [f"{people[0]} has {many(held, noun)}."]
    for before, person in itertools.pairwise(people):
        kind, last = rng.between(0, 3), holdings[-1]
        if kind == 0 and last <= 60:
            factor = rng.between(2, 4)
            now = last * factor
            word = "twice" if factor == 2 else f"{factor} times"
            facts.append(f"{person} has {word} as many {PLURALS[noun]} as {before}.")
            steps.append(f"{person} has {factor} * {last} = {many(now, noun)}.")
        elif kind == 1 and last % 2 == 0 and last > 4:
            now = last // 2
            facts.append(f"{person} has half as many as {before}.")
            steps.append(f"{person} has {last} / 2 = {many(now, noun)}.")
        elif kind == 2 and last > 4:
            less = rng.between(2, min(last - 2, 8 * level + 4))
            now = last - less
            facts.append(f"{person} has {less} fewer {PLURALS[noun]} than {before}.")
            steps.append(f"{person} has {last} - {less} = {many(now, noun)}.")
        else:
            more = rng.between(2, 8 * level + 4)
            now = last + more
            facts.append(f"{person} has {more} more than {before}.")
            steps.append(f"{person} has {last} + {more} = {many(now, noun)}.")
        holdings.append(now)
    if level > 1 and rng.random() < 0.3:
        return f"{' '.join(facts)} How many {PLURALS[noun]} does {people[-1]} have?", steps, holdings[-1]
    steps.append(f"Together they have {total_of(holdings)} {PLURALS[noun]}.")
    crowd = "both of them" if level == 1 else "all of them"
    ask = rng.pick((f"do {crowd} have together", f"do {joined(people)} own in total"))
    return f"{' '.join(facts)} How many {PLURALS[noun]} {ask}?", steps, sum(holdings)


@STOCK.template(1, 2, 3, 4)
def packing(rng: Draw, level: int) -> Draft:
    baker, noun, crate = rng.person(), rng.pick(BAKED + PRODUCE), rng.pick(CRATES)
    size, full = rng.between(4, 6 + 4 * level), rng.between(3, 8 + 8 * level)
    rest = rng.between(1, size - 1) if level >= 2 else 0
    count = size * full + rest
    spoiled = rng.between(2, 12)
    made = count + spoiled
    steps = [
        f"The number of good {PLURALS[noun]} is {made} - {spoiled} = {count}.",
        f"Full {PLURALS[crate]}: ({count} - {rest}) / {size} = {full}."
        if rest
        else f"They fill {count} / {size} = {many(full, crate)}.",
    ]
    question = rng.pick(
        (
            f"{baker.name} has {many(made, noun)} and throws away {spoiled} that are damaged. The rest are packed "
            f"{size} to {an(crate)}.",
            f"Of {many(made, noun)}, {spoiled} turn out to be bad. {baker.name} puts the good ones into "
            f"{PLURALS[crate]} that hold {size} each.",
            f"{baker.name} sorts {many(made, noun)} and sets {spoiled} aside for the animals. Every {crate} is then "
            f"filled with {size} of the others.",
        )
    )
    if level == 1:
        return f"{question} How many {PLURALS[crate]} are filled?", steps, full
    steps.append(f"Left over are {count} - {full} * {size} = {many(rest, noun)}.")
    if level == 2:
        return (
            f"{question} When no more {PLURALS[crate]} can be filled, how many {PLURALS[noun]} are left?",
            steps,
            rest,
        )
    each = rng.between(size, 3 * size)
    steps.append(f"The full {PLURALS[crate]} sell for {full} * {each} = {full * each} dollars.")
    question += f" Every full {crate} is sold for ${each}"
    if level == 3:
        steps.pop(2)
        return f"{question}. How many dollars do the full {PLURALS[crate]} bring in?", steps, full * each
    single = rng.between(1, 3)
    steps.append(
        f"Everything together brings in {full * each} + {rest} * {single} = {full * each + rest * single} dollars."
    )
    question += f" and every {noun} that is left over for ${single}."
    return f"{question} How many dollars does {baker.name} take in?", steps, full * each + rest * single


@STOCK.template(1, 2, 3, 4, 5)
def fraction_of_rest(rng: Draw, level: int) -> Draft:
    owner, noun = rng.person(), rng.pick(KEEPSAKES + BAKED)
    parts = [rng.between(2, 5) for _ in range((1, 1, 2, 2, 3)[level - 1])]
    stock = rng.between(3, 5 + 4 * level)
    for part in parts:
        stock *= part
    facts: list[str] = []
    start, steps = stock, []
    receivers = rng.some(("a sister", "a cousin", "a neighbor", "a friend", "a teacher", "the class next door"), 4)
    for part, receiver in zip(parts, receivers, strict=False):
        given = stock // part
        share = "half" if part == 2 else f"1/{part}"
        facts.append(f"{share} of {'the rest' if facts else 'them'} to {receiver}")
        steps.append(f"{receiver.capitalize()} gets {stock} / {part} = {many(given, noun)}.")
        steps.append(f"That leaves {stock} - {given} = {many(stock - given, noun)}.")
        stock -= given
    question = rng.pick(
        (
            f"{owner.name} has {many(start, noun)}. {owner.He} gives {joined(facts)}.",
            f"Out of {many(start, noun)}, {owner.name} hands {joined(facts)}.",
            f"{owner.name} counts {many(start, noun)} and decides to share: {joined(facts)}.",
        )
    )
    if level in (2, 4, 5):
        extra = rng.between(1, stock - 1)
        question += f" Then {owner.he} gives away {extra} more."
        steps.append(f"In the end there are {stock} - {extra} = {many(stock - extra, noun)}.")
        stock -= extra
    return f"{question} How many {PLURALS[noun]} does {owner.he} still have?", steps, stock


INGREDIENTS = words(
    "flour cup,sugar cup,milk cup,rice cup,oats cup,honey tablespoon,butter tablespoon,cocoa tablespoon,oil "
    "tablespoon,yeast teaspoon,salt teaspoon,cinnamon teaspoon,lentils cup,broth cup,cream cup,raisins cup"
)
DISHES = words("pancakes soup stew granola pudding bread curry risotto porridge cake")


@STOCK.template(1, 2, 3, 4, 5)
def recipe_scaling(rng: Draw, level: int) -> Draft:
    cook, dish = rng.person(), rng.pick(DISHES)
    halves = rng.between(3, 6 + 2 * level)
    serves = 2 * rng.between(1, 4)
    guests, factor = serves * halves // 2, cash(50 * halves)
    kinds = 1 if level <= 2 else 2
    chosen = [pair.split() for pair in rng.some(INGREDIENTS, kinds)]
    amounts = [2 * rng.between(1, 3) for _ in chosen]
    needed = [amount * halves // 2 for amount in amounts]
    listing = joined([f"{many(n, unit)} of {food}" for n, (food, unit) in zip(amounts, chosen, strict=True)])
    steps = [f"The recipe has to be multiplied by {guests} / {serves} = {factor}."]
    steps += [
        f"That takes {amount} * {factor} = {many(need, unit)} of {food}."
        for amount, need, (food, unit) in zip(amounts, needed, chosen, strict=True)
    ]
    question = rng.pick(
        (
            f"A recipe for {dish} for {serves} people calls for {listing}. {cook.name} cooks for {guests} people.",
            f"{cook.name} makes {dish} for {guests} people. The recipe in {cook.his} book serves {serves} and uses "
            f"{listing}.",
            f"To serve {serves} people, a recipe for {dish} asks for {listing}, but {cook.name} expects {guests} "
            "people.",
        )
    )
    food, unit = chosen[0]
    if level == 1:
        return f"{question} How many {PLURALS[unit]} of {food} are needed?", steps, needed[0]
    if level == 2:
        home = rng.between(1, needed[0] - 1)
        steps.append(f"Still missing are {needed[0]} - {home} = {many(needed[0] - home, unit)}.")
        question += f" At home there {'is' if home == 1 else 'are'} already {many(home, unit)} of {food}."
        return f"{question} How many more {PLURALS[unit]} of it are needed?", steps, needed[0] - home
    prices = [5 * rng.between(4, 30) for _ in chosen]
    tags = [f"{an(unit)} of {food} costs {price(p)}" for p, (food, unit) in zip(prices, chosen, strict=True)]
    question += f" In the shop, {joined(tags)}"
    costs = [p * need for p, need in zip(prices, needed, strict=True)]
    steps += [
        f"Buying the {food} costs {need} * {cash(p)} = {dollars(cost)}."
        for (food, _), need, p, cost in zip(chosen, needed, prices, costs, strict=True)
    ]
    total = sum(costs)
    steps.append(f"Both together cost {cash(costs[0])} + {cash(costs[1])} = {dollars(total)}.")
    if level < 5:
        return f"{question}. How many dollars do these ingredients cost?", steps, from_cents(total)
    bill = (total // 1000 + 1) * 1000
    steps.append(f"The change is {cash(bill)} - {cash(total)} = {dollars(bill - total)}.")
    ask = f"{cook.He} pays with {price(bill)}. How many dollars does {cook.he} get back?"
    return f"{question}. {ask}", steps, from_cents(bill - total)
