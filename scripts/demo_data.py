#!/usr/bin/env python3
"""Seeded, generated, English-like text: what the bundled demonstration model is trained on.

    scripts/demo_data.py --seed 1 --bytes 4000000 --out train.txt
    scripts/demo_data.py --seed 2 --bytes 2000 --kind recipe

Five kinds of documents in equal shares of bytes: little stories, arithmetic in words, calendar
questions, recipes, and slot-value records with the sentence that says them. Each kind has facts that
must agree with each other (a sum, a weekday, the ingredients a recipe uses), so that a language model
has something to learn beyond the next likely word.

The text depends on the seed alone, not on the Python version.
"""

import argparse
import datetime
import sys

from demo_english import (DAYS, DAYS_IN_MONTH, MONTHS, ORDINALS, SEASONS, Character, Picker,
                          capital, in_words, listed, plural, with_article)
from demo_stories import story

END_OF_DOCUMENT = "<|endoftext|>"

# ---- arithmetic in words ------------------------------------------------------------------------

THINGS = "apple pear coin stone book pencil button egg marble stamp flower cup".split()


def arithmetic_question(pick):
    kind = pick.one(("plus", "minus", "times"))
    if kind == "times":
        x, y = pick.number(2, 12), pick.number(2, 12)
        result = x * y
    else:
        x, y = pick.number(0, 99), pick.number(0, 60)
        x, y = (max(x, y), min(x, y)) if kind == "minus" else (x, y)
        result = x + y if kind == "plus" else x - y
    sentence = f"{in_words(x)} {kind} {in_words(y)}"
    return f"What is {sentence}? {capital(sentence)} is {in_words(result)}."


def arithmetic_problem(pick):
    a = Character(pick)
    b = Character(pick, a)
    thing = pick.one(THINGS)
    have, change = pick.number(5, 40), pick.number(1, 15)
    if pick.chance(0.5):
        return (f"{a.name} has {plural(have, thing)}. {b.name} gives {a.him} {in_words(change)} more. "
                f"Now {a.name} has {plural(have + change, thing)}.")
    change = min(change, have - 1)
    return (f"{a.name} had {plural(have, thing)} and gave {in_words(change)} of them to {b.name}. "
            f"Now {a.he} has {plural(have - change, thing)}.")


def arithmetic_counting(pick):
    step, start = pick.number(2, 10), pick.number(0, 20)
    numbers = [in_words(start + i * step) for i in range(pick.number(4, 8))]
    return f"Count by {in_words(step)} from {numbers[0]}: {', '.join(numbers)}."


def arithmetic_comparison(pick):
    x, y = pick.several(range(0, 200), 2)
    return (f"Which is larger, {in_words(x)} or {in_words(y)}? {capital(in_words(max(x, y)))} is "
            f"larger than {in_words(min(x, y))}.")


def arithmetic_price(pick):
    count, price = pick.number(2, 9), pick.number(2, 12)
    thing = pick.one([t for t in THINGS if t != "coin"])
    return (f"One {thing} costs {plural(price, 'coin')}. How much do {plural(count, thing)} cost? "
            f"They cost {plural(count * price, 'coin')}.")


def arithmetic(pick):
    makers = (arithmetic_question, arithmetic_question, arithmetic_problem, arithmetic_counting,
              arithmetic_comparison, arithmetic_price)
    return "\n".join(pick.one(makers)(pick) for _ in range(pick.number(2, 5)))


# ---- calendar questions -------------------------------------------------------------------------


def calendar_day_shift(pick):
    day, shift, later = pick.number(0, 6), pick.number(1, 10), pick.chance(0.5)
    answer = DAYS[(day + (shift if later else -shift)) % 7]
    if later:
        return (f"Today is {DAYS[day]}. What day will it be in {plural(shift, 'day')}? "
                f"It will be {answer}.")
    ago = plural(shift, "day")
    return f"Today is {DAYS[day]}. What day was it {ago} ago? It was {answer}."


def calendar_month_shift(pick):
    month, shift = pick.number(0, 11), pick.number(1, 6)
    answer = MONTHS[(month + shift) % 12]
    return (f"Which month comes {plural(shift, 'month')} after {MONTHS[month]}? "
            f"{answer} comes {plural(shift, 'month')} after {MONTHS[month]}.")


def calendar_month_fact(pick):
    i = pick.number(0, 11)
    month = MONTHS[i]
    return pick.one((
        f"How many days are in {month}? There are {in_words(DAYS_IN_MONTH[i])} days in {month}"
        + (", or twenty-nine in a leap year." if i == 1 else "."),
        f"In which season is {month}? {month} is in {SEASONS[i]}.",
        f"Which is the {ORDINALS[i]} month of the year? The {ORDINALS[i]} month is {month}."))


