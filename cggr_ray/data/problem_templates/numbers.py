"""Word problems about relations of quantities: percentages, ratios, averages, ages, sequences."""

from itertools import pairwise

from cggr_ray.data.problem_templates.words import (
    KEEPSAKES,
    PLURALS,
    Draft,
    Draw,
    Table,
    joined,
    many,
    total_of,
)

NUMBERS = Table()

POPULATIONS = (
    ("The village of {}", "people"),
    ("A club led by {}", "members"),
    ("The video channel of {}", "followers"),
    ("A choir founded by {}", "singers"),
    ("The bee hives of {}", "bees"),
    ("A forest named after {}", "trees"),
    ("The newsletter of {}", "readers"),
    ("The school of {}", "pupils"),
)


@NUMBERS.template(1, 2, 3, 4, 5)
def percent_change(rng: Draw, level: int) -> Draft:
    """Percentages in a row multiply; the start is drawn so that every year ends on a whole number."""
    (owner, noun), years = rng.pick(POPULATIONS), (1, 1, 2, 2, 3)[level - 1]
    size = start = 10 ** max(years, 2) * rng.between(2, 30)
    steps, events = [], []
    for year in range(years):
        percent, grows = 10 * rng.between(1, 6), rng.random() < 0.6
        change = size * percent // 100
        word = rng.pick(("grows", "rises")) if grows else rng.pick(("shrinks", "falls"))
        events.append(
            f"{('in the first year', 'in the second year', 'in the third year')[year]} it {word} by {percent}%"
        )
        steps.append(f"The change is {size} * {percent} / 100 = {change}.")
        now = size + change if grows else size - change
        steps.append(f"The number becomes {size} {'+' if grows else '-'} {change} = {now}.")
        size = now
    place = owner.format(rng.person().name)
    question = rng.pick(
        (
            f"{place} has {start} {noun}. The number changes from year to year: {joined(events)}.",
            f"{place} counts {start} {noun}. Records follow the number: {joined(events)}.",
        )
    )
    if level not in (2, 5):
        return f"{question} How many {noun} are there after that?", steps, size
    extra = rng.between(2, 99)
    steps.append(f"With the newcomers there are {size} + {extra} = {size + extra}.")
    question += f" After that {extra} more arrive at once."
    return f"{question} How many {noun} are there in the end?", steps, size + extra


@NUMBERS.template(1, 2, 3, 4)
def ratio_sharing(rng: Draw, level: int) -> Draft:
    count = 2 if level <= 2 else 3
    names, noun = rng.names(count), rng.pick((*KEEPSAKES, "dollar"))
    shares = rng.some(range(1, 6 + level), count)
    unit = rng.between(2, 6 + 6 * level)
    parts, total = sum(shares), sum(shares) * unit
    steps = [
        f"There are {total_of(shares)} equal parts.",
        f"One part is {total} / {parts} = {many(unit, noun)}.",
    ]
    ratio = ":".join(map(str, shares))
    question = rng.pick(
        (
            f"{joined(names)} share {many(total, noun)} in the ratio {ratio}, in this order.",
            f"{many(total, noun)} are divided among {joined(names)} so that their shares are as {ratio}.",
            f"For helping with the harvest, {joined(names)} receive {many(total, noun)} and split them {ratio}.",
        )
    )
    who = rng.between(0, count - 1)
    if level == 1:
        got = shares[who] * unit
        steps.append(f"{names[who]} gets {shares[who]} * {unit} = {many(got, noun)}.")
        return f"{question} How many {PLURALS[noun]} does {names[who]} get?", steps, got
    most, least = shares.index(max(shares)), shares.index(min(shares))
    large, small = shares[most] * unit, shares[least] * unit
    steps.append(f"{names[most]} gets {shares[most]} * {unit} = {many(large, noun)}.")
    if level == 4:
        gift = rng.between(1, large - 1)
        question += f" Then {names[most]} gives {gift} of the {PLURALS[noun]} to {names[least]}."
        steps.append(f"{names[least]} first gets {shares[least]} * {unit} = {many(small, noun)}.")
        steps.append(f"After the gift {names[least]} has {small} + {gift} = {many(small + gift, noun)}.")
        return f"{question} How many {PLURALS[noun]} does {names[least]} have now?", steps, small + gift
    steps.append(f"{names[least]} gets {shares[least]} * {unit} = {many(small, noun)}.")
    steps.append(f"The difference is {large} - {small} = {many(large - small, noun)}.")
    ask = f"How many more {PLURALS[noun]} does {names[most]} get than {names[least]}?"
    return f"{question} {ask}", steps, large - small


