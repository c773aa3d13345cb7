"""Word problems about rates: journeys, meetings, fuel, laps, maps, shared work, machines, mixtures."""

from fractions import Fraction

from cggr_ray.data.problem_templates.words import (
    PLACES,
    PLURALS,
    Draft,
    Draw,
    Table,
    cash,
    dollars,
    from_cents,
    joined,
    many,
    price,
    render_answer,
    total_of,
    words,
)

TRAVEL = Table()

WAYS = (("walks", 3, 6), ("cycles", 11, 24), ("drives", 40, 95), ("takes the train", 70, 160), ("sails", 8, 20))


@TRAVEL.template(1, 2, 3, 4, 5)
def journey(rng: Draw, level: int) -> Draft:
    traveler, place, unit = rng.person(), rng.pick(PLACES), rng.pick(("kilometer", "mile"))
    legs = [
        (verb, rng.between(low, high), rng.between(2, 4 + level))
        for verb, low, high in rng.some(WAYS, (1, 1, 2, 3, 4)[level - 1])
    ]
    lengths = [speed * hours for _, speed, hours in legs]
    steps = [
        f"The part where {traveler.name} {verb} covers {speed} * {hours} = {many(speed * hours, unit)}."
        for verb, speed, hours in legs
    ]
    listing = joined([f"{verb} for {hours} hours at {speed} {PLURALS[unit]} per hour" for verb, speed, hours in legs])
    question = rng.pick(
        (
            f"On the way to {place}, {traveler.name} {listing}.",
            f"{traveler.name} is traveling to {place} and {listing}.",
            f"To reach {place}, {traveler.name} {listing}, without any rest in between.",
        )
    )
    done = sum(lengths)
    if len(legs) > 1:
        steps.append(f"The distance so far is {total_of(lengths)} {PLURALS[unit]}.")
    if level in (2, 4, 5):
        left = rng.between(3, 90)
        steps.append(f"What is left is {done + left} - {done} = {many(left, unit)}.")
        question += f" The whole way is {done + left} {PLURALS[unit]} long."
        return f"{question} How many {PLURALS[unit]} are still ahead of {traveler.him}?", steps, left
    ask = rng.pick(("does the trip cover in all", f"has {traveler.he} covered then"))
    return f"{question} How many {PLURALS[unit]} {ask}?", steps, done


@TRAVEL.template(2, 3, 4)
def meeting(rng: Draw, level: int) -> Draft:
    first, second = rng.some(("bus", "train", "truck", "motorbike", "van", "taxi", "delivery car"), 2)
    fast, slow, hours = rng.between(45, 70 + 10 * level), rng.between(20, 44), rng.between(2, 3 + 2 * level)
    apart = (fast + slow) * hours
    town, other = rng.some(TOWNS, 2)
    question = rng.pick(
        (
            f"{town} and {other} are {apart} kilometers apart. At noon a {first} leaves {town} at {fast} kilometers "
            f"per hour, and a {second} leaves {other} towards it at {slow} kilometers per hour.",
            f"From {town}, a {first} sets out for {other} at {fast} kilometers per hour. At the same moment a {second} "
            f"sets out from {other} for {town} at {slow} kilometers per hour. The road between them is {apart} "
            "kilometers long.",
        )
    )
    steps = [
        f"Every hour the gap shrinks by {fast} + {slow} = {fast + slow} kilometers.",
        f"They meet after {apart} / {fast + slow} = {hours} hours.",
    ]
    if level == 2:
        return f"{question} After how many hours do they meet?", steps, hours
    steps.append(f"By then the faster one has gone {fast} * {hours} = {fast * hours} kilometers.")
    if level == 3:
        return f"{question} How many kilometers from {town} do they meet?", steps, fast * hours
    slower = slow * hours
    steps.append(f"The slower one has gone {slow} * {hours} = {slower} kilometers.")
    more = (fast - slow) * hours
    steps.append(f"The difference is {fast * hours} - {slower} = {many(more, 'kilometer')}.")
    return f"{question} How many more kilometers than the {second} has the {first} gone when they meet?", steps, more


TOWNS = words(
    "Alder Bridge,Brackwater,Cedar Falls,Dunmore,Eastvale,Fernhill,Greyport,Hollow "
    "Creek,Ironbridge,Juniper,Kingsley,Larkfield,Millbrook,Northgate,Oakham,Pinewood,Quarry "
    "Bay,Redcliff,Silverton,Thornbury,Upton,Westmere"
)


