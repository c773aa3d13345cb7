"""Word problems about money and trade: shopping, discounts, interest, budgets, wages, tickets, profit.

Money is counted in whole dollars where a variable says so and in cents where it passes through `cash`, `price` or
`dollars`. A template of level L writes at least L steps, each with one computed value.
"""

from math import gcd

from cggr_ray.data.problem_templates.words import (
    BAKED,
    GOODS,
    PLURALS,
    PRODUCE,
    SHOPS,
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

MONEY = Table()


@MONEY.template(1, 2, 3, 4, 5)
def shopping(rng: Draw, level: int) -> Draft:
    buyer, shop = rng.person(), rng.pick(SHOPS)
    kinds = (1, 2, 2, 3, 3)[level - 1]
    lines = [
        (rng.between(2, 4 + 2 * level), noun, rng.between(2, 8 + 5 * level)) for noun in rng.some(GOODS + BAKED, kinds)
    ]
    listing = joined([f"{many(count, noun)} at ${each} each" for count, noun, each in lines])
    steps = [f"The {many(count, noun)} cost {count} * {each} = {count * each} dollars." for count, noun, each in lines]
    costs = [count * each for count, _, each in lines]
    total = sum(costs)
    question = rng.pick(
        (
            f"{buyer.name} goes to {shop} and buys {listing}.",
            f"At {shop}, {buyer.name} picks out {listing}.",
            f"{buyer.name} is getting ready for a party and finds everything at {shop}: {listing}.",
            f"A list on the fridge tells {buyer.name} to bring home {listing} from {shop}.",
        )
    )
    if kinds > 1:
        steps.append(f"Together that is {total_of(costs)} dollars.")
    if level == 2:
        return f"{question} How many dollars does {buyer.he} spend in total?", steps, total
    if level == 5:
        coupon = rng.between(2, min(20, total - 1))
        question += f" A coupon takes ${coupon} off the whole bill."
        steps.append(f"With the coupon the bill is {total} - {coupon} = {total - coupon} dollars.")
        total -= coupon
    bill = (total // 50 + 1) * 50
    steps.append(f"The change is {bill} - {total} = {dollars(100 * (bill - total))}.")
    ask = rng.pick(
        (
            f"{buyer.He} pays with ${bill}. How much change, in dollars, does {buyer.he} get back?",
            f"If {buyer.he} had ${bill} to begin with, how many dollars does {buyer.he} have left?",
            f"How many dollars of change should {buyer.he} receive after handing over ${bill}?",
        )
    )
    return f"{question} {ask}", steps, bill - total


@MONEY.template(1, 2, 3)
def market_stall(rng: Draw, level: int) -> Draft:
    buyer = rng.person()
    kinds = min(level, 2)
    unit = rng.pick(("kilogram", "pound"))
    lines = [(rng.between(2, 9), noun, 5 * rng.between(9, 79)) for noun in rng.some(PRODUCE, kinds)]
    listing = joined([f"{many(n, unit)} of {PLURALS[noun]} at {price(each)} {an(unit)}" for n, noun, each in lines])
    steps = [f"The {PLURALS[noun]} cost {n} * {cash(each)} = {dollars(n * each)}." for n, noun, each in lines]
    total = sum(n * each for n, _, each in lines)
    if kinds > 1:
        sums = " + ".join(cash(n * each) for n, _, each in lines)
        steps.append(f"The whole purchase costs {sums} = {dollars(total)}.")
    question = rng.pick(
        (
            f"At a market stall {buyer.name} asks for {listing}.",
            f"{buyer.name} is making soup and salad for the neighbors, so {buyer.he} buys {listing}.",
            f"The farm shop weighs out {listing} for {buyer.name}.",
        )
    )
    if level == 2:
        return f"{question} How many dollars does {buyer.he} have to pay?", steps, from_cents(total)
    bill = (total // 1000 + 1) * 1000
    steps.append(f"That leaves {cash(bill)} - {cash(total)} = {dollars(bill - total)}.")
    question += f" {buyer.He} pays with {price(bill)}. How many dollars does {buyer.he} get back?"
    return question, steps, from_cents(bill - total)


@MONEY.template(1, 2, 3, 4, 5)
def discount(rng: Draw, level: int) -> Draft:
    buyer, shop, noun = rng.person(), rng.pick(SHOPS), rng.pick(GOODS)
    each, count = 10 * rng.between(2, 20), rng.between(2, 3 + level) if level > 1 else 1
    percent = 10 * rng.between(1, 6)
    full = each * count
    off = full * percent // 100
    now = full - off
    steps = [f"Before the discount, {many(count, noun)} cost {count} * {each} = {full} dollars."] if count > 1 else []
    steps.append(f"The discount is {full} * {percent} / 100 = {off} dollars.")
    steps.append(f"The reduced price is {full} - {off} = {now} dollars.")
    question = rng.pick(
        (
            f"{an(noun).capitalize()} normally costs ${each} at {shop}, but everything is {percent}% off today.",
            f"At {shop} there is a sale: {percent}% off. The usual price of {an(noun)} is ${each}.",
            f"{buyer.name} hears that {shop} takes {percent}% off all prices this week. Each {noun} is marked ${each}.",
        )
    )
    question += f" {buyer.name} buys {'one' if count == 1 else many(count, noun)}."
    cents = now * 100
    if level >= 4:
        tax = rng.pick((5, 8, 10, 12, 15))
        question += f" A sales tax of {tax}% is added to the reduced price."
        steps.append(f"The tax is {now} * {tax} / 100 = {dollars(now * tax)}.")
        steps.append(f"With the tax the bill is {now} + {cash(now * tax)} = {dollars(cents + now * tax)}.")
        cents += now * tax
    if level in (3, 5):
        bill = (cents // 5000 + 1) * 5000
        steps.append(f"The change is {cash(bill)} - {cash(cents)} = {dollars(bill - cents)}.")
        question += f" {buyer.He} hands over {price(bill)}. How many dollars of change does {buyer.he} get?"
        return question, steps, from_cents(bill - cents)
    ask = rng.pick((f"How many dollars does {buyer.he} pay?", f"What does {buyer.he} pay in the end, in dollars?"))
    return f"{question} {ask}", steps, from_cents(cents)


INTEREST = {
    years: [
        (rate, unit)
        for rate in (2, 3, 4, 5, 8, 10, 20)
        if (unit := (base := (100 // gcd(100, rate)) ** years) // gcd(base, 100)) <= 2000
    ]
    for years in (2, 3, 4)
}


@MONEY.template(2, 3, 4, 5)
def compound_interest(rng: Draw, level: int) -> Draft:
    saver, years = rng.person(), (2, 2, 3, 4)[level - 2]
    rate, unit = rng.pick(INTEREST[years])
    principal = unit * rng.between(400 // unit + 1, 20000 // unit)
    steps, cents = [], 100 * principal
    for year in range(1, years + 1):
        grown = cents * (100 + rate) // 100
        steps.append(f"After year {year} the balance is {cash(cents)} * {100 + rate} / 100 = {dollars(grown)}.")
        cents = grown
    question = rng.pick(
        (
            f"{saver.name} puts ${principal} into an account that pays {rate}% interest once a year.",
            f"A bank adds {rate}% to the balance at the end of every year. {saver.name} opens an account with "
            f"${principal}.",
            f"{saver.name} inherits ${principal} and invests all of it at {rate}% a year, compounded yearly.",
        )
    )
    question += rng.pick((" The interest stays in the account.", f" {saver.He} never takes any money out."))
    if level == 2:
        return f"{question} How many dollars are in the account after {years} years?", steps, from_cents(cents)
    gain = cents - 100 * principal
    steps.append(f"The interest earned is {cash(cents)} - {principal} = {dollars(gain)}.")
    return f"{question} How many dollars of interest does it earn in {years} years?", steps, from_cents(gain)


@MONEY.template(2, 3, 4, 5)
def budget_split(rng: Draw, level: int) -> Draft:
    owner, income = rng.person(), 120 * rng.between(6, 12 * level)
    uses = ["rent", *rng.some(("food", "savings", "transport", "clothes", "music lessons", "books"), min(level - 1, 2))]
    parts = [rng.pick((3, 4)), *rng.some((5, 6, 8, 10, 12), min(level - 1, 2))]
    spent = [income // part for part in parts]
    listing = joined([f"1/{part} of it on {use}" for part, use in zip(parts, uses, strict=True)])
    steps = [
        f"The money for {use} is {income} / {part} = {income // part} dollars."
        for part, use in zip(parts, uses, strict=True)
    ]
    steps.append(f"All of this comes to {total_of(spent)} dollars.")
    left = income - sum(spent)
    steps.append(f"What remains is {income} - {sum(spent)} = {left} dollars.")
    question = rng.pick(
        (
            f"{owner.name} earns ${income} a month and spends {listing}.",
            f"Every month ${income} arrives in the account of {owner.name}. {owner.He} uses {listing}.",
            f"{owner.name} has a monthly income of ${income}. In {owner.his} budget {owner.he} sets down {listing}.",
        )
    )
    if level == 5:
        gift = rng.between(10, left // 2)
        steps.append(f"After the present there are {left} - {gift} = {left - gift} dollars.")
        question += f" This month a birthday present costs another ${gift}."
        left -= gift
    ask = rng.pick(("How many dollars are left over each month?", f"How many dollars does {owner.he} have left?"))
    if level == 5:
        ask = f"How many dollars does {owner.he} have left this month?"
    return f"{question} {ask}", steps, left


@MONEY.template(1, 2, 3, 4)
def savings_goal(rng: Draw, level: int) -> Draft:
    saver, wish = rng.person(), rng.pick(words("bicycle,guitar,tablet,telescope,drum,camera,keyboard,sewing machine"))
    weekly, weeks = rng.between(6, 15 + 10 * level), rng.between(3, 6 + 6 * level)
    own, gift = rng.between(5, 60), rng.between(10, 80) if level >= 4 else 0
    chores = rng.between(2, weekly - 2) if level >= 2 else 0
    snacks = rng.between(1, weekly - 1) if level >= 3 else 0
    have, income = own + gift, weekly + snacks
    goal = have + weekly * weeks
    steps, facts = [], []
    if gift:
        facts.append(f"An aunt adds ${gift} as a present.")
        steps.append(f"Savings and present make {own} + {gift} = {have} dollars.")
    if chores:
        facts.append(f"{saver.He} gets ${income - chores} of pocket money and ${chores} for walking a dog every week.")
        steps.append(f"Each week brings in {income - chores} + {chores} = {income} dollars.")
    else:
        facts.append(f"{saver.He} puts aside ${weekly} every week.")
    if snacks:
        facts.append(f"Of that, ${snacks} a week goes to snacks and the rest is saved.")
        steps.append(f"Each week {saver.he} saves {income} - {snacks} = {dollars(100 * weekly)}.")
    steps.append(f"The money still missing is {goal} - {have} = {goal - have} dollars.")
    steps.append(f"Saving it takes {goal - have} / {weekly} = {weeks} weeks.")
    question = rng.pick(
        (
            f"{saver.name} wants to buy a {wish} that costs ${goal} and already has ${own}.",
            f"The {wish} in the window costs ${goal}. {saver.name} has ${own} in a jar at home.",
            f"{saver.name} dreams of owning a {wish}. It is sold for ${goal}, and {saver.he} has saved ${own} so far.",
        )
    )
    return f"{question} {' '.join(facts)} In how many weeks can {saver.he} pay for the {wish}?", steps, weeks


@MONEY.template(3, 4, 5)
def ticket_sales(rng: Draw, level: int) -> Draft:
    """Two equations in two unknowns, solved by supposing that every ticket was a cheap one."""
    cheap = rng.between(3, 12)
    dear = cheap + rng.between(2, 6 + level)
    adults, children = rng.between(12, 60 * level), rng.between(12, 60 * level)
    count, income = adults + children, adults * dear + children * cheap
    event = rng.pick(words("concert,play,circus show,magic show,film night,dance recital,football match,puppet show"))
    question = rng.pick(
        (
            f"Tickets for a {event} cost ${dear} for adults and ${cheap} for children. The {count} tickets sold "
            f"brought in ${income}.",
            f"A total of {count} people paid to see a {event}. An adult ticket was ${dear}, a child ticket was "
            f"${cheap}, and the box office collected ${income}.",
            f"The box office of a {event} took in ${income} from {count} tickets. It charged ${cheap} for each child "
            f"and ${dear} for each adult.",
        )
    )
    steps = [
        f"If all tickets were child tickets, the income would be {count} * {cheap} = {count * cheap} dollars.",
        f"The actual income is higher by {income} - {count * cheap} = {income - count * cheap} dollars.",
        f"Each adult adds the difference, so there were {income - count * cheap} / ({dear} - {cheap}) = {adults} "
        "adults.",
    ]
    if level == 3:
        return f"{question} How many adult tickets were sold?", steps, adults
    steps.append(f"There were {count} - {adults} = {children} children.")
    if level == 4:
        return f"{question} How many child tickets were sold?", steps, children
    steps.append(f"The adults paid {adults} * {dear} = {adults * dear} dollars.")
    steps.append(f"The children paid {children} * {cheap} = {children * cheap} dollars.")
    more, less = adults * dear, children * cheap
    if more >= less:
        steps.append(f"The adults paid {more} - {less} = {dollars(100 * (more - less))} more.")
    else:
        steps.append(f"The children paid {less} - {more} = {dollars(100 * (less - more))} more.")
    ask = "What is the difference, in dollars, between the amount paid for adults and the amount paid for children?"
    return f"{question} {ask}", steps, abs(more - less)


@MONEY.template(2, 3, 4, 5)
def stall_profit(rng: Draw, level: int) -> Draft:
    maker, noun, where = rng.person(), rng.pick(GOODS), rng.pick(SHOPS)
    made, cost = rng.between(10, 20 + 20 * level), rng.between(2, 9)
    each = cost + rng.between(2, 12)
    unsold = rng.between(2, made // 3) if level >= 4 else 0
    low = rng.between(1, each - 1) if level >= 5 else 0
    fee = rng.between(5, 60) if level >= 3 else 0
    sold = made - unsold
    takings = sold * each
    spent = made * cost
    steps = [f"Making the {PLURALS[noun]} costs {made} * {cost} = {spent} dollars."]
    question = rng.pick(
        (
            f"{maker.name} makes {many(made, noun)} for ${cost} each and sells them at {where} for ${each} each.",
            f"It costs {maker.name} ${cost} to make {an(noun)}. {maker.He} makes {made} of them and offers them at "
            f"{where} for ${each} apiece.",
            f"At {where}, {maker.name} asks ${each} for {an(noun)} that costs ${cost} to make. {maker.He} brings "
            f"{made}.",
        )
    )
    if fee:
        question += f" The stall costs ${fee}."
        steps.append(f"With the stall the costs are {spent} + {fee} = {spent + fee} dollars.")
        spent += fee
    if unsold:
        fate = f"go for only ${low} each" if low else "remain unsold"
        question += f" At closing time the last {unsold} {fate}."
        steps.append(f"At full price {maker.he} sells {made} - {unsold} = {many(sold, noun)}.")
    else:
        question += f" All of the {PLURALS[noun]} are sold."
    steps.append(f"The sales at full price bring in {sold} * {each} = {takings} dollars.")
    if low:
        steps.append(f"With the cheap ones it is {takings} + {unsold} * {low} = {takings + unsold * low} dollars.")
        takings += unsold * low
    if takings >= spent:
        steps.append(f"The profit is {takings} - {spent} = {dollars(100 * (takings - spent))}.")
        return f"{question} How many dollars of profit does {maker.name} make?", steps, takings - spent
    steps.append(f"The loss is {spent} - {takings} = {dollars(100 * (spent - takings))}.")
    return f"{question} How many dollars does {maker.name} lose?", steps, spent - takings


@MONEY.template(3, 4)
def two_plans(rng: Draw, level: int) -> Draft:
    """A line meets a line: the count at which a higher fee with a lower rate costs the same."""
    person, even = rng.person(), rng.between(4, 15 + 10 * level)
    low, gap, fee = rng.between(1, 6), rng.between(1, 7), rng.between(5, 60)
    club, visit = rng.pick(
        (
            ("climbing gym", "visit"),
            ("swimming pool", "visit"),
            ("car club", "trip"),
            ("pottery studio", "class"),
            ("dance school", "lesson"),
            ("tool library", "loan"),
            ("tennis court", "game"),
        )
    )
    high, big = low + gap, fee + gap * even
    steps = [
        f"The fees differ by {big} - {fee} = {big - fee} dollars.",
        f"Each {visit} makes up {high} - {low} = {dollars(100 * gap)} of that.",
        f"The plans cost the same after {big - fee} / {gap} = {many(even, visit)}.",
    ]
    question = rng.pick(
        (
            f"A {club} offers {person.name} two plans. Plan A has a fee of ${fee} plus ${high} for each {visit}. Plan "
            f"B has a fee of ${big} plus ${low} for each {visit}.",
            f"{person.name} compares two plans of a {club}: the first costs ${fee} and then ${high} per {visit}, the "
            f"second costs ${big} and then ${low} per {visit}.",
        )
    )
    if level == 3:
        return f"{question} For what number of {PLURALS[visit]} do the two plans cost the same?", steps, even
    steps.append(f"At that point each plan costs {fee} + {high} * {even} = {fee + high * even} dollars.")
    ask = "How many dollars does each plan cost when both cost the same?"
    return f"{question} {ask}", steps, fee + high * even