SCORES = (
    ("spelling test", "points"),
    ("archery round", "points"),
    ("bowling game", "points"),
    ("quiz", "points"),
    ("delivery day", "parcels"),
    ("reading day", "pages"),
    ("fruit-picking day", "baskets"),
    ("typing test", "words"),
)


@NUMBERS.template(1, 2, 3, 4)
def average(rng: Draw, level: int) -> Draft:
    player, (event, unit) = rng.person(), rng.pick(SCORES)
    events, count = event + "s" if event[-1] != "z" else "quizzes", rng.between(3, 3 + level)
    mean = rng.between(35, 60 + 10 * level)
    ahead = [0, *(rng.between(-15, 15) for _ in range(count - 1)), 0]
    scores = [mean + after - before for before, after in pairwise(ahead)]
    known = scores if level == 1 else scores[:-1]
    seen = joined([str(score) for score in known])
    if level == 1:
        question = rng.pick(
            (
                f"In {count} {events}, {player.name} reached {seen} {unit}.",
                f"{player.name} writes down the results of {count} {events}: {seen} {unit}.",
            )
        )
        total = sum(scores)
        steps = [f"The sum is {total_of(scores)}.", f"The average is {total} / {count} = {mean}."]
        return f"{question} What is the average number of {unit}?", steps, mean
    question = rng.pick(
        (
            f"The results of {player.name} in the first {count - 1} {events} were {seen} {unit}.",
            f"After {count - 1} {events}, the notebook of {player.name} shows {seen} {unit}.",
        )
    )
    so_far, wanted = sum(known), mean * count
    steps = [
        f"So far the sum is {total_of(known)}.",
        f"For the wanted average the sum must be {mean} * {count} = {wanted}.",
        f"The next result must be {wanted} - {so_far} = {wanted - so_far}.",
    ]
    if level <= 3:
        ask = f"How many {unit} must the next result be to make the average of all {count} exactly {mean}?"
        return f"{question} {ask}", steps, wanted - so_far
    record = max(known)
    question += f" With the next one {player.he} wants the average of all {count} to be {mean}."
    difference = abs(record - scores[-1])
    big, small = max(record, scores[-1]), min(record, scores[-1])
    steps.append(f"Its distance from the best result so far is {big} - {small} = {difference}.")
    ask = "By how much does the result needed for that differ from the best result so far?"
    return f"{question} {ask}", steps, difference


@NUMBERS.template(1, 2, 3, 4)
def ages(rng: Draw, level: int) -> Draft:
    young, old, other = rng.names(3)
    age, factor = rng.between(4, 9 + 2 * level), rng.between(2, 5)
    years, gap = rng.between(2, 15), rng.between(2, 12)
    elder = age * factor
    word = "twice" if factor == 2 else f"{factor} times"
    if level <= 2:
        question = rng.pick(
            (
                f"{young} is {age} years old, and {old} is {word} as old.",
                f"{old} is {word} as old as {young}, who turned {age} this month.",
            )
        )
        steps = [f"{old} is {factor} * {age} = {elder} years old."]
        if level == 1:
            steps.append(f"In {years} years {old} will be {elder} + {years} = {elder + years}.")
            return f"{question} How old will {old} be in {years} years?", steps, elder + years
        steps.append(f"In {years} years, {young} will be {age} + {years} = {age + years}.")
        steps.append(f"By then {old} will be {elder} + {years} = {elder + years}.")
        both = age + elder + 2 * years
        steps.append(f"The sum of their ages will be {age + years} + {elder + years} = {both}.")
        return f"{question} What will be the sum of their ages in {years} years?", steps, both
    third = age + gap if level == 4 else 0
    total = age + elder + third
    units = factor + 1 + (level == 4)
    people = f"{young} and {old}" if level == 3 else f"{young}, {old} and {other}"
    question = f"{people} are {total} years old together. {old} is {word} as old as {young}."
    steps = []
    rest = total
    if level == 4:
        question += f" {other} is {gap} years older than {young}."
        rest = total - gap
        steps.append(f"If {other} were as old as {young}, the sum would be {total} - {gap} = {rest}.")
    steps.append(
        f"Measured in the age of {young}, the sum is {' + '.join(['1', str(factor), '1'][: level - 1])} = {units}."
    )
    steps.append(f"{young} is {rest} / {units} = {age} years old.")
    steps.append(f"In {years} years {young} will be {age} + {years} = {age + years}.")
    return f"{question} How old will {young} be in {years} years?", steps, age + years


ROWS = (
    ("theater", "row", "seat"),
    ("stadium", "row", "seat"),
    ("pyramid of cans", "layer", "can"),
    ("vineyard", "row", "vine"),
    ("stack of logs", "layer", "log"),
    ("marching band", "line", "player"),
    ("brick wall", "course", "brick"),
)