def calendar_weekday(pick):
    first = datetime.date(2000, 1, 1).toordinal()
    date = datetime.date.fromordinal(first + pick.number(0, 365 * 40))
    written = f"{date.day} {MONTHS[date.month - 1]} {date.year}"
    next_day = date + datetime.timedelta(days=1)
    return (f"If {written} is a {DAYS[date.weekday()]}, what is the next day? It is "
            f"{DAYS[next_day.weekday()]}, {next_day.day} {MONTHS[next_day.month - 1]} "
            f"{next_day.year}.")


def calendar_clock(pick):
    hour, length = pick.number(6, 20), pick.number(1, 3)
    event = pick.one(("The meeting", "The film", "The concert", "The lesson", "The game"))
    minute = pick.one(("00", "15", "30", "45"))
    return (f"{event} starts at {hour}:{minute} and takes {plural(length, 'hour')}. When does it "
            f"end? It ends at {hour + length}:{minute}.")


def calendar(pick):
    makers = (calendar_day_shift, calendar_month_shift, calendar_month_fact, calendar_weekday,
              calendar_clock)
    return "\n".join(pick.one(makers)(pick) for _ in range(pick.number(2, 5)))


# ---- recipes ------------------------------------------------------------------------------------

VEGETABLES = ("potatoes carrots onions leeks beans peas mushrooms tomatoes peppers beets "
              "cabbage spinach").split()
FRUITS = "apples pears plums cherries berries peaches lemons oranges".split()
HERBS = "parsley basil thyme dill mint rosemary".split()
FATS = ("butter", "olive oil", "lard")
SWEET_SPICES = "cinnamon vanilla ginger nutmeg".split()
CAKES = "old-style simple quick sweet fine".split()
GRAINS = "rice barley noodles lentils millet".split()


def numbered(steps):
    return "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))


def recipe_text(title, people, ingredients, steps):
    items = "\n".join(f"- {item}" for item in ingredients)
    return f"Recipe: {title}\nFor {in_words(people)} people.\n{items}\n{numbered(steps)}"


def recipe_soup(pick):
    people, herb, fat = pick.number(2, 8), pick.one(HERBS), pick.one(FATS)
    main, *others = pick.several(VEGETABLES, pick.number(2, 3))
    minutes = pick.number(3, 9) * 5
    title = f"{capital(main)} soup with {herb}"
    ingredients = [f"{people * 150} grams of {main}", *(f"{people * 50} grams of {v}" for v in others),
                   f"{people} cups of water", f"1 spoon of {fat}", f"some {herb}", "salt"]
    return recipe_text(title, people, ingredients, [
        f"Wash and cut the {listed([main, *others])}.",
        f"Heat the {fat} in a large pot and fry the {others[0]} for {pick.number(2, 6)} minutes.",
        f"Add the {main} and the water, and cook for {minutes} minutes.",
        f"Season with salt, sprinkle with {herb} and serve hot."])


