"""Word problems about work and time: wages, shared work, machines, mixtures, schedules, dates."""

from fractions import Fraction

from cggr_ray.data.problem_templates.words import (
    CRATES,
    PARTS,
    PLURALS,
    Draft,
    Draw,
    Table,
    cash,
    clock,
    many,
    render_answer,
    total_of,
    words,
)

WORK = Table()


@WORK.template(1, 2, 3, 4, 5)
def wages(rng: Draw, level: int) -> Draft:
    worker, rate = rng.person(), rng.between(11, 20 + 8 * level)
    job = rng.pick(words("bakery,library,garage,hotel,nursery,print shop,restaurant,warehouse,clinic,theater"))
    if level <= 2:
        days, hours, bonus = rng.between(2, 6), rng.between(3, 8), 5 * rng.between(2, 20)
        pay = rate * days * hours
        steps = [
            f"The working time is {days} * {hours} = {days * hours} hours.",
            f"The pay is {days * hours} * {rate} = {pay} dollars.",
        ]
        question = f"{worker.name} works at a {job} for ${rate} an hour, {hours} hours a day on {days} days a week."
        if level == 2:
            question += f" This week {worker.he} also received a bonus of ${bonus}."
            steps.append(f"With the bonus it is {pay} + {bonus} = {pay + bonus} dollars.")
            pay += bonus
        return f"{question} How many dollars did {worker.he} earn this week?", steps, pay
    extra, overtime = rng.between(2, 18), rate + rng.between(3, 15)
    base, more = 40 * rate, extra * overtime
    weeks, fee = rng.between(2, 9), rng.between(12, 150)
    steps = [
        f"The hours beyond the regular week are {40 + extra} - 40 = {extra}.",
        f"The regular hours pay 40 * {rate} = {base} dollars.",
        f"The extra hours pay {extra} * {overtime} = {more} dollars.",
        f"Together that is {base} + {more} = {base + more} dollars a week.",
    ]
    question = rng.pick(
        (
            f"A {job} pays {worker.name} ${rate} an hour for the first 40 hours of a week and ${overtime} for each "
            f"hour after that. {worker.He} works {40 + extra} hours a week.",
            f"{worker.name} works {40 + extra} hours a week at a {job}. Up to 40 hours {worker.he} earns ${rate} an "
            f"hour, and every further hour pays ${overtime}.",
        )
    )
    pay = base + more
    if level >= 4:
        question += f" Each week ${fee} is taken off for insurance."
        steps.append(f"After insurance there are {pay} - {fee} = {pay - fee} dollars a week.")
        pay -= fee
    if level == 3:
        return f"{question} How many dollars is that a week?", steps, pay
    if level == 4:
        return f"{question} How many dollars does {worker.he} take home a week?", steps, pay
    steps.append(f"Over {weeks} weeks that is {pay} * {weeks} = {pay * weeks} dollars.")
    return f"{question} How many dollars does {worker.he} take home in {weeks} weeks?", steps, pay * weeks


JOBS = (
    ("paint a fence", "fences"),
    ("clean a hall", "halls"),
    ("rake a yard", "yards"),
    ("wash a bus", "buses"),
    ("tile a roof", "roofs"),
    ("weed a field", "fields"),
    ("wire a cabin", "cabins"),
    ("plow a plot", "plots"),
)
PAIRS = tuple((a, b) for a in range(3, 61) for b in range(a + 1, 61) if a * b % (a + b) == 0)