@TRAVEL.template(2, 3, 4)
def catching_up(rng: Draw, level: int) -> Draft:
    ahead, behind = rng.names(2)
    slow, late = rng.between(4, 10 + 4 * level), rng.between(2, 9)
    lead = slow * late
    gap = rng.pick([step for step in range(2, slow + 1) if lead % step == 0])
    time, fast = lead // gap, slow + gap
    moves = rng.pick(("folds", "stuffs", "labels", "stamps", "sorts", "seals"))
    question = rng.pick(
        (
            f"{ahead} {moves} {slow} letters a minute. {behind} begins the same job {late} minutes later and "
            f"{moves} {fast} letters a minute.",
            f"{behind} {moves} {fast} letters a minute, but starts {late} minutes after {ahead}, who {moves} "
            f"{slow} letters a minute.",
        )
    )
    steps = [
        f"When {behind} starts, {ahead} is ahead by {slow} * {late} = {many(lead, 'letter')}.",
        f"Each minute the lead shrinks by {fast} - {slow} = {many(gap, 'letter')}.",
    ]
    steps.append(f"{behind} draws level after {lead} / {gap} = {many(time, 'minute')}.")
    if level < 4:
        ask = f"How many minutes does {behind} need to draw level with {ahead}?"
        return f"{question} {ask}", steps, time
    steps.append(f"By then {behind} has finished {fast} * {time} = {many(fast * time, 'letter')}.")
    ask = f"How many letters has {behind} finished when they are level?"
    return f"{question} {ask}", steps, fast * time


@TRAVEL.template(3, 4, 5)
def average_speed(rng: Draw, level: int) -> Draft:
    """Legs of different lengths: the average of the speeds is the wrong answer."""
    traveler, place = rng.person(), rng.pick(PLACES)
    first, second, rest = rng.between(2, 5), rng.between(2, 6), rng.between(1, 3) if level == 5 else 0
    hours = first + second + rest
    slow = hours * rng.between(2, 4) if rest else rng.between(10, 40)
    fast = slow + hours * rng.between(1, 5)
    near, far = slow * first, fast * second
    steps = [
        f"The first part is {slow} * {first} = {near} kilometers long.",
        f"The second part is {fast} * {second} = {far} kilometers long.",
        f"The whole way is {near} + {far} = {near + far} kilometers.",
    ]
    then = f"then a stop of {many(rest, 'hour')}, and then" if rest else "and then"
    question = rng.pick(
        (
            f"{traveler.name} travels to {place}: {many(first, 'hour')} at {slow} kilometers per hour, {then} "
            f"{many(second, 'hour')} at {fast} kilometers per hour.",
            f"The way of {traveler.name} to {place} begins with {many(first, 'hour')} at {slow} kilometers per hour, "
            f"{then} {many(second, 'hour')} at {fast} kilometers per hour.",
        )
    )
    if level == 3:
        return f"{question} How many kilometers long is the trip?", steps, near + far
    if rest:
        steps.append(f"With the stop it takes {first} + {second} + {rest} = {hours} hours.")
    else:
        steps.append(f"It takes {first} + {second} = {hours} hours.")
    speed = (near + far) // hours
    steps.append(f"The average speed is {near + far} / {hours} = {speed} kilometers per hour.")
    tail = ", counting the stop" if rest else ""
    return f"{question} What is the average speed of the whole trip in kilometers per hour{tail}?", steps, speed