def recipe_cake(pick):
    people, fruit, spice = pick.number(4, 12), pick.one(FRUITS), pick.one(SWEET_SPICES)
    heat, minutes, eggs = pick.number(16, 21) * 10, pick.number(5, 12) * 5, max(2, people // 3)
    title = f"{capital(pick.one(CAKES))} cake with {fruit}"
    ingredients = [f"{people * 30} grams of flour", f"{people * 20} grams of sugar",
                   f"{people * 15} grams of butter", f"{eggs} eggs", f"{people * 40} grams of {fruit}",
                   f"1 spoon of {spice}"]
    return recipe_text(title, people, ingredients, [
        "Beat the butter and the sugar until they are light.",
        f"Add the eggs one by one, then the flour and the {spice}.",
        f"Put half of the dough into a tin, lay the {fruit} on it and cover with the rest.",
        f"Bake at {heat} degrees for {minutes} minutes and let it cool."])


def recipe_bowl(pick):
    people, grain, herb, fat = pick.number(1, 6), pick.one(GRAINS), pick.one(HERBS), pick.one(FATS)
    first, second = pick.several(VEGETABLES, 2)
    minutes = {"rice": 18, "barley": 30, "noodles": 8, "lentils": 25, "millet": 20}[grain]
    title = f"{capital(grain)} with {first} and {second}"
    ingredients = [f"{people * 80} grams of {grain}", f"{people * 100} grams of {first}",
                   f"{people * 60} grams of {second}", f"2 spoons of {fat}", f"some {herb}",
                   "salt and pepper"]
    return recipe_text(title, people, ingredients, [
        f"Cook the {grain} in salted water for {minutes} minutes.",
        f"Meanwhile cut the {first} and the {second} into small pieces and fry them in the {fat}.",
        f"Mix everything, season with salt, pepper and {herb}, and serve."])


def recipe(pick):
    return pick.one((recipe_soup, recipe_cake, recipe_bowl))(pick)


# ---- slot-value records and their sentence ------------------------------------------------------

RESTAURANTS = ("Blue Lantern", "Golden Goose", "Old Harbour", "Red Fox", "Silver Spoon",
               "Green Table", "Three Pines", "White Horse", "Corner House", "Copper Pot")
CUISINES = "Italian French Indian Japanese Greek Spanish Thai Turkish".split()
CITIES = "Arden Belmont Corvale Dunmore Eastbrook Fairhaven Glenford Harwick Kingsbury Lynfield".split()
AREAS = ("city centre", "riverside", "old town", "station district")
SKIES = (("sunny", "Take a hat."), ("rainy", "Take an umbrella."), ("cloudy", "It will stay dry."),
         ("snowy", "Wear warm boots."), ("stormy", "Stay at home."))
SUBJECTS = "history music painting cooking gardening travel science poetry".split()


def record(slots, sentence):
    return " | ".join(f"{key}: {value}" for key, value in slots) + f"\n=> {sentence}"


def record_restaurant(pick):
    name, other = pick.several(RESTAURANTS, 2)
    food, area, stars = pick.one(CUISINES), pick.one(AREAS), pick.number(1, 5)
    price = pick.one(("cheap", "moderate", "expensive"))
    family = pick.chance(0.5)
    children = "welcomes children" if family else "is not for children"
    kind = f"{with_article(price)} {food} restaurant"
    sentence = pick.one((
        f"The {name} is {kind} in the {area}, near the {other}. It has {plural(stars, 'star')} and "
        f"{children}.",
        f"Near the {other} in the {area} there is {kind} called the {name}. It {children} and has "
        f"{plural(stars, 'star')}."))
    return record((("name", name), ("food", food), ("price", price), ("area", area), ("near", other),
                   ("stars", stars), ("children", "yes" if family else "no")), sentence)


def record_weather(pick):
    city, day = pick.one(CITIES), pick.one(DAYS)
    (sky, advice), high = pick.one(SKIES), pick.number(-5, 32)
    low = high - pick.number(3, 9)
    sentence = pick.one((
        f"On {day} it will be {sky} in {city}, with {low} to {high} degrees. {advice}",
        f"{city} expects {with_article(sky)} {day} between {low} and {high} degrees. {advice}"))
    return record((("city", city), ("day", day), ("sky", sky), ("low", low), ("high", high)), sentence)


def record_train(pick):
    start, end = pick.several(CITIES, 2)
    hour, minute, track = pick.number(5, 22), pick.number(0, 11) * 5, pick.number(1, 12)
    late = pick.one((0, 0, 5, 10, 20))
    delay = f"is {in_words(late)} minutes late" if late else "is on time"
    time = f"{hour}:{minute:02d}"
    sentence = pick.one((
        f"The {time} train from {start} to {end} leaves from track {track} and {delay}.",
        f"The train to {end} {delay}. It leaves {start} at {time} from track {track}."))
    return record((("from", start), ("to", end), ("time", time), ("track", track),
                   ("delay", late)), sentence)


def record_book(pick):
    author = Character(pick)
    subject, pages, year = pick.one(SUBJECTS), pick.number(8, 60) * 10, pick.number(1950, 2025)
    city = pick.one(CITIES)
    sentence = pick.one((
        f"{author.name} of {city} wrote a book about {subject} in {year}. It has {pages} pages.",
        f"The book about {subject} by {author.name} of {city} has {pages} pages and came out in "
        f"{year}."))
    return record((("author", author.name), ("city", city), ("subject", subject), ("pages", pages),
                   ("year", year)), sentence)


def slot_record(pick):
    makers = (record_restaurant, record_restaurant, record_weather, record_train, record_book)
    return "\n".join(pick.one(makers)(pick) for _ in range(pick.number(1, 3)))


# ---- output -------------------------------------------------------------------------------------

KINDS = {"story": story, "arithmetic": arithmetic, "calendar": calendar, "recipe": recipe,
         "record": slot_record}


def generate(seed, num_bytes, kind="all"):
    """Whole documents, each followed by END_OF_DOCUMENT and a newline; at most `num_bytes` bytes.

    With kind "all" the next document is of the kind that has had the fewest bytes so far.
    """
    pick = Picker(seed)
    written = dict.fromkeys(KINDS if kind == "all" else (kind,), 0)
    documents, total = [], 0
    while True:
        next_kind = min(written, key=written.get)
        document = KINDS[next_kind](pick) + END_OF_DOCUMENT + "\n"
        size = len(document.encode())
        if total + size > num_bytes:
            return "".join(documents)
        documents.append(document)
        written[next_kind] += size
        total += size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="same seed, same text (default 1)")
    parser.add_argument("--bytes", type=int, default=300_000,
                        help="upper bound of the text's size (default 300000)")
    parser.add_argument("--kind", choices=("all", *KINDS), default="all",
                        help="what to write (default all, in equal shares)")
    parser.add_argument("--out", help="file to write (default: standard output)")
    options = parser.parse_args()
    if options.bytes <= 0:
        parser.error("--bytes must be positive")
    text = generate(options.seed, options.bytes, options.kind)
    if options.out:
        with open(options.out, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