@WORK.template(2, 3, 4, 5)
def work_together(rng: Draw, level: int) -> Draft:
    """Rates add, times do not: 1/a + 1/b = 1/t."""
    first, second = rng.names(2)
    (job, plural), (a, b) = rng.pick(JOBS), rng.pick(PAIRS)
    if rng.random() < 0.5:
        a, b = b, a
    both = a * b // (a + b)
    unit = "minutes" if max(a, b) > 14 else "hours"
    question = rng.pick(
        (
            f"{first} can {job} in {a} {unit}, and {second} needs {b} {unit} for the same task.",
            f"Working alone, {first} takes {a} {unit} to {job}, while {second} takes {b} {unit}.",
        )
    )
    rate = f"Together they do 1/{a} + 1/{b} = 1/{both} of the job in {'a minute' if unit == 'minutes' else 'an hour'}."
    if level <= 3:
        steps = [rate, f"One job takes both of them 1 / (1/{both}) = {both} {unit}."]
        if level == 2:
            return f"{question} How many {unit} do they need if they work together?", steps, both
        count = rng.between(2, 9)
        steps.append(f"The {count} jobs take {count} * {both} = {count * both} {unit}.")
        return f"{question} How many {unit} do they need together for {count} {plural} like that?", steps, count * both
    alone = rng.pick([time for time in range(1, a) if both * (a - time) % a == 0] or [a - 1])
    left = Fraction(a - alone, a)
    time = left * both
    steps = [
        f"Alone, {first} does {alone} / {a} = {Fraction(alone, a)} of the job.",
        f"What is left is 1 - {Fraction(alone, a)} = {left} of it.",
        rate,
        f"Together they finish it in ({left}) / (1/{both}) = {many(render_answer(time), unit[:-1])}.",
    ]
    question += f" {first} works alone for {many(alone, unit[:-1])} and then {second} joins in."
    if level == 4:
        return f"{question} How many {unit} do they work side by side?", steps, time
    steps.append(f"From the beginning it is {alone} + {render_answer(time)} = {render_answer(alone + time)} {unit}.")
    ask = f"How many {unit} pass from the start until the job is done?"
    return f"{question} {ask}", steps, alone + time