@NUMBERS.template(1, 2, 3, 4, 5)
def arithmetic_rows(rng: Draw, level: int) -> Draft:
    """a_n = a_1 + (n - 1) d and the sum n (a_1 + a_n) / 2."""
    owner, (thing, row, unit) = rng.person(), rng.pick(ROWS)
    first, gap, count = rng.between(4, 20 + 5 * level), rng.between(1, 3 + level), rng.between(5, 8 + 6 * level)
    last, grown = first + (count - 1) * gap, (count - 1) * gap
    total = count * (first + last) // 2
    question = rng.pick(
        (
            f"A {thing} that {owner.name} designs has {count} {PLURALS[row]}. The first {row} has {many(first, unit)}, "
            f"and every further {row} has {gap} more than the one before.",
            f"{owner.name} plans a {thing}: {many(first, unit)} in the first {row} and {gap} more in each {row} that "
            f"follows, {count} {PLURALS[row]} in all.",
        )
    )
    steps = [
        f"From the first to the last {row} the number grows by ({count} - 1) * {gap} = {grown}.",
        f"The last {row} has {first} + {grown} = {many(last, unit)}.",
    ]
    if level <= 2:
        return f"{question} How many {PLURALS[unit]} are in the last {row}?", steps, last
    steps.append(f"First and last together make {first} + {last} = {first + last}.")
    steps.append(f"The sum is {count} * {first + last} / 2 = {total} {PLURALS[unit]}.")
    if level == 3:
        return f"{question} How many {PLURALS[unit]} are there altogether?", steps, total
    away = rng.between(2, total // 3)
    steps.append(f"Without the missing ones there are {total} - {away} = {total - away} {PLURALS[unit]}.")
    question += f" For a passage, {away} of the planned {PLURALS[unit]} are left out."
    if level == 4:
        return f"{question} How many {PLURALS[unit]} does it really have?", steps, total - away
    cost = rng.between(2, 15)
    steps.append(f"They cost {total - away} * {cost} = {(total - away) * cost} dollars.")
    question += f" One {unit} costs ${cost}."
    return f"{question} How many dollars do all the {PLURALS[unit]} cost?", steps, (total - away) * cost


GROWERS = (
    ("A patch of pond weed covers {} square meters", "square meter", "week"),
    ("A culture starts with {} cells", "cell", "hour"),
    ("A rumor is known to {} people", "person", "day"),
    ("A chain letter reaches {} homes in its first week", "home", "week"),
    ("A game gives {} coins for the first level", "coin", "level"),
    ("A jar receives {} beads on the first day", "bead", "day"),
)


@NUMBERS.template(1, 2, 3, 4, 5)
def growth(rng: Draw, level: int) -> Draft:
    """A geometric sequence written out; from level 4 on, its sum."""
    text, noun, time = rng.pick(GROWERS[4:] if level >= 4 else GROWERS[:3])
    first, factor, rounds = rng.between(2, 20 + 10 * level), rng.between(2, 4), (2, 2, 3, 3, 4)[level - 1]
    verb = {2: "doubles", 3: "triples", 4: "is multiplied by 4"}[factor]
    values, steps = [first], []
    for turn in range(2, rounds + 2):
        values.append(values[-1] * factor)
        if level >= 4:
            steps.append(f"For {time} number {turn} it is {values[-2]} * {factor} = {values[-1]}.")
        else:
            steps.append(f"After {many(turn - 1, time)} it is {values[-2]} * {factor} = {values[-1]}.")
    observer = rng.person()
    watcher = rng.pick((f"{observer.name} keeps a diary about it.", f"{observer.name} checks the count every {time}."))
    opening = f"{text.format(first)}, and the number {verb} with every {time}."
    question = rng.pick((f"{opening} {watcher}", f"{opening} It was {observer.name} who noticed this pattern."))
    if level >= 4:
        steps.append(f"The sum is {total_of(values)} {PLURALS[noun]}.")
        return (
            f"{question} How many {PLURALS[noun]} are counted in the first {len(values)} {PLURALS[time]} together?",
            steps,
            sum(values),
        )
    if level == 2:
        gone = rng.between(1, values[-1] - values[-2])
        steps.append(f"After the loss it is {values[-1]} - {gone} = {values[-1] - gone}.")
        question += f" At the end of {time} number {rounds}, {gone} of them are lost again."
        return f"{question} What is the number then?", steps, values[-1] - gone
    return f"{question} What is the number after {many(rounds, time)}?", steps, values[-1]