@TRAVEL.template(1, 2, 3, 4, 5)
def fuel(rng: Draw, level: int) -> Draft:
    driver, place = rng.person(), rng.pick(PLACES)
    economy, liters = rng.between(8, 25), rng.between(4, 8 + 4 * level)
    distance, liter_price = economy * liters, 10 * rng.between(12, 24)
    steps = []
    question = rng.pick(
        (
            f"The car of {driver.name} goes {economy} kilometers on a liter of fuel, and a liter costs "
            f"{price(liter_price)}. The road to {place} is {distance} kilometers long.",
            f"{driver.name} drives {distance} kilometers to {place}. {driver.His} van needs one liter of fuel for "
            f"every {economy} kilometers, at {price(liter_price)} a liter.",
            f"It is {distance} kilometers to {place}. Fuel is sold for {price(liter_price)} a liter, and the car that "
            f"{driver.name} drives covers {economy} kilometers per liter.",
        )
    )
    if level >= 2:
        question += f" {driver.He} goes there and back."
        steps.append(f"There and back is 2 * {distance} = {2 * distance} kilometers.")
        distance, liters = 2 * distance, 2 * liters
    if level >= 3:
        trips = rng.between(2, 6)
        question = question[:-1] + f", and does so {trips} times a month."
        steps.append(f"In a month that makes {distance} * {trips} = {distance * trips} kilometers.")
        distance, liters = distance * trips, liters * trips
    steps.append(f"The fuel needed is {distance} / {economy} = {liters} liters.")
    cents = liters * liter_price
    steps.append(f"The fuel costs {liters} * {cash(liter_price)} = {dollars(cents)}.")
    if level >= 4:
        parking = 100 * rng.between(5, 60)
        steps.append(f"With parking it is {cash(cents)} + {cash(parking)} = {dollars(cents + parking)}.")
        cents += parking
        question += f" Parking adds {price(parking)} a month."
    if level < 5:
        when = " in a month" if level >= 3 else ""
        ask = f"How many dollars does {driver.he} spend on {'fuel and parking' if level == 4 else 'fuel'}{when}?"
        return f"{question} {ask}", steps, from_cents(cents)
    people = rng.pick([count for count in (2, 3, 4, 5, 6) if cents % count == 0])
    steps.append(f"Each person pays {cash(cents)} / {people} = {dollars(cents // people)}.")
    ask = f"The {people} people in the car share all costs equally. How many dollars does each of them pay a month?"
    return f"{question} {ask}", steps, from_cents(cents // people)


@TRAVEL.template(1, 2, 3, 4)
def laps(rng: Draw, level: int) -> Draft:
    runner, length = rng.person(), 50 * rng.between(4, 20)
    count, days = rng.between(3, 6 + 3 * level), rng.between(2, 6)
    how, track = rng.pick((("runs", "track"), ("cycles", "loop"), ("walks", "path"), ("skates", "rink")))
    daily = length * count
    steps = [f"One day brings {count} * {length} = {daily} meters."]
    question = rng.pick(
        (
            f"One round of the {track} is {length} meters. {runner.name} {how} {count} rounds a day on {days} days a "
            "week.",
            f"On {days} days of every week, {runner.name} {how} {count} rounds on a {track} that is {length} meters "
            "long.",
        )
    )
    if level == 1:
        return f"{question} How many meters does {runner.he} cover on such a day?", steps, daily
    weekly = daily * days
    steps.append(f"A week brings {daily} * {days} = {weekly} meters.")
    if level == 2:
        return f"{question} How many meters does {runner.he} cover in a week?", steps, weekly
    weeks = rng.between(2, 9)
    steps.append(f"Over {weeks} weeks that is {weekly} * {weeks} = {weekly * weeks} meters.")
    if level == 3:
        goal = weekly * weeks + 50 * rng.between(2, 90)
        left = goal - weekly * weeks
        steps.append(f"Still missing are {goal} - {weekly * weeks} = {left} meters.")
        question += f" {runner.His} goal is {goal} meters."
        return f"{question} How many meters are missing after {weeks} weeks?", steps, left
    steps.append(f"In kilometers that is {weekly * weeks} / 1000 = {render_answer(Fraction(weekly * weeks, 1000))}.")
    rate = 100 * rng.between(1, 5)
    raised = Fraction(weekly * weeks * rate, 100000)
    steps.append(
        f"The sponsors give {render_answer(Fraction(weekly * weeks, 1000))} * {cash(rate)} = "
        f"{render_answer(raised)} dollars."
    )
    question += f" Sponsors give {price(rate)} for every kilometer."
    return f"{question} How many dollars does {runner.he} raise in {weeks} weeks?", steps, raised


@TRAVEL.template(1, 2, 3, 4)
def map_scale(rng: Draw, level: int) -> Draft:
    hiker, place = rng.person(), rng.pick(PLACES)
    speed, daily, days = rng.between(2, 6), rng.between(3, 8), rng.between(2, 3 + 2 * level)
    real = speed * daily * days
    scale = rng.pick([factor for factor in range(2, 4 + 4 * level) if real % factor == 0 and factor < real] or [speed])
    measured = real // scale
    steps = [f"In reality the path is {measured} * {scale} = {real} kilometers long."]
    question = rng.pick(
        (
            f"On a hiking map, 1 centimeter stands for {scale} kilometers. The path to {place} measures {measured} "
            f"centimeters on the map.",
            f"{hiker.name} measures the path to {place} on a map and finds {measured} centimeters. Each centimeter of "
            f"the map is {scale} kilometers of land.",
        )
    )
    if level == 1:
        return f"{question} How many kilometers long is the path?", steps, real
    if level == 2:
        done = rng.between(2, real - 2)
        steps.append(f"The rest of the path is {real} - {done} = {many(real - done, 'kilometer')}.")
        question += f" {hiker.name} has already walked {done} kilometers of it."
        return f"{question} How many kilometers remain?", steps, real - done
    steps.append(f"Walking it takes {real} / {speed} = {real // speed} hours.")
    question += f" {hiker.name} walks {speed} kilometers per hour"
    steps.append(f"That fills {real // speed} / {daily} = {many(days, 'day')}.")
    question += f" for {many(daily, 'hour')} a day."
    if level == 3:
        return f"{question} How many days does the hike take?", steps, days
    pack = rng.between(2, 9)
    steps.append(f"The food for it weighs {days} * {pack} = {many(days * pack, 'pound')}.")
    question += f" {hiker.He} eats {pack} pounds of food a day with the whole group."
    return f"{question} How many pounds of food are needed for the hike?", steps, days * pack
