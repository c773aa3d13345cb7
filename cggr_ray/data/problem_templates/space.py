"""Word problems about lengths, areas, volumes and units: cutting, plots, tanks, paths, tiles, candles."""

from cggr_ray.data.problem_templates.words import (
    PLURALS,
    Draft,
    Draw,
    Table,
    an,
    cash,
    dollars,
    from_cents,
    many,
    price,
    words,
)

SPACE = Table()

UNITS = (
    ("meter", "centimeter", 100, "ribbon", "piece"),
    ("foot", "inch", 12, "rope", "piece"),
    ("yard", "foot", 3, "cable", "piece"),
    ("kilogram", "gram", 1000, "flour", "portion"),
    ("pound", "ounce", 16, "coffee", "packet"),
    ("liter", "milliliter", 1000, "juice", "glass"),
    ("gallon", "quart", 4, "paint", "can"),
    ("gallon", "pint", 8, "milk", "jug"),
    ("cup", "tablespoon", 16, "honey", "jar"),
)


@SPACE.template(1, 2, 3, 4, 5)
def unit_portions(rng: Draw, level: int) -> Draft:
    owner, (big, small, ratio, stuff, portion) = rng.person(), rng.pick(UNITS)
    amount = rng.between(3, 10 + 6 * level)
    rolls = rng.between(2, 5) if level >= 3 else 1
    whole = amount * rolls * ratio
    choices = [size for size in PORTIONS if whole > 3 * size and ratio // 50 < size < 2 * ratio]
    size = rng.pick(choices)
    used = whole % size + (size * rng.between(0, 1) if level >= 2 else 0)
    if level >= 2:
        used = used or size
    count = (whole - used) // size
    steps = []
    lots = f"{rolls} lots of {many(amount, big)}" if rolls > 1 else many(amount, big)
    question = rng.pick(
        (
            f"{owner.name} has {lots} of {stuff}. One {big} is {ratio} {PLURALS[small]}.",
            f"There {'are' if amount > 1 else 'is'} {lots} of {stuff} in the storeroom of {owner.name}. Note that 1 "
            f"{big} equals {ratio} {PLURALS[small]}.",
        )
    )
    if rolls > 1:
        steps.append(f"All of it is {rolls} * {amount} = {many(rolls * amount, big)}.")
    steps.append(f"In {PLURALS[small]} that is {amount * rolls} * {ratio} = {whole}.")
    if used:
        question += f" First {owner.he} uses {many(used, small)} for something else."
        steps.append(f"What is left is {whole} - {used} = {many(whole - used, small)}.")
    question += (
        f" The rest is divided into {PLURALS[portion]} of {many(size, small)} each."
        if used
        else (f" All of it is divided into {PLURALS[portion]} of {many(size, small)} each.")
    )
    steps.append(f"That makes {whole - used} / {size} = {many(count, portion)}.")
    if level <= 3:
        return f"{question} How many {PLURALS[portion]} are there?", steps, count
    each = 5 * rng.between(4, 40)
    steps.append(f"Sold at that price they bring in {count} * {cash(each)} = {dollars(count * each)}.")
    question += f" Each {portion} is sold for {price(each)}."
    if level == 4:
        return f"{question} How many dollars does {owner.he} take in?", steps, from_cents(count * each)
    cost = 5 * rng.between(count * each // 20, count * each // 10)
    steps.append(f"The profit is {cash(count * each)} - {cash(cost)} = {dollars(count * each - cost)}.")
    question += f" All of the {stuff} was bought for {price(cost)}."
    return f"{question} How many dollars of profit does {owner.he} make?", steps, from_cents(count * each - cost)


PORTIONS = (2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 20, 25, 30, 40, 50, 75, 120, 125, 150, 200, 250)
PLOTS = words("garden,field,schoolyard,vineyard,playground,meadow,courtyard,vegetable plot,dog park,orchard")


@SPACE.template(1, 2, 3, 4, 5)
def rectangle_plot(rng: Draw, level: int) -> Draft:
    owner, plot = rng.person(), rng.pick(PLOTS)
    wide = rng.between(4, 10 + 8 * level)
    long = wide + rng.between(1, 10 + 6 * level)
    gate, meter = rng.between(1, 4), rng.between(3, 12 + 3 * level)
    around = 2 * (long + wide)
    question = rng.pick(
        (
            f"The {plot} of {owner.name} is a rectangle, {long} meters long and {wide} meters wide.",
            f"{owner.name} looks after a rectangular {plot} of {long} meters by {wide} meters.",
            f"A rectangular {plot} measures {long} by {wide} meters and belongs to {owner.name}.",
        )
    )
    if level == 1 and rng.random() < 0.5:
        steps = [f"The area is {long} * {wide} = {long * wide} square meters."]
        return f"{question} How many square meters of grass fit on it if grass covers all of it?", steps, long * wide
    steps = [f"The way around it is 2 * ({long} + {wide}) = {around} meters."]
    if level == 1:
        return f"{question} How many meters of fence are needed to go once around it?", steps, around
    steps.append(f"Without the gate the fence is {around} - {gate} = {around - gate} meters long.")
    question += f" A fence goes around it, except for a gate of {many(gate, 'meter')}."
    if level == 2:
        return f"{question} How many meters of fence are needed?", steps, around - gate
    cost = (around - gate) * meter
    steps.append(f"The fence costs {around - gate} * {meter} = {cost} dollars.")
    question += f" Each meter of fence costs ${meter}."
    if level == 3:
        return f"{question} How many dollars does the fence cost?", steps, cost
    seed = rng.between(1, 5)
    area = long * wide
    steps.append(f"The area is {long} * {wide} = {area} square meters.")
    steps.append(f"The grass costs {area} * {seed} = {area * seed} dollars.")
    steps.append(f"Fence and grass cost {cost} + {area * seed} = {cost + area * seed} dollars.")
    question += f" Grass for the whole inside costs ${seed} for a square meter."
    total = cost + area * seed
    if level == 4:
        return f"{question} How many dollars do the fence and the grass cost together?", steps, total
    fund = (total // 100 + rng.between(1, 5)) * 100
    steps.append(f"Of the money there remain {fund} - {total} = {dollars(100 * (fund - total))}.")
    return f"{question} From ${fund}, how many dollars remain after paying for both?", steps, fund - total


@SPACE.template(1, 2, 3, 4, 5)
def water_tank(rng: Draw, level: int) -> Draft:
    owner, vessel = rng.person(), rng.pick(words("tank trough aquarium basin cistern planter tub"))
    long, wide, high = 10 * rng.between(4, 9 + 2 * level), 10 * rng.between(3, 9), 10 * rng.between(3, 9)
    base, liters = long * wide, long * wide * high // 1000
    steps = [
        f"The {vessel} holds {long} * {wide} * {high} = {base * high} cubic centimeters.",
        f"That is {base * high} / 1000 = {liters} liters.",
    ]
    question = rng.pick(
        (
            f"{an(vessel).capitalize()} in the shape of a box is {long} centimeters long, {wide} centimeters wide and "
            f"{high} centimeters high. It belongs to {owner.name}.",
            f"{owner.name} owns a box-shaped {vessel} with inner sides of {long}, {wide} and {high} centimeters, the "
            "last being its height.",
        )
    )
    question += " One liter is 1000 cubic centimeters."
    if level == 1:
        return f"{question} How many liters does it hold?", steps, liters
    depth = 10 * rng.between(1, high // 10 - 1)
    inside = base * depth // 1000
    missing = liters - inside
    steps.append(f"The water already in it is {long} * {wide} * {depth} / 1000 = {inside} liters.")
    steps.append(f"Missing are {liters} - {inside} = {missing} liters.")
    question += f" Water stands {depth} centimeters deep in it."
    if level == 2:
        return f"{question} How many more liters does it take to fill it?", steps, missing
    speed = rng.pick([rate for rate in range(2, 31) if missing % rate == 0] or [missing])
    leak = rng.between(1, 5) if level >= 4 else 0
    question += f" A tap lets in {speed + leak} liters a minute."
    if leak:
        question += f" A crack lets {many(leak, 'liter')} a minute run out."
        steps.append(f"Each minute the water grows by {speed + leak} - {leak} = {speed} liters.")
    minutes = missing // speed
    steps.append(f"Filling it takes {missing} / {speed} = {many(minutes, 'minute')}.")
    if level <= 4:
        return f"{question} How many minutes does it take until it is full?", steps, minutes
    question += f" {owner.He} lets the tap run until the {vessel} is full."
    lost = minutes * leak
    steps.append(f"In that time the crack loses {minutes} * {leak} = {many(lost, 'liter')}.")
    return f"{question} How many liters run out through the crack meanwhile?", steps, lost


@SPACE.template(3, 4, 5)
def garden_path(rng: Draw, level: int) -> Draft:
    owner, inner = rng.person(), rng.pick(("pond", "lawn", "flower bed", "pool", "herb garden", "rose bed"))
    long, wide, path = rng.between(6, 15 + 5 * level), rng.between(4, 12 + 4 * level), rng.between(1, 3)
    big_long, big_wide = long + 2 * path, wide + 2 * path
    outer, inside = big_long * big_wide, long * wide
    area = outer - inside
    steps = [
        f"With the path the length is {long} + 2 * {path} = {big_long} meters.",
        f"With the path the width is {wide} + 2 * {path} = {big_wide} meters.",
        f"The outer rectangle covers {big_long} * {big_wide} = {outer} square meters.",
        f"The {inner} itself covers {long} * {wide} = {inside} square meters.",
        f"The path covers {outer} - {inside} = {area} square meters.",
    ]
    question = rng.pick(
        (
            f"A rectangular {inner} is {long} meters long and {wide} meters wide. {owner.name} lays a path "
            f"{many(path, 'meter')} wide all around it.",
            f"{owner.name} builds a path of {many(path, 'meter')} in width around {an(inner)} of {long} by {wide} "
            "meters. Both the inner and the outer edge of the path are rectangles.",
        )
    )
    if level == 3:
        return f"{question} How many square meters does the path cover?", steps, area
    stones = rng.between(4, 25)
    steps.append(f"That takes {area} * {stones} = {area * stones} stones.")
    question += f" Every square meter of the path takes {stones} stones."
    if level == 4:
        return f"{question} How many stones are needed for the path?", steps, area * stones
    have = rng.between(20, area * stones // 2)
    steps.append(f"Still to be bought are {area * stones} - {have} = {area * stones - have} stones.")
    question += f" {have} stones are already there."
    return f"{question} How many more stones are needed?", steps, area * stones - have


ROOMS = words("kitchen,hallway,bathroom,classroom,terrace,dining hall,lobby,studio,balcony,cellar")


@SPACE.template(2, 3, 4, 5)
def floor_tiles(rng: Draw, level: int) -> Draft:
    owner, room, side = rng.person(), rng.pick(ROOMS), rng.pick((20, 25, 30, 40, 50))
    across, down = rng.between(6, 8 + 4 * level), rng.between(5, 7 + 4 * level)
    tiles = across * down
    steps = [
        f"Along one side there are {across * side} / {side} = {across} tiles.",
        f"Along the other side there are {down * side} / {side} = {down} tiles.",
        f"The floor takes {across} * {down} = {tiles} tiles.",
    ]
    question = rng.pick(
        (
            f"{owner.name} covers the floor of a {room} with square tiles of {side} centimeters. The floor is "
            f"{across * side} centimeters long and {down * side} centimeters wide.",
            f"The floor of a {room} measures {across * side} by {down * side} centimeters. {owner.name} chooses square "
            f"tiles with sides of {side} centimeters.",
        )
    )
    if level == 2:
        return f"{question} How many tiles cover the floor?", steps, tiles
    spare = rng.between(2, 20)
    need = tiles + spare
    steps.append(f"With the spare tiles it takes {tiles} + {spare} = {need}.")
    question += f" {owner.He} wants {spare} spare tiles as well."
    if level == 3:
        return f"{question} How many tiles does {owner.he} need?", steps, need
    pack, cost = rng.between(6, 24), rng.between(8, 45)
    packs = -(-need // pack)
    steps.append(f"One pack fewer than {packs} would give only ({packs} - 1) * {pack} = {(packs - 1) * pack} tiles.")
    steps.append(f"The {packs} packs have {packs} * {pack} = {packs * pack} tiles, which is enough.")
    steps.append(f"The price is {packs} * {cost} = {packs * cost} dollars.")
    question += f" Tiles come in packs of {pack} at ${cost} a pack."
    if level == 4:
        return f"{question} How many dollars does {owner.he} have to spend on tiles?", steps, packs * cost
    pay = rng.between(20, 400)
    steps.append(f"With the work it is {packs * cost} + {pay} = {packs * cost + pay} dollars.")
    question += f" Laying them costs another ${pay}."
    return f"{question} How many dollars does the new floor cost?", steps, packs * cost + pay


PAIRS = (
    ("red candle", "blue candle", "centimeter", "burns down by", "an hour", "hour"),
    ("tall bucket", "wide bucket", "cup", "loses", "a minute", "minute"),
    ("north reservoir", "south reservoir", "foot", "drops by", "a week", "week"),
    ("first battery", "second battery", "unit", "loses", "an hour", "hour"),
    ("old tank", "new tank", "liter", "drains by", "a minute", "minute"),
)


@SPACE.template(2, 3, 4)
def leveling(rng: Draw, level: int) -> Draft:
    """Two falling lines that cross: gap divided by the difference of the slopes."""
    high, low, unit, falls, per, time = rng.pick(PAIRS)
    moment, slow, gap = rng.between(3, 5 + 4 * level), rng.between(1, 6), rng.between(1, 5)
    fast = slow + gap
    meet = rng.between(2, 20 + 10 * level)
    start, other = meet + fast * moment, meet + slow * moment
    steps = [
        f"At first the difference is {start} - {other} = {many(start - other, unit)}.",
        f"It shrinks by {fast} - {slow} = {many(gap, unit)} {per}.",
        f"They are equal after {start - other} / {gap} = {many(moment, time)}.",
    ]
    begin = rng.pick(("At noon", "In the beginning", "At the start of an experiment", "When the clock starts"))
    question = rng.pick(
        (
            f"{begin} {an(high)} is at {many(start, unit)} and {falls} {many(fast, unit)} {per}. A {low} is at "
            f"{many(other, unit)} and {falls} {many(slow, unit)} {per}.",
            f"{an(high).capitalize()} and {an(low)} are compared. {begin} they are at {start} and {other} "
            f"{PLURALS[unit]}. The {high} {falls} {many(fast, unit)} {per}, the {low} {falls} {many(slow, unit)} "
            f"{per}.",
        )
    )
    if level < 4:
        return f"{question} After how many {PLURALS[time]} are both at the same level?", steps, moment
    steps.append(f"At that time both are at {start} - {fast} * {moment} = {many(meet, unit)}.")
    return f"{question} At how many {PLURALS[unit]} do they stand when both are equal?", steps, meet