@WORK.template(1, 2, 3, 4, 5)
def machines(rng: Draw, level: int) -> Draft:
    part, crate = rng.pick(PARTS), rng.pick(CRATES)
    count, rate, hours = rng.between(2, 4 + 2 * level), rng.between(6, 15 + 12 * level), rng.between(2, 10)
    hourly = count * rate
    steps = [
        f"In an hour the machines make {count} * {rate} = {hourly} {PLURALS[part]}.",
        f"In {hours} hours they make {hourly} * {hours} = {hourly * hours} {PLURALS[part]}.",
    ]
    question = rng.pick(
        (
            f"A factory has {count} machines. Each of them makes {many(rate, part)} an hour and runs {hours} hours a "
            "day.",
            f"In a workshop {count} machines run for {hours} hours every day, and each produces {many(rate, part)} "
            "per hour.",
            f"Each machine in a hall turns out {many(rate, part)} every hour. There are {count} such machines, and "
            f"they are switched on {hours} hours a day.",
        )
    )
    made = hourly * hours
    if level >= 4:
        other = rng.between(10, 400)
        steps.append(f"With the old machine it is {made} + {other} = {made + other} {PLURALS[part]}.")
        question += f" An old machine adds {other} a day."
        made += other
    if level >= 2:
        size = rng.between(4, min(20, made // 4))
        bad = made % size + size * rng.between(0, 2) if level >= 3 else rng.between(2, made // 3)
        bad = bad or size
        steps.append(f"Without the faulty ones there are {made} - {bad} = {many(made - bad, part)}.")
        question += f" The inspectors throw away {bad} of the day's {PLURALS[part]}."
        made -= bad
    if level <= 2:
        ask = "are left" if level == 2 else "are made"
        return f"{question} How many {PLURALS[part]} {ask} in a day?", steps, made
    boxes = made // size
    steps.append(f"They fill {made} / {size} = {many(boxes, crate)}.")
    question += f" The good ones are packed {size} to each {crate}."
    if level <= 4:
        return f"{question} How many {PLURALS[crate]} are filled in a day?", steps, boxes
    each = rng.between(5, 60)
    steps.append(f"The {PLURALS[crate]} sell for {boxes} * {each} = {boxes * each} dollars.")
    question += f" Each {crate} sells for ${each}."
    return f"{question} How many dollars is one day's production worth?", steps, boxes * each


LIQUIDS = (
    ("salt", "brine"),
    ("sugar", "syrup"),
    ("acid", "acid solution"),
    ("juice", "fruit drink"),
    ("alcohol", "cleaning fluid"),
    ("vinegar", "marinade"),
    ("dye", "ink"),
    ("soap", "soap solution"),
)


@WORK.template(3, 4, 5)
def mixture(rng: Draw, level: int) -> Draft:
    """Strengths average by volume; the volumes are drawn so that the mean is a whole percentage."""
    mixer, (inside, liquid) = rng.person(), rng.pick(LIQUIDS)
    left, right, scale = rng.between(1, 5), rng.between(1, 5), rng.between(1, 6)
    weak = rng.between(3, 30)
    strong = weak + (left + right) * rng.between(1, 6)
    small, large = left * scale, right * scale
    volume, mean = small + large, (left * weak + right * strong) // (left + right)
    steps = [
        f"The first liquid holds {small} * {weak} / 100 = {many(cash(small * weak), 'liter')} of {inside}.",
        f"The second liquid holds {large} * {strong} / 100 = {many(cash(large * strong), 'liter')} of {inside}.",
        f"Together they hold {cash(small * weak)} + {cash(large * strong)} = {many(cash(volume * mean), 'liter')} of "
        f"{inside}.",
    ]
    question = rng.pick(
        (
            f"{mixer.name} mixes {many(small, 'liter')} of {liquid} with {weak}% {inside} and {many(large, 'liter')} "
            f"of {liquid} with {strong}% {inside}.",
            f"A tank is filled with {many(small, 'liter')} of a {weak}% {liquid} and {many(large, 'liter')} of a "
            f"{strong}% {liquid}, where the percentages tell the share of {inside}.",
        )
    )
    if level == 3:
        return f"{question} How many liters of {inside} are in the mixture?", steps, Fraction(volume * mean, 100)
    steps.append(f"The mixture is {small} + {large} = {volume} liters.")
    if level == 4:
        steps.append(f"Its strength is {cash(volume * mean)} * 100 / {volume} = {mean} percent.")
        return f"{question} What percentage of the mixture is {inside}?", steps, mean
    options = [goal for goal in range(2, mean) if volume * mean % goal == 0 and goal * 3 >= mean]
    goal = rng.pick(options or [mean - 1])
    wanted = Fraction(volume * mean, goal)
    steps.append(
        f"At {goal} percent that {inside} is enough for {cash(volume * mean)} * 100 / {goal} = {render_answer(wanted)} "
        "liters."
    )
    water = wanted - volume
    steps.append(f"The water to add is {render_answer(wanted)} - {volume} = {many(render_answer(water), 'liter')}.")
    ask = f"How many liters of water must be added so that the mixture holds {goal}% {inside}?"
    return f"{question} {ask}", steps, water


@WORK.template(1, 2, 3, 4, 5)
def schedule(rng: Draw, level: int) -> Draft:
    host, count, each = rng.person(), rng.between(2, 4 + level), rng.between(8, 25 + 6 * level)
    what, where = rng.pick(
        (
            ("lesson", "music school"),
            ("talk", "conference"),
            ("film", "film club"),
            ("match", "chess club"),
            ("session", "swimming pool"),
            ("tour", "museum"),
            ("rehearsal", "theater"),
        )
    )
    begin = 60 * rng.between(7, 11) + 5 * rng.between(0, 11)
    pause = rng.between(3, 15) if level >= 2 else 0
    lunch = rng.between(20, 60) if level >= 3 else 0
    delay = rng.between(3, 40) if level >= 4 else 0
    clean = rng.between(3, 30) if level >= 5 else 0
    parts = [count * each]
    steps = [f"The {PLURALS[what]} take {count} * {each} = {count * each} minutes."]
    question = rng.pick(
        (
            f"At a {where}, {host.name} plans {many(count, what)} of {each} minutes each, one after another, starting "
            f"at {clock(begin)[:-1]}.",
            f"{host.name} opens the {where} at {clock(begin)} and at once starts the first of {many(count, what)}. "
            f"Each takes {each} minutes.",
            f"The day at the {where} has {many(count, what)} of {each} minutes each, and {host.name} begins the first "
            f"one at {clock(begin)[:-1]}.",
        )
    )
    if pause:
        breaks = count - 1
        gap = f"Between two {PLURALS[what]}" if breaks > 1 else f"Between the two {PLURALS[what]}"
        question += f" {gap} there is a break of {pause} minutes."
        steps.append(f"The breaks take ({count} - 1) * {pause} = {breaks * pause} minutes.")
        parts.append(breaks * pause)
    for minutes, text in (
        (lunch, " Lunch takes another {} minutes."),
        (delay, " A power cut costs {} minutes."),
        (clean, " Cleaning at the end takes {} minutes."),
    ):
        if minutes:
            question += text.format(minutes)
            parts.append(minutes)
    busy = sum(parts)
    if len(parts) > 1:
        steps.append(f"In all that takes {total_of(parts)} minutes.")
    if level <= 2 and rng.random() < 0.5:
        return f"{question} How many minutes pass from start to finish?", steps, busy
    hours = busy // 60 + 1
    steps.append(f"The booking lasts {hours} * 60 = {60 * hours} minutes.")
    steps.append(f"After the end there remain {60 * hours} - {busy} = {many(60 * hours - busy, 'minute')}.")
    question += f" The place is booked for {many(hours, 'hour')} from the start."
    return f"{question} How many minutes of the booking remain?", steps, 60 * hours - busy


MONTHS = (
    ("January", 31),
    ("February", 28),
    ("March", 31),
    ("April", 30),
    ("May", 31),
    ("June", 30),
    ("July", 31),
    ("August", 31),
    ("September", 30),
    ("October", 31),
    ("November", 30),
    ("December", 31),
)


@WORK.template(2, 3, 4, 5)
def calendar(rng: Draw, level: int) -> Draft:
    reader = rng.person()
    span = (1, 1, 2, 2)[level - 2]
    first = rng.between(0, 11 - span)
    (begin_month, length), (end_month, end_length) = MONTHS[first], MONTHS[first + span]
    begin, end = rng.between(2, length - 2), rng.between(2, end_length - 2)
    parts = [length - begin + 1, *(days for _, days in MONTHS[first + 1 : first + span]), end]
    days = sum(parts)
    daily = rng.between(2, 9 + 2 * level)
    activity, unit = rng.pick(
        (("reads", "page"), ("learns", "word"), ("solves", "riddle"), ("draws", "sketch"), ("runs", "mile"))
    )
    steps = [f"In {begin_month} there are {length} - {begin} + 1 = {parts[0]} such days."]
    if span == 2:
        steps.append(
            f"Together with {MONTHS[first + 1][0]} that is {parts[0]} + {parts[1]} = {parts[0] + parts[1]} days."
        )
    steps.append(f"With the days in {end_month} there are {days - end} + {end} = {days} days.")
    question = rng.pick(
        (
            f"From {begin_month} {begin} to {end_month} {end} of a year that is not a leap year, both days included, "
            f"{reader.name} {activity} {many(daily, unit)} every day.",
            f"In a year without a leap day, {reader.name} {activity} {many(daily, unit)} a day, beginning on "
            f"{begin_month} {begin} and ending on {end_month} {end}, the last day included.",
        )
    )
    if level == 2:
        return f"{question} On how many days does {reader.he} do so?", steps, days
    total = days * daily
    steps.append(f"That makes {days} * {daily} = {total} {PLURALS[unit]}.")
    if level == 5:
        missed = rng.between(2, 12)
        less = missed * daily
        steps.append(f"On the missed days {reader.he} would have done {missed} * {daily} = {less} {PLURALS[unit]}.")
        steps.append(f"So the number is {total} - {less} = {total - less} {PLURALS[unit]}.")
        question += f" But {reader.he} falls ill and misses {missed} of these days."
        total -= less
    return f"{question} How many {PLURALS[unit]} is that altogether?", steps, total
